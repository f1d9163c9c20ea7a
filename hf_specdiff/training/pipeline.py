"""From a target and prompts to a trained drafter on disk: what `hf-specdiff train` and the demo's recipe run."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase
from transformers import PrinterCallback
from transformers import TrainerCallback
from transformers import TrainingArguments

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.training.arguments import training_arguments
from hf_specdiff.training.callbacks import EvaluateAtEnd
from hf_specdiff.training.callbacks import StopOnInterrupt
from hf_specdiff.training.checkpoints import last_whole_checkpoint
from hf_specdiff.training.checkpoints import save_whole
from hf_specdiff.training.curves import plot_run
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import hold_out
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.drafter_config import make_drafter_config
from hf_specdiff.training.evaluation import HeldOut
from hf_specdiff.training.feature_cache import FeatureCache
from hf_specdiff.training.mask_token import check_mask_token
from hf_specdiff.training.mask_token import find_mask_token
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.processes import processes
from hf_specdiff.training.progress import TrainingLog
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.provenance import check_claim
from hf_specdiff.training.provenance import claim
from hf_specdiff.training.provenance import file_digest
from hf_specdiff.training.provenance import identity_of
from hf_specdiff.training.provenance import target_digest
from hf_specdiff.training.regeneration import NAMES
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.start import check_start
from hf_specdiff.training.start import starting_drafter
from hf_specdiff.training.trainer import SpecDiffTrainer


def train_drafter(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Sequence[Prompt] | Sequences,
    output: Path,
    plan: TrainingPlan,
    *,
    mask_token_id: int | None = None,
    regenerate_batch_size: int = 32,
    start_from: Path | None = None,
    cache_features: Path | None = None,
    language_model: Any = None,
) -> bool:
    """Regenerate, train, save; an interrupted call with the same arguments goes on where it stopped.

    Args:
        target (`transformers.PreTrainedModel`): frozen.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        corpus (`Sequence` or `Sequences`): texts or chats; the target continues them, and the drafter learns from that text,
            or, if the plan says so, from the texts and whole chats themselves. Or what the target has written already.
        output (`pathlib.Path`): the drafter; work in progress goes to its `work` subfolder.
        plan (`TrainingPlan`): all settings.
        mask_token_id (`int`, *optional*): see `SpecDiffConfig`; by default one that the target never writes.
        regenerate_batch_size (`int`): prompts that are continued together.
        start_from (`pathlib.Path`, *optional*): see `fit_drafter`.
        cache_features (`pathlib.Path`, *optional*): see `fit_drafter`.
        language_model (`DiffusionDrafter`, *optional*): see `fit_drafter`.

    Returns:
        `bool`: whether the drafter is finished; false after Ctrl-C, with a checkpoint in `work`.

    Raises:
        ValueError: if `output` holds a run with other settings, no prompt is usable, or the loss is no number any more.
        OSError: if the disk is full.
    """
    # A mistake in the plan is found before the work.
    check_start(plan, start_from, language_model)
    if language_model is None:
        make_drafter_config(target, plan, mask_token_id)
    else:
        mask_token_id = language_model.config.mask_token_id
    _arguments(target, output, plan, evaluates=False)
    work = output / "work"
    settings = {**asdict(plan), "mask_token_id": mask_token_id, "corpus": _digest(corpus), **identity_of(target)}
    settings["start_from"] = None if start_from is None else file_digest(start_from / "model.safetensors")
    settings["language_model"] = None if language_model is None else target_digest(language_model.body)
    check_claim(work / "plan.json", settings, output, NAMES)
    with room_in(output):
        sequences = (
            corpus if isinstance(corpus, Sequences) else _made(target, tokenizer, corpus, work, plan, regenerate_batch_size)
        )
        if mask_token_id is None:
            mask_token_id = find_mask_token(target, tokenizer, sequences)
        if language_model is None:  # to one with words of its own the id may mean something else than to the target
            check_mask_token(mask_token_id, target, sequences)
        sequences, apart = hold_out(sequences, plan.max_length, plan.num_eval_prompts, plan.seed)
        SequenceDataset(sequences, plan.max_length)  # a folder is not claimed by a run that cannot begin
        with processes().main_process_first():
            claim(work / "plan.json", settings)
        held_out = None if apart is None else HeldOut.of(apart, plan.max_length)
        arguments: dict[str, Any] = {"held_out": held_out, "start_from": start_from, "cache_features": cache_features}
        arguments |= {"special_ids": tokenizer.all_special_ids, "language_model": language_model}
        is_finished = fit_drafter(target, sequences, output, plan, mask_token_id=mask_token_id, **arguments)
        if is_finished:
            tokenizer.save_pretrained(output)  # a drafter's repository holds the tokenizer that its ids belong to
    return is_finished


def _digest(corpus: Sequence[Prompt] | Sequences) -> str:
    """Return what tells a corpus from others."""
    if isinstance(corpus, Sequences):
        return corpus.digest()
    return hashlib.sha256(json.dumps(list(corpus), sort_keys=True).encode()).hexdigest()[:16]


def _made(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    work: Path,
    plan: TrainingPlan,
    batch_size: int,
) -> Sequences:
    """Return the texts as they stand, or what the target writes behind them."""
    if plan.as_is:
        return sequences_of_texts(tokenizer, prompts, plan.max_length)
    settings: dict[str, Any] = {"max_length": plan.max_length, "temperature": plan.temperature, "seed": plan.seed}
    return regenerate(target, tokenizer, prompts, work / "sequences", **settings, batch_size=batch_size)


def fit_drafter(
    target: PreTrainedModel,
    sequences: Sequences,
    output: Path,
    plan: TrainingPlan,
    *,
    mask_token_id: int,
    start_from: Path | None = None,
    held_out: HeldOut | None = None,
    cache_features: Path | None = None,
    special_ids: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
    language_model: Any = None,
) -> bool:
    """Train on given sequences and save; the second half of `train_drafter`.

    Args:
        target (`transformers.PreTrainedModel`): frozen.
        sequences (`Sequences`): what to learn from.
        output (`pathlib.Path`): the drafter; checkpoints go to its `work` subfolder.
        plan (`TrainingPlan`): all settings.
        mask_token_id (`int`): see `SpecDiffConfig`.
        start_from (`pathlib.Path`, *optional*): a drafter of the same shape to go on from; by default a fresh one.
        held_out (`HeldOut`, *optional*): what to evaluate on; the best checkpoint is then what is saved.
        cache_features (`pathlib.Path`, *optional*): folder for the target's states, see `FeatureCache`; by default the target
            runs in every step.
        special_ids (`Sequence[int]`): the tokenizer's special tokens; those in the text are drafted however rare.
        callbacks (`Sequence[TrainerCallback]`): more of the host's trainer.
        language_model (`DiffusionDrafter`, *optional*): to go on from, in place of a drafter of ours; its body is changed.

    Returns:
        `bool`: whether the drafter is finished; false after Ctrl-C, with a checkpoint in `work`.

    Raises:
        ValueError: if the plan does not fit the target, the drafter to go on from, or the text.
    """
    check_start(plan, start_from, language_model)
    config = make_drafter_config(target, plan, mask_token_id) if language_model is None else language_model.config
    setup: dict[str, Any] = {"start_from": start_from, "special_ids": special_ids, "language_model": language_model}
    drafter = starting_drafter(target, sequences, plan, config, **setup)
    dataset = SequenceDataset(sequences, plan.max_length)
    if cache_features is not None:
        dataset.features = make_feature_cache(cache_features, dataset, target, plan)
    _write_down(drafter.config, plan, len(dataset))
    interrupt = StopOnInterrupt()
    trainer = SpecDiffTrainer(
        target=target,
        plan=plan,
        eval_prompts=None if held_out is None else held_out.prompts,
        language_model=language_model,
        model=drafter if language_model is None else drafter.body,
        args=_arguments(target, output, plan, evaluates=held_out is not None),
        train_dataset=dataset,
        eval_dataset=None if held_out is None else SequenceDataset(held_out.sequences, plan.max_length),
        callbacks=[interrupt, *callbacks],
    )
    _add_callbacks(trainer, plan, evaluates=held_out is not None)
    with interrupt, warnings.catch_warnings():
        # Under autocast weights stay in float32, which torch 2.13 calls a mismatch at the first step.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(Path(trainer.args.output_dir)))
    if trainer.is_world_process_zero():
        Console(stderr=True).print(trainer.footprint.summary(), highlight=False)
    if interrupt.was_interrupted:
        return False
    if trainer.is_world_process_zero():
        save_whole(trainer.drafter_of(trainer.model), output)
        plot_run(trainer.state.log_history, output)
    trainer.accelerator.wait_for_everyone()
    return True


def _arguments(target: PreTrainedModel, output: Path, plan: TrainingPlan, *, evaluates: bool) -> TrainingArguments:
    use_cpu = target.device.type == "cpu"
    return training_arguments(plan, output / "work" / "checkpoints", evaluates=evaluates, use_cpu=use_cpu)


def _add_callbacks(trainer: SpecDiffTrainer, plan: TrainingPlan, *, evaluates: bool) -> None:
    """Let a trainer tell what it does in our way, and stop where the plan says so."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingLog())
    if evaluates:
        trainer.add_callback(EvaluateAtEnd())
    if evaluates and plan.patience > 0:
        trainer.add_callback(EarlyStoppingCallback(plan.patience))


def make_feature_cache(folder: Path, dataset: SequenceDataset, target: Any, plan: TrainingPlan) -> FeatureCache:
    """Return the features of a data set, made where they are not there yet.

    Args:
        folder (`pathlib.Path`): of the cache.
        dataset (`SequenceDataset`): what to learn from.
        target (`transformers.PreTrainedModel`): the target.
        plan (`TrainingPlan`): names the layers and the objectives.

    Returns:
        `FeatureCache`: filled.

    Raises:
        ValueError: if the plan reads no features, or an objective reads the law of a target that does more to its logits than
            its head does.
    """
    if plan.target_layer_ids is None:
        raise ValueError(
            "`cache_features` must be left out for a token-conditioned drafter, got a folder. It reads no features."
        )
    cache = FeatureCache(folder, dataset, target, plan.target_layer_ids, keeps_law=plan.needs_law)
    cache.fill()
    return cache


def _write_down(config: SpecDiffConfig, plan: TrainingPlan, num_sequences: int) -> None:
    """Put into a drafter's configuration how it is made, for its card; a later stage follows the earlier ones."""
    terms = [f"{name} (weight {weight:g})" for name, weight in plan.loss_weights.items()]
    if plan.context_weight:
        terms.append(f"next token of the context (weight {plan.context_weight:g})")
    kind = " of text as it stands," if plan.as_is else ""
    alone = ", for the head alone" if plan.trained == "head" else ""
    stage = {
        "data": f"{num_sequences:,} sequences{kind} of up to {plan.max_length} tokens, {plan.num_epochs:g} epochs",
        "objective": " + ".join(terms) + alone,
    }
    earlier = config.training or {}
    config.training = {name: f"{earlier[name]}; then {text}" if name in earlier else text for name, text in stage.items()}

"""From a target and prompts to a trained drafter on disk: what `hf-specdiff train` and the demo's recipe run."""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase
from transformers import PrinterCallback
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_specdiff.core.configuration_specdiff import SIZES
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.training.continuation import end_tokens_of
from hf_specdiff.training.curves import plot_run
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import hold_out
from hf_specdiff.training.data import processes
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.draft_vocabulary import drafted_tokens
from hf_specdiff.training.draft_vocabulary import restrict
from hf_specdiff.training.feature_cache import FeatureCache
from hf_specdiff.training.first_weights import NUM_TOKENS
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.heads import HEADS
from hf_specdiff.training.heads import add_head
from hf_specdiff.training.heads import train_head_alone
from hf_specdiff.training.language_models import add_adapter
from hf_specdiff.training.language_models import check_plan
from hf_specdiff.training.losses import DISTILLATION
from hf_specdiff.training.mask_token import check_mask_token
from hf_specdiff.training.mask_token import find_mask_token
from hf_specdiff.training.progress import TrainingLog
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.provenance import check_claim
from hf_specdiff.training.provenance import claim
from hf_specdiff.training.provenance import file_digest
from hf_specdiff.training.provenance import identity_of
from hf_specdiff.training.provenance import target_digest
from hf_specdiff.training.regeneration import NAMES
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.trainer import EvaluateAtEnd
from hf_specdiff.training.trainer import SpecDiffTrainer
from hf_specdiff.training.trainer import SpecDiffTrainingArguments
from hf_specdiff.training.trainer import StopOnInterrupt
from hf_specdiff.training.trainer import make_drafter_config

MOST_RANK = SIZES["markov_rank"][1]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Everything that decides what a training run ends in.

    Attributes:
        target_layer_ids (`list[int]`, *optional*): layers to read; `None` for a token-conditioned drafter.
        num_layers (`int`): layers of the drafter.
        block_size (`int`): slots of a window: the anchor and masks.
        max_length (`int`): tokens of a training sequence.
        num_epochs (`float`): passes over the sequences.
        batch_size (`int`): sequences of a step.
        num_anchors (`int`): windows of a sequence and step.
        learning_rate (`float`): peak of the cosine schedule.
        loss_weights (`dict[str, float]`): the weight of each objective, see `SpecDiffTrainingArguments`.
        loss_decay (`float`): positions after which a position's weight in `decayed_ce` and `focal` has fallen by e.
        context_weight (`float`): weight of next-token prediction on the context, token-conditioned drafters only.
        seed (`int`): of weights, order and windows.
        bf16 (`bool`): whether to compute in bfloat16 (weights stay in float32).
        save_steps (`int`): steps between checkpoints, and between evaluations.
        num_eval_prompts (`int`): prompts kept out of training and decoded with the real loop at every evaluation, but never
            more than a tenth of all; the drafter with the most tokens per round is kept. 0: none, and the last one is kept.
        eval_tokens (`int`): tokens to write after each of them.
        temperature (`float`): at which the target continues the prompts; 0: greedily.
        patience (`int`): evaluations without a better one after which training stops; 0: never.
        as_is (`bool`): whether to learn from the texts as they stand, instead of from the target's continuations.
        warmup (`float`): share of the steps over which the learning rate rises to its peak.
        has_mask_embedding (`bool`): see `SpecDiffConfig`; for targets whose embedding is their head.
        draft_vocab_size (`int`, *optional*): tokens that are drafted: the commonest of the training text, and those that end
            the target's text or are special in it. Feature-conditioned drafters only. `None`: all, or those of the drafter that
            the run goes on from.
        head (`str`, *optional*): `"markov"` or `"gated"`: a head that makes each position's law one that is given the token
            before it, see `SpecDiffConfig.markov_head_type`; feature-conditioned drafters only. `None`: none, or that of the
            drafter that the run goes on from.
        head_rank (`int`): its rank.
        predicts_from_anchor (`bool`): see `SpecDiffConfig`; DeepSpec's layout has no other drafters.
        trained (`str`): `"all"`, or `"head"`: the weights of the drafter that the run goes on from stay, but for its head's.
        from_target (`bool`): whether the layers begin as the target's last ones, see `first_weights.borrow_layers`.
        lora_rank (`int`, *optional*): of a diffusion language model: hold its weights and train an adapter of this rank beside
            them; by default all weights are trained.
        lora_layers (`list[str]`, *optional*): which linear layers get one; by default all but the head.
    """

    target_layer_ids: list[int] | None
    num_layers: int = 3
    block_size: int = 16
    max_length: int = 256
    num_epochs: float = 4
    batch_size: int = 16
    num_anchors: int = 8
    learning_rate: float = 1e-3
    loss_weights: dict[str, float] = field(default_factory=lambda: {"decayed_ce": 1.0})
    loss_decay: float = 7.0
    context_weight: float = 0.0
    seed: int = 0
    bf16: bool = True
    save_steps: int = 250
    num_eval_prompts: int = 32
    eval_tokens: int = 128
    patience: int = 0
    temperature: float = 0.0
    as_is: bool = False
    warmup: float = 0.05
    has_mask_embedding: bool = False
    draft_vocab_size: int | None = None
    head: str | None = None
    head_rank: int = 64
    predicts_from_anchor: bool = False
    trained: str = "all"
    from_target: bool = False
    lora_rank: int | None = None
    lora_layers: list[str] | None = None


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
    _check_trained(plan, start_from, language_model)
    if language_model is not None:
        mask_token_id = language_model.config.mask_token_id
    # A mistake in the plan is found before the work.
    _training_setup(target, output, plan, mask_token_id, language_model=language_model)
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


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a run is judged by.

    Attributes:
        prompts (`list[list[int]]`): token ids, to be decoded with the real loop.
        sequences (`Sequences`): the same prompts with the target's continuations, for loss and calibration.
    """

    prompts: list[list[int]]
    sequences: Sequences

    @classmethod
    def of(cls, sequences: Sequences, max_length: int) -> "HeldOut":
        """Take the prompts from sequences that were kept out of training, each once."""
        rows = sequences.usable(max_length).nonzero()[:, 0].tolist()
        prompts = {sequences.groups[row].item(): sequences.prompt(row, max_length) for row in rows}
        return cls(list(prompts.values()), sequences)


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
    _check_trained(plan, start_from, language_model)
    setup: dict[str, Any] = {"evaluates": held_out is not None, "language_model": language_model}
    config, arguments = _training_setup(target, output, plan, mask_token_id, **setup)
    interrupt = StopOnInterrupt()
    token_ids = None
    if plan.draft_vocab_size is not None:
        token_ids = drafted_tokens(sequences, plan.draft_vocab_size, end_tokens_of(target), special_ids, mask_token_id)
    config.draft_vocab_size = None if token_ids is None else len(token_ids)
    if plan.from_target and start_from is not None:
        raise ValueError("`from_target` must be false where a run goes on from a drafter, got true. Its weights are its own.")
    if language_model is not None:
        drafter = language_model
        if plan.lora_rank is not None:
            add_adapter(drafter, plan.lora_rank, plan.lora_layers, plan.seed)
    elif start_from is None:
        text = sequences.tokens[:NUM_TOKENS].long() if plan.from_target else None
        drafter = new_drafter(config, plan.seed, target, token_ids, text=text)
    else:
        drafter = drafter_to_go_on_from(start_from, config, token_ids)
    if plan.head is not None:
        add_head(drafter, plan.head, plan.head_rank, plan.seed)
    if plan.trained == "head":
        train_head_alone(drafter)
    dataset = SequenceDataset(sequences, plan.max_length)
    if cache_features is not None:
        dataset.features = make_feature_cache(cache_features, dataset, target, plan)
    _write_down(drafter.config, plan, len(dataset))
    trainer = SpecDiffTrainer(
        target=target,
        eval_prompts=None if held_out is None else held_out.prompts,
        language_model=language_model,
        model=drafter if language_model is None else drafter.body,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=None if held_out is None else SequenceDataset(held_out.sequences, plan.max_length),
        callbacks=[interrupt, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingLog())
    if held_out is not None:
        trainer.add_callback(EvaluateAtEnd())
    if held_out is not None and plan.patience > 0:
        trainer.add_callback(EarlyStoppingCallback(plan.patience))
    with interrupt, warnings.catch_warnings():
        # Under autocast weights stay in float32, which torch 2.13 calls a mismatch at the first step.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(Path(str(arguments.output_dir))))
    if trainer.is_world_process_zero():
        Console(stderr=True).print(trainer.footprint.summary(), highlight=False)
    if interrupt.was_interrupted:
        return False
    if trainer.is_world_process_zero():
        _save_whole(trainer.drafter_of(trainer.model), output)
        plot_run(trainer.state.log_history, output)
    trainer.accelerator.wait_for_everyone()
    return True


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
    needs_law = not DISTILLATION.keys().isdisjoint(plan.loss_weights)
    cache = FeatureCache(folder, dataset, target, plan.target_layer_ids, keeps_law=needs_law)
    cache.fill()
    return cache


def drafter_to_go_on_from(folder: Path, config: SpecDiffConfig, token_ids: torch.Tensor | None = None) -> SpecDiffDrafter:
    """Load a trained drafter, to train it further.

    Args:
        folder (`pathlib.Path`): the drafter.
        config (`SpecDiffConfig`): what the plan asks for.
        token_ids (`torch.Tensor` of shape `(n,)`, int64, *optional*): what is to be drafted by a drafter that
            drafted every token until now. One with a reduced vocabulary keeps its own.

    Returns:
        `SpecDiffDrafter`: with its weights.

    Raises:
        ValueError: if it is of another shape, or its vocabulary cannot become the one that is asked for.
    """
    drafter = SpecDiffDrafter.from_pretrained(folder)
    names = ["target_layer_ids", "num_hidden_layers", "hidden_size", "block_size", "mask_token_id", "vocab_size"]
    names += ["has_mask_embedding", "predicts_from_anchor"]
    differing = {
        name: (getattr(drafter.config, name), getattr(config, name))
        for name in names
        if getattr(drafter.config, name) != getattr(config, name)
    }
    if differing:
        raise ValueError(
            f"`start_from` must be a drafter of the shape that is asked for, got {str(folder)!r} with {differing} (there, "
            "asked for). Ask for its own."
        )
    own = drafter.config.draft_vocab_size
    if token_ids is not None and own not in (None, len(token_ids)):
        raise ValueError(
            f"`draft_vocab_size` must be the {own} of the drafter to go on from, got {len(token_ids)}. Leave it out, and it "
            "keeps its tokens."
        )
    return restrict(drafter, token_ids) if own is None and token_ids is not None else drafter


def _check_trained(plan: TrainingPlan, start_from: Path | None, language_model: Any = None) -> None:
    """Refuse a head that cannot be, or one that is to be trained on nothing, and what does not go with a language model."""
    if language_model is not None:
        check_plan(plan)
    elif plan.lora_rank is not None or plan.lora_layers is not None:
        raise ValueError(
            "`lora_rank` and `lora_layers` must be left out for drafters of ours, got one of them. They are for diffusion "
            "language models; ours are small, and all of their weights are trained."
        )
    if language_model is not None and start_from is not None:
        raise ValueError("`start_from` must be left out with `language_model`, got both. A run goes on from one of them.")
    if plan.head is not None and plan.head not in HEADS:
        raise ValueError(f"`head` must be one of {', '.join(HEADS)}, got {plan.head!r}.")
    if plan.head is not None and plan.target_layer_ids is None:
        raise ValueError(
            f"`head` must be left out for a token-conditioned drafter, got {plan.head!r}. Feature-conditioned ones have heads."
        )
    if plan.head is not None and not 1 <= plan.head_rank <= MOST_RANK:
        raise ValueError(f"`head_rank` must be from 1 to {MOST_RANK}, got {plan.head_rank}. Take 64, or 256.")
    if plan.trained not in ("all", "head"):
        raise ValueError(f"`trained` must be 'all' or 'head', got {plan.trained!r}.")
    if plan.trained == "head" and start_from is None:
        raise ValueError(
            "`trained` must be 'all' for a fresh drafter, got 'head': its head would learn beside noise. Name a drafter "
            "to go on from (--init)."
        )


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


def _training_setup(
    target: PreTrainedModel,
    output: Path,
    plan: TrainingPlan,
    mask_token_id: int | None,
    *,
    evaluates: bool = False,
    language_model: Any = None,
) -> tuple[SpecDiffConfig, SpecDiffTrainingArguments]:
    """Turn a plan into the drafter's configuration and the trainer's arguments, both checked."""
    most = target.config.get_text_config().vocab_size
    if plan.draft_vocab_size is not None and not 2 <= plan.draft_vocab_size <= most:
        raise ValueError(
            f"`draft_vocab_size` must be from 2 to the target's {most} tokens, got {plan.draft_vocab_size}. Leave it out to "
            "draft every token."
        )
    config = None if language_model is None else language_model.config
    config = config or make_drafter_config(
        target,
        mask_token_id=mask_token_id,
        block_size=plan.block_size,
        num_layers=plan.num_layers,
        target_layer_ids=plan.target_layer_ids,
        has_mask_embedding=plan.has_mask_embedding,
        draft_vocab_size=plan.draft_vocab_size,
        predicts_from_anchor=plan.predicts_from_anchor,
    )
    evaluation: dict[str, Any] = {}
    if evaluates:
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": plan.save_steps,
            # A resumed run has that behind it.
            "eval_on_start": last_whole_checkpoint(output / "work" / "checkpoints") is None,
            "per_device_eval_batch_size": plan.batch_size,
            "load_best_model_at_end": True,
            "metric_for_best_model": "tokens_per_round",
            "greater_is_better": True,
        }
    arguments = SpecDiffTrainingArguments(
        **evaluation,
        eval_tokens=plan.eval_tokens,
        output_dir=str(output / "work" / "checkpoints"),
        num_train_epochs=plan.num_epochs,
        per_device_train_batch_size=plan.batch_size,
        num_anchors=plan.num_anchors,
        learning_rate=plan.learning_rate,
        loss_weights=dict(plan.loss_weights),
        loss_decay=plan.loss_decay,
        context_weight=plan.context_weight,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup,  # a share, being less than 1
        disable_tqdm=not sys.stderr.isatty(),
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=plan.seed,
        bf16=plan.bf16,
        use_cpu=target.device.type == "cpu",
        save_steps=plan.save_steps,
        save_total_limit=2,
        logging_steps=25,
        report_to="none",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    return config, arguments


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and remove newer ones that were not.

    The host writes a checkpoint's files in place, `trainer_state.json` last, and resumes from the highest number.

    Args:
        folder (`pathlib.Path`): of the checkpoints; need not exist.

    Returns:
        `str`, *optional*: a checkpoint's folder; `None` if there is none.
    """
    while folder.is_dir() and (newest := get_last_checkpoint(folder)) is not None:
        try:
            json.loads((Path(newest) / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(newest)
            continue
        return newest
    return None


def _save_whole(model: Any, output: Path) -> None:
    """Save a model beside its place, then move its files in, the configuration last: a folder that loads is complete."""
    partial = output / "work" / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        place = output / path.name
        if place.is_dir():
            shutil.rmtree(place)  # the code of an earlier run's drafter
        os.replace(path, place)
    partial.rmdir()

"""The drafter that a run begins with: a fresh one, a trained one, or a diffusion language model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.training.continuation import end_tokens_of
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.draft_vocabulary import drafted_tokens
from hf_specdiff.training.draft_vocabulary import restrict
from hf_specdiff.training.first_weights import NUM_TOKENS
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.heads import add_head
from hf_specdiff.training.heads import train_head_alone
from hf_specdiff.training.language_models import add_adapter
from hf_specdiff.training.language_models import check_plan
from hf_specdiff.training.plan import TrainingPlan


def check_start(plan: TrainingPlan, start_from: Path | None, language_model: Any = None) -> None:
    """Refuse settings that do not go together, or not with what a run begins with.

    Args:
        plan (`TrainingPlan`): all settings.
        start_from (`pathlib.Path`, *optional*): a drafter to go on from.
        language_model (`DiffusionDrafter`, *optional*): or this one.

    Raises:
        ValueError: if so.
    """
    if language_model is not None:
        check_plan(plan)
    elif plan.lora_rank is not None or plan.lora_layers is not None:
        raise ValueError(
            "`lora_rank` and `lora_layers` must be left out for drafters of ours, got one of them. They are for diffusion "
            "language models; ours are small, and all of their weights are trained."
        )
    if language_model is not None and start_from is not None:
        raise ValueError("`start_from` must be left out with `language_model`, got both. A run goes on from one of them.")
    if plan.head is not None and plan.target_layer_ids is None:
        raise ValueError(
            f"`head` must be left out for a token-conditioned drafter, got {plan.head!r}. Feature-conditioned ones have heads."
        )
    if plan.trained == "head" and start_from is None:
        raise ValueError(
            "`trained` must be 'all' for a fresh drafter, got 'head': its head would learn beside noise. Name a drafter "
            "to go on from (--init)."
        )
    if plan.from_target and start_from is not None:
        raise ValueError("`from_target` must be false where a run goes on from a drafter, got true. Its weights are its own.")


def starting_drafter(
    target: PreTrainedModel,
    sequences: Sequences,
    plan: TrainingPlan,
    config: SpecDiffConfig,
    *,
    start_from: Path | None = None,
    special_ids: Sequence[int] = (),
    language_model: Any = None,
) -> Any:
    """Return the drafter as it is before the first step.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        sequences (`Sequences`): what to learn from; tells the commonest tokens.
        plan (`TrainingPlan`): all settings, checked by `check_start`.
        config (`SpecDiffConfig`): what the plan asks for; its vocabulary becomes the one that the text has.
        start_from (`pathlib.Path`, *optional*): a drafter of that shape to go on from.
        special_ids (`Sequence[int]`): the tokenizer's special tokens; those in the text are drafted however rare.
        language_model (`DiffusionDrafter`, *optional*): to go on from, in place of a drafter of ours; its body is changed.

    Returns:
        `SpecDiffDrafter` or `DiffusionDrafter`: with head or adapter, and what does not learn held.

    Raises:
        ValueError: if the drafter to go on from, or the text, is not what the plan asks for.
    """
    if language_model is not None:
        if plan.lora_rank is not None:
            add_adapter(language_model, plan.lora_rank, plan.lora_layers, plan.seed)
        return language_model
    token_ids = None
    if plan.draft_vocab_size is not None:
        assert config.mask_token_id is not None
        token_ids = drafted_tokens(sequences, plan.draft_vocab_size, end_tokens_of(target), special_ids, config.mask_token_id)
    config.draft_vocab_size = None if token_ids is None else len(token_ids)
    if start_from is None:
        text = sequences.tokens[:NUM_TOKENS].long() if plan.from_target else None
        drafter = new_drafter(config, plan.seed, target, token_ids, text=text)
    else:
        drafter = drafter_to_go_on_from(start_from, config, token_ids)
    if plan.head is not None:
        add_head(drafter, plan.head, plan.head_rank, plan.seed)
    if plan.trained == "head":
        train_head_alone(drafter)
    return drafter


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

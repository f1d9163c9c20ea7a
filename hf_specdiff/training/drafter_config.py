"""The configuration of a drafter that fits a target."""

from transformers import PreTrainedModel

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.repository import cached_revision
from hf_specdiff.training.plan import TrainingPlan


def make_drafter_config(target: PreTrainedModel, plan: TrainingPlan, mask_token_id: int | None) -> SpecDiffConfig:
    """Return the configuration of a fresh drafter that fits a target: its widths, its vocabulary, its special ids.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        plan (`TrainingPlan`): says what the drafter reads, and its own sizes.
        mask_token_id (`int`, *optional*): an id that the target never writes; `None` where it is not known yet.

    Returns:
        `SpecDiffConfig`: of a fresh drafter.

    Raises:
        ValueError: if the plan does not fit the target.
    """
    config = target.config.get_text_config()
    if plan.draft_vocab_size is not None and plan.draft_vocab_size > config.vocab_size:
        raise ValueError(
            f"`draft_vocab_size` must be from 2 to the target's {config.vocab_size} tokens, got {plan.draft_vocab_size}. Leave "
            "it out to draft every token."
        )
    num_heads = config.num_attention_heads
    # What its layers count with, so that they can be borrowed; "default": the angles of the target's own long-text scaling,
    # if it has one, are left out.
    rope = getattr(config, "rope_parameters", None) or {}
    alike = {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}} if "rope_theta" in rope else {}
    if getattr(config, "rms_norm_eps", None):
        alike["rms_norm_eps"] = config.rms_norm_eps
    return SpecDiffConfig(
        **alike,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=plan.target_layer_ids is None,
        block_size=plan.block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=plan.target_layer_ids,
        has_mask_embedding=plan.has_mask_embedding,
        draft_vocab_size=plan.draft_vocab_size,
        predicts_from_anchor=plan.predicts_from_anchor,
        num_target_layers=config.num_hidden_layers if plan.target_layer_ids is not None else None,
        target_model=target.name_or_path or None,
        target_revision=cached_revision(target.name_or_path),
    )


def spread_layers(num_target_layers: int, count: int) -> list[int]:
    """Return `count` layers spread evenly from the second to the third-last, as published drafters read them.

    Args:
        num_target_layers (`int`): layers of the target.
        count (`int`): layers to read, at most the target's.

    Returns:
        `list[int]`: 0-based, ascending, all different.

    Raises:
        ValueError: if there are not so many layers.

    Source: arXiv:2602.06036, section 3.
    """
    if not 1 <= count <= num_target_layers:
        raise ValueError(f"`count` must be from 1 to the target's {num_target_layers} layers, got {count}.")
    last, first = max(num_target_layers - 3, 0), min(1, num_target_layers - 1)
    spread = {round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)}
    others = (i for i in range(num_target_layers) if i not in spread)
    while len(spread) < count:
        spread.add(next(others))
    return sorted(spread)

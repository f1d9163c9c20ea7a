"""Which kind of target a call needs: one text, many, many one by one, a running state, or a static cache.

Knows what calls ask for and what models can; knows no drafter and no rule.
"""

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache
from transformers import GenerationConfig
from transformers.utils import logging

from .cache import CACHE_NAMES
from .cache import cache_of
from .checks import check_window
from .masked_target import FULL
from .masked_target import MaskedTarget
from .masked_target import layer_kinds
from .masked_target import unmasked_window
from .rowwise_target import RowwiseTarget
from .speculation import SpeculationConfig
from .stateful_target import chain_target_class
from .stateful_target import is_stateful
from .static_target import StaticTarget
from .static_target import widths_of
from .target import Target
from .target import reads_plain_inputs

logger = logging.get_logger(__name__)


def make_target(
    model: Any,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    layer_ids: list[int] | None,
    speculation: SpeculationConfig,
    num_rows: int,
    why_no_masks: Callable[[], str | None],
) -> Target:
    """Return the target of a call that has been checked, before its prefill.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        generation_config (`GenerationConfig`): the call's. `cache_implementation="static"` asks for a static cache; a model
            that cannot have one gets a dynamic cache, and the log says so once.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.
        speculation (`SpeculationConfig`): what rounds look like.
        num_rows (`int`): B.
        why_no_masks (`Callable`): says why this call cannot verify with masks of ours, or `None`; asked only if it matters.

    Returns:
        `Target`: of the kind that the call needs.
    """
    if generation_config.cache_implementation == "static":
        obstacle = _why_length_is_unknown(generation_config, speculation, num_rows)
        obstacle = obstacle or why_not_static(model, model_kwargs) or why_no_masks()
        if obstacle is None:
            widths = widths_of(speculation.max_nodes, is_adaptive=speculation.is_adaptive)
            return StaticTarget(model, generation_config, model_kwargs, layer_ids, widths, num_rows)
        logger.warning_once(f"A dynamic cache takes the place of the static one that was asked for: {obstacle}.")
        name = next(name for name in CACHE_NAMES if model_kwargs.get(name) is not None)
        model_kwargs[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
    obstacle = why_no_masks() if num_rows > 1 else None
    if obstacle is not None:
        logger.warning_once(f"The rows of this batch are verified one after another: {obstacle}.")
    needs_masks = obstacle is None and (num_rows > 1 or speculation.draft_shape != "chain")
    if not needs_masks and not is_stateful(model):
        needs_masks = _needs_masks_for_window(model, cache_of(model_kwargs), why_no_masks, generation_config.max_length)
    if obstacle is not None:
        return RowwiseTarget(model, generation_config, model_kwargs, layer_ids, num_rows)
    target_class = MaskedTarget if needs_masks else chain_target_class(model)
    return target_class(model, generation_config, model_kwargs, layer_ids)


def _why_length_is_unknown(generation_config: GenerationConfig, speculation: SpeculationConfig, num_rows: int) -> str | None:
    """Return why nobody can say how many slots a static cache must have, or `None`."""
    if not speculation.is_bounded:
        return "a drafter of your own may draft as much as it likes"
    # Rows that end early join again at the end, behind the longest one.
    if num_rows > 1 and wants_passes(generation_config):
        return "scores or states of a batch are wanted"
    return None


def wants_passes(generation_config: GenerationConfig) -> bool:
    """Return whether a call wants more of its passes than tokens: scores, logits or hidden states."""
    wanted = [getattr(generation_config, f"output_{name}") for name in ("scores", "logits", "hidden_states")]
    return bool(generation_config.return_dict_in_generate and any(wanted))


def _needs_masks_for_window(model: Any, cache: Any, why_no_masks: Callable[[], str | None], max_length: int | None) -> bool:
    """Return whether a chain needs masks of ours, because the model's window is only what its cache drops."""
    window = unmasked_window(model, cache)
    obstacle = None if window is None else why_no_masks()
    if window is not None and obstacle is not None:
        check_window(window, obstacle, max_length)
    return window is not None and obstacle is None


def why_not_static(model: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Return why a model cannot draft over a static cache, or `None` if it can.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        model_kwargs (`dict[str, Any]`): what `generate` prepared.

    Returns:
        `str`, *optional*: the reason.
    """
    name = type(model).__name__
    if is_stateful(model):
        return f"{name} keeps a running state"
    kinds = layer_kinds(model.config.get_text_config())
    if kinds != [FULL]:
        return f"{name} has layers with a window ({', '.join(kind for kind in kinds if kind != FULL)})"
    if not reads_plain_inputs(model, model_kwargs, model.device):
        return f"{name} prepares its inputs in a way of its own"
    return None

"""What a drafter's configuration may hold: every field is looked at before a tensor is made from it.

Files of strangers hold anything: strings for numbers, a million layers. Knows ranges, no meanings.
"""

import math
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# From and to, both allowed. The upper ends are far above any drafter: past them a file is broken, and a network of it would
# fill the memory or be built for hours.
SIZES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**19),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**14),
    "block_size": (2, 2**24),
    "max_position_embeddings": (1, 2**40),
    "format_version": (1, 2**31),
    "markov_rank": (0, 2**14),
    "selector_rank": (0, 2**14),
    "selector_top_k": (1, 2**24),
    "conv_kernel_size": (0, 2**10),
    "conv_group_size": (1, 2**17),
}
OPTIONAL_SIZES = {
    "mask_token_id": (0, 2**24),
    "num_target_layers": (1, 2**12),
    "sliding_window": (2, 2**40),
    "draft_vocab_size": (1, 2**24),
    "target_hidden_size": (1, 2**17),
}
REALS = {
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "input_embedding_scale": (-1e6, 1e6),
    "output_multiplier": (-1e6, 1e6),
}
KINDS = {"target_model": str, "target_revision": str, "training": dict, "dflash_config": dict}
MAX_TARGET_LAYERS = 2**12
LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_before_the_host(config: Any) -> None:
    """Refuse what the host would stumble over while it fills in its defaults.

    Args:
        config (`SpecDiffConfig`): as it was read.

    Raises:
        ValueError: for a number of layers or a dtype that cannot be.
    """
    _check_size("num_hidden_layers", config.num_hidden_layers, *SIZES["num_hidden_layers"])
    dtype = config.dtype
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be one of torch's, got {_shown(dtype)}.")


def check_fields(config: Any) -> None:
    """Refuse fields of a wrong type or out of range, and sizes that do not go together.

    Args:
        config (`SpecDiffConfig`): as it was read, the host's defaults filled in.

    Raises:
        ValueError: for the first that is wrong.
    """
    for name, (low, high) in SIZES.items():
        _check_size(name, getattr(config, name), low, high)
    for name, (low, high) in OPTIONAL_SIZES.items():
        if getattr(config, name) is not None:
            _check_size(name, getattr(config, name), low, high)
    for name, (least, most) in REALS.items():
        value = getattr(config, name)
        if not _is_real(value) or not least <= value <= most:
            raise ValueError(f"`{name}` must be a number from {least:g} to {most:g}, got {_shown(value)}.")
    for name, kind in KINDS.items():
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{name}` must be a {kind.__name__} or None, got {_shown(value)}.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_key_value_heads` must divide `num_attention_heads` {config.num_attention_heads}, got "
            f"{config.num_key_value_heads}."
        )
    if config.head_dim % 2:
        raise ValueError(f"`head_dim` must be even for rotary positions, got {config.head_dim}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be an activation that transformers knows, got {_shown(config.hidden_act)}.")
    kinds = config.layer_types
    if kinds is not None and (len(kinds) != config.num_hidden_layers or not set(kinds) <= LAYER_TYPES):
        raise ValueError(
            f"`layer_types` must name one of {', '.join(sorted(LAYER_TYPES))} for each of {config.num_hidden_layers} layers, "
            f"got {_shown(kinds)}."
        )
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith(".safetensors"):
        raise ValueError(f"`transformers_weights` must be a safetensors file or None, got {_shown(weights)}.")
    _check_rotary_fields(config.rope_parameters)
    _check_layer_ids(config.target_layer_ids)


def _check_size(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {_shown(value)}.")


def _check_layer_ids(layer_ids: Any) -> None:
    if layer_ids is None:
        return
    is_list = isinstance(layer_ids, list | tuple) and 0 < len(layer_ids) <= MAX_TARGET_LAYERS
    if not is_list or not all(type(layer) is int and -1 <= layer < MAX_TARGET_LAYERS for layer in layer_ids):
        raise ValueError(
            "`target_layer_ids` must be a list of layers, counted from 0 (-1: the embedding's output), got "
            f"{_shown(layer_ids)}."
        )
    if len(set(layer_ids)) != len(layer_ids):
        raise ValueError(f"`target_layer_ids` must name different layers, counted from 0, got {_shown(layer_ids)}.")


def _check_rotary_fields(parameters: Any) -> None:
    """Refuse rotary parameters that the host would fail on while it computes frequencies."""
    if parameters is None:
        return
    kind = parameters.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"`rope_parameters` must have a `rope_type` that transformers knows, got {_shown(kind)}.")
    theta = parameters.get("rope_theta")
    if theta is not None and not (_is_real(theta) and theta > 0):
        raise ValueError(f"`rope_parameters` must have a positive number as `rope_theta`, got {_shown(theta)}.")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """Return a value as a short piece of one line."""
    text = " ".join(repr(value)[:200].split())
    return text if len(text) <= 60 else f"{text[:60]}..."

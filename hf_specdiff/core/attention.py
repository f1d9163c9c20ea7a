"""What the host's attention is told for passes of several tokens.

Knows one setting of the host.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel

# Read by transformers' "sdpa" attention at every call; 5.17 does not know it yet.
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"
# How many passes are under way, in all threads, for which the setting was made.
_LOCK = Lock()
_passes = 0


@contextmanager
def grouped_heads(on_cpu: bool, num_tokens: int) -> Iterator[None]:
    """Let the query heads of a group share their keys and values inside `with`, also under a mask, instead of copying them.

    The host copies the whole cache in every layer of such a pass, since GPU kernels take no mask over grouped heads; those of
    the CPU do, and are then up to five times quicker. Plain decoding never copies: its passes of one token go another way.

    Args:
        on_cpu (`bool`): whether all of the pass runs there; elsewhere nothing is changed.
        num_tokens (`int`): of the pass; for a single one nothing is changed.

    Yields:
        Nothing.
    """
    if not (on_cpu and num_tokens > 1 and has_grouped_kernel() and _enter()):
        yield
        return
    try:
        yield
    finally:
        _leave()


def is_on_cpu(model: Any) -> bool:
    """Return whether all of a model's weights are used on the CPU."""
    placement = getattr(model, "hf_device_map", None)
    return all(str(place) == "cpu" for place in placement.values()) if placement else model.device.type == "cpu"


@cache
def has_grouped_kernel() -> bool:
    """Return whether this torch has a fast CPU kernel for grouped heads under a mask; without one it copies all the same."""
    query, key = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 4, 8)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(query, key, key, torch.zeros(1, 1, 2, 4), enable_gqa=True)
    except RuntimeError:
        return False
    return True


def _enter() -> bool:
    """Make the setting, unless it is the user's own."""
    global _passes
    with _LOCK:
        if _passes == 0 and FORCE_GQA in os.environ:
            return False
        _passes += 1
        os.environ[FORCE_GQA] = "1"
    return True


def _leave() -> None:
    """Take the setting back with the last pass."""
    global _passes
    with _LOCK:
        _passes -= 1
        if _passes == 0:
            os.environ.pop(FORCE_GQA, None)

"""What the host's attention is told for passes of several tokens.

Knows one setting of the host. Imported by target and drafters.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Read by transformers' "sdpa" attention at every call; 5.17 does not know it yet.
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"


@contextmanager
def grouped_heads(device: torch.device, num_tokens: int) -> Iterator[None]:
    """Let the query heads of a group share their keys and values inside `with`, also under a mask, instead of copying them.

    The host copies the whole cache in every layer of such a pass, since GPU kernels take no mask over grouped heads; those of
    the CPU do, and are then up to five times quicker. Plain decoding never copies: its passes of one token go another way.

    Args:
        device (`torch.device`): where the pass runs; on others than the CPU nothing is changed.
        num_tokens (`int`): of the pass; for a single one nothing is changed.

    Yields:
        Nothing.
    """
    if device.type != "cpu" or num_tokens == 1 or FORCE_GQA in os.environ:
        yield  # the user's own setting stays
        return
    os.environ[FORCE_GQA] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_GQA, None)

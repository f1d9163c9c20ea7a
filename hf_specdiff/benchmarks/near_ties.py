"""Near ties: whether a greedy text leaves plain decoding's where the target itself is undecided.

In low precision the last bits of a pass depend on how many tokens are in it. Where two tokens are that close, either may be
written, by plain decoding too when the batch changes. How close that is, is measured at the very place. Knows no drafter.
"""

import math
from typing import Any

import torch

from hf_specdiff.core.draft import Draft
from hf_specdiff.core.stateful_target import chain_target_class
from hf_specdiff.core.target import fresh_kwargs
from hf_specdiff.core.text import Text

# The last tokens of a text are read in passes of these widths too, beside one pass over all of it.
WIDTHS = (1, 8)
# The largest of a few differences is not the largest there is.
MARGIN = 4.0


def count_near_ties(model: Any, mask: torch.Tensor, sequences: torch.Tensor, expected: torch.Tensor) -> int:
    """Count the rows that differ from plain decoding's and first do so at a near tie.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        mask (`torch.Tensor` of shape `(B, L)`, int64): 0 on padding in front of the prompts.
        sequences (`torch.Tensor` of shape `(B, n)`, int64): greedy texts, prompts included.
        expected (`torch.Tensor` of shape `(B, m)`, int64): plain decoding's.

    Returns:
        `int`: from 0 to the number of rows that differ.
    """
    num_ties = 0
    for row, (own, plain) in enumerate(zip(sequences.tolist(), expected.tolist(), strict=True)):
        place = next((place for place, (a, b) in enumerate(zip(own, plain, strict=False)) if a != b), None)
        if place is not None:
            prefix = expected[row : row + 1, int((mask[row] == 0).sum()) : place]
            num_ties += gap_between(model, prefix, [own[place], plain[place]]) <= rounding_at(model, prefix)
    return num_ties


def gap_between(model: Any, prefix: torch.Tensor, tokens: list[int]) -> float:
    """Return how far the worse of two tokens lies behind the best one.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        prefix (`torch.Tensor` of shape `(1, n)`, int64): the text before them.
        tokens (`list[int]`): the two.

    Returns:
        `float`: a difference of processed logits, not negative; infinite for a token that is forbidden there.
    """
    settings = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(prefix, attention_mask=torch.ones_like(prefix), **settings)
    scores = output.scores[0][0].float()
    return float(scores.max() - scores[tokens].min())


@torch.no_grad()
def rounding_at(model: Any, prefix: torch.Tensor) -> float:
    """Return what rounding can make of logits behind a text.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        prefix (`torch.Tensor` of shape `(1, n)`, int64): the text.

    Returns:
        `float`: `MARGIN` times the largest difference between logits of the same text read in passes of other widths, or
            times one step of the data type at the largest logit, if that is more.
    """
    length = prefix.shape[1]
    ways = [_last_logits(model, prefix, width) for width in (length, *(width for width in WIDTHS if width < length))]
    largest = float(ways[0].abs().max())
    step = torch.finfo(model.dtype).eps * 2.0 ** math.floor(math.log2(max(largest, torch.finfo(model.dtype).tiny)))
    return MARGIN * max(step, *(float((way - ways[0]).abs().max()) for way in ways))


def _last_logits(model: Any, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Return the logits `(V,)`, float32, behind a text whose last `width` tokens are read in one pass."""
    first = ids.shape[1] - width
    kwargs = fresh_kwargs(model, ids[:, : first or None])
    target = chain_target_class(model)(model, model.generation_config, kwargs, None)
    if first == 0:
        return target.prefill(Text.of_prompt(ids))[0, -1].float()
    target.prefill(Text.of_prompt(ids[:, :first]))
    target.commit([[0]], 0)
    draft = Draft(ids[:, first + 1 :], None, has_prefix_law=True)
    return target.verify(Text.of_prompt(ids[:, : first + 1]), draft)[0, -1].float()

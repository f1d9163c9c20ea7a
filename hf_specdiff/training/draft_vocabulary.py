"""Which of the target's tokens are drafted: the commonest of the training text, so that the head has fewer rows to read.

Letters: N windows, G drafted tokens, V vocabulary. Knows tokens, and which of a drafter's weights belong to them.
"""

import sys
from collections.abc import Iterable

import torch
from torch import nn

from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.losses import IGNORED
from hf_specdiff.training.losses import OUTSIDE
from hf_specdiff.training.processes import processes


def drafted_tokens(
    sequences: Sequences, count: int, ends: Iterable[int], special_ids: Iterable[int], mask_token_id: int
) -> torch.Tensor:
    """Choose the tokens that stand most often in the answers, and say how much of the text they are.

    Args:
        sequences (`Sequences`): the training text.
        count (`int`): tokens to take; if fewer different ones are written, all of them.
        ends (`Iterable[int]`): tokens that end the target's text; they are taken however rare.
        special_ids (`Iterable[int]`): the tokenizer's special tokens; those that are written are taken however rare.
        mask_token_id (`int`): never taken.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64: different ids in ascending order, n at most `count`.

    Raises:
        ValueError: if `count` has no room for more than the tokens that are always taken.
    """
    answers = sequences.tokens[sequences.is_answer].long()
    always = {*ends, *(set(special_ids) & set(answers.unique().tolist()))} - {mask_token_id}
    if count <= len(always):
        raise ValueError(
            f"`draft_vocab_size` must be more than the {len(always)} tokens that end the target's text or are special in it, "
            f"got {count}. Take some thousands."
        )
    counts = torch.bincount(answers, minlength=max([*always, mask_token_id]) + 1)
    counts[mask_token_id] = 0
    counts[sorted(always)] = counts.max() + 1
    # Of equally common tokens the one with the lower id, on every machine.
    chosen = counts.sort(descending=True, stable=True).indices[: min(count, int((counts > 0).sum()))]
    token_ids = chosen.sort().values
    if processes().is_main_process:
        note = "" if len(token_ids) == count else f", fewer than the {count:,} asked for: no others are written"
        share = float(torch.isin(answers, token_ids).double().mean())
        print(f"Drafted are {len(token_ids):,} tokens{note}; they are {share:.2%} of the text.", file=sys.stderr, flush=True)
    return token_ids


def labels_among(labels: torch.Tensor, token_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return labels as places in a reduced vocabulary.

    A token that is not drafted is never accepted, so no round of the window goes beyond it: its own position has the label -1,
    which counts where laws are compared and nowhere else, and the positions behind it have none.

    Args:
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens, -100 where there is none.
        token_ids (`torch.Tensor` of shape `(n,)`, int64): the drafted tokens.
        vocab_size (`int`): V.

    Returns:
        `torch.Tensor` of shape `(N, G)`, int64: from 0 to n - 1, -1 or -100.
    """
    places = torch.full((vocab_size,), OUTSIDE, device=labels.device)
    places[token_ids] = torch.arange(len(token_ids), device=labels.device)
    has_label = labels != IGNORED
    reduced = torch.where(has_label, places[labels.clamp(min=0)], IGNORED)
    is_outside = reduced == OUTSIDE
    is_behind = is_outside.cumsum(1) - is_outside.long() > 0
    return reduced.masked_fill(is_behind, IGNORED)


def restrict(drafter: SpecDiffDrafter, token_ids: torch.Tensor) -> SpecDiffDrafter:
    """Let a drafter of the whole vocabulary write some tokens only; what it knows of the others is dropped.

    Args:
        drafter (`SpecDiffDrafter`): feature-conditioned; changed in place.
        token_ids (`torch.Tensor` of shape `(n,)`, int64): different ids of its vocabulary.

    Returns:
        `SpecDiffDrafter`: the same.
    """
    heads = [drafter.lm_head] if drafter.config.has_own_head else []
    heads += [drafter.markov_head.markov_w2] if drafter.config.markov_rank else []
    for head in heads:
        head.weight = nn.Parameter(head.weight.detach()[token_ids].clone())
        head.out_features = len(token_ids)
    drafter.config.draft_vocab_size = len(token_ids)
    drafter.register_buffer("d2t", token_ids - torch.arange(len(token_ids)))
    return drafter

"""Heads that know the token before, as they are trained: put on a trunk, taught on the target's tokens, with it or alone.

Letters: N windows, G drafted tokens, D hidden size, V vocabulary (the drafted tokens, where they are not all), R rank.
"""

import torch

from hf_specdiff.core.heads import MarkovHead
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter

# From a head's name to `SpecDiffConfig.markov_head_type`.
HEADS = {"markov": "vanilla", "gated": "gated"}
PREFIX = "markov_head."


def add_head(drafter: SpecDiffDrafter, kind: str, rank: int, seed: int) -> SpecDiffDrafter:
    """Give a drafter a fresh head, which changes nothing until it is trained; one that has this head already keeps it.

    Args:
        drafter (`SpecDiffDrafter`): feature-conditioned; changed in place.
        kind (`str`): of `HEADS`.
        rank (`int`): R.
        seed (`int`): of the head's weights.

    Returns:
        `SpecDiffDrafter`: the same.

    Raises:
        ValueError: if it has another head.
    """
    config = drafter.config
    if config.markov_rank or config.selector_rank:
        own = "a selector" if config.selector_rank else f"{config.markov_head_type!r} of rank {config.markov_rank}"
        if (config.markov_head_type, config.markov_rank) != (HEADS[kind], rank):
            raise ValueError(
                f"`head` must be the one that the drafter has, got {HEADS[kind]!r} of rank {rank} for a drafter with {own}. "
                "Leave it out to keep that."
            )
        return drafter
    size, num_tokens = config.hidden_size, config.draft_vocab_size or config.vocab_size
    # Tokens that are not drafted are seldom written: they need no rows of their own.
    config.markov_reads_drafted = config.draft_vocab_size is not None
    num_before = num_tokens + 1 if config.markov_reads_drafted else config.vocab_size
    # What was drawn before, weights or windows, stays what it is without a head.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MarkovHead(num_before, num_tokens, rank, size, HEADS[kind])
        # As large as this, since a step of Adam moves a token's bias by the learning rate times a row's length: entries of
        # rank^-0.5 had brought less than half of the gain after 200 steps on the bundled pair.
        torch.nn.init.normal_(head.markov_w1.weight)
    torch.nn.init.zeros_(head.markov_w2.weight)
    drafter.markov_head = head.to(device=drafter.device, dtype=drafter.dtype)
    config.markov_rank, config.markov_head_type = rank, HEADS[kind]
    return drafter


def train_head_alone(drafter: SpecDiffDrafter) -> None:
    """Hold all weights but the head's.

    Args:
        drafter (`SpecDiffDrafter`): changed in place.

    Raises:
        ValueError: if it has no head.
    """
    if not drafter.config.markov_rank:
        raise ValueError(
            "`trained` must be 'all' for a drafter whose logits do not hang on the token before, got 'head'. Give it a head "
            "(--head), or train the whole drafter."
        )
    for name, weight in drafter.named_parameters():
        weight.requires_grad_(name.startswith(PREFIX))


def given_tokens_before(
    drafter: SpecDiffDrafter, logits: torch.Tensor, states: torch.Tensor, previous: torch.Tensor
) -> torch.Tensor:
    """Return the logits of all slots of many windows at once, each given the token before it: what decoding does slot by slot.

    Args:
        drafter (`SpecDiffDrafter`): with or without a head.
        logits (`torch.Tensor` of shape `(N, G, V)`): of the slots by themselves.
        states (`torch.Tensor` of shape `(N, G, D)`): at the slots.
        previous (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens before those that the slots predict.

    Returns:
        `torch.Tensor` of shape `(N, G, V)`.
    """
    if not drafter.config.markov_rank:
        return logits
    previous = drafter.rows_before(previous)
    if drafter.config.markov_head_type != "rnn":
        return logits + drafter.markov_head(states, previous, None)[0]
    biases, memory = [], None
    for state, token in zip(states.unbind(1), previous.unbind(1), strict=True):
        bias, memory = drafter.markov_head(state, token, memory)
        biases.append(bias)
    return logits + torch.stack(biases, dim=1)

"""Which masked positions of the window are revealed at which denoising step.

Letters: B batch, G drafted tokens, T denoising steps. Knows no network and draws nothing.
"""

import torch

REVEAL_ORDERS = ("confidence", "left_to_right")


def reveal_counts(gamma: int, num_denoising_steps: int) -> list[int]:
    """Split a window over the steps as evenly as possible, earlier steps first.

    Args:
        gamma (`int`): G, positions to reveal.
        num_denoising_steps (`int`): T; a window shorter than T takes G steps.

    Returns:
        `list[int]`: positions revealed at each step, all positive, summing to G.
    """
    num_steps = min(gamma, num_denoising_steps)
    return [(gamma + step) // num_steps for step in range(num_steps)][::-1]


def reveal_left_to_right(revealed: torch.Tensor, count: int) -> torch.Tensor:
    """Choose the next `count` hidden positions from the left.

    Args:
        revealed (`torch.Tensor` of shape `(B, G)`, bool): positions fixed so far.
        count (`int`): positions to choose in each row, at most the hidden ones.

    Returns:
        `torch.Tensor` of shape `(B, G)`, bool: the chosen positions, none of them revealed before.
    """
    rank = (~revealed).cumsum(dim=1)
    return ~revealed & (rank <= count)


def reveal_by_confidence(confidence: torch.Tensor, revealed: torch.Tensor, count: int) -> torch.Tensor:
    """Choose the `count` hidden positions that the drafter is surest of.

    Args:
        confidence (`torch.Tensor` of shape `(B, G)`, float32): probability of the token proposed at each position.
        revealed (`torch.Tensor` of shape `(B, G)`, bool): positions fixed so far.
        count (`int`): positions to choose in each row, at most the hidden ones.

    Returns:
        `torch.Tensor` of shape `(B, G)`, bool: the chosen positions, none of them revealed before.

    Source: arXiv:2408.05636 drafts with a masked diffusion model; the order by confidence is MaskGIT's, arXiv:2202.04200.
    """
    best = confidence.masked_fill(revealed, -1.0).topk(count, dim=1).indices
    return torch.zeros_like(revealed).scatter(1, best, True)

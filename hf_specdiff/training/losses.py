"""Training objectives: pure functions of the drafter's log-probabilities, the target's tokens and a mask.

Letters: N windows, G drafted tokens, V vocabulary. Knows no model. Alignment objectives (streak, chain, first-error focal,
D-PACE, total variation, forward KL) belong here, functions of the same arguments beside the one there is.
"""

import torch

IGNORED = -100


def position_weights(gamma: int, decay: float, device: torch.device | None = None) -> torch.Tensor:
    """Return w_k = exp(-(k - 1) / decay), k = 1..G: how much an early position matters more than a late one.

    Args:
        gamma (`int`): G.
        decay (`float`): positions after which the weight has fallen by e; `inf` weighs all alike.
        device (`torch.device`, *optional*): of the result.

    Returns:
        `torch.Tensor` of shape `(G,)`, float32.

    Source: arXiv:2602.06036, section 4 (decay 7 for blocks of 16).
    """
    return torch.exp(-torch.arange(gamma, dtype=torch.float32, device=device) / decay)


def decayed_cross_entropy(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return sum_k w_k CE_k / sum_k w_k over all positions that have a label.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens; -100 past the text's end.
        decay (`float`): see `position_weights`.

    Returns:
        `torch.Tensor`: a scalar, in nats; 0 if no position has a label.
    """
    has_label = labels != IGNORED
    picked = log_probs.gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
    weights = position_weights(labels.shape[1], decay, log_probs.device) * has_label
    return -(weights * picked).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

"""Training objectives: pure functions of the drafter's log-probabilities and of the target's tokens or law.

Letters: N windows, G drafted tokens, V vocabulary; q_j is the probability that the drafter gave the target's token at position
j. Knows no model. A position past the text's end has the label -100 and takes part in nothing. The label -1 says that the
drafter may not write the target's token there: where laws are compared the position counts, elsewhere it does not.

Most objectives read the target's tokens alone. Those in `DISTILLATION` read its law, which costs a pass of the target's head
and, for token-conditioned drafters, of the target.
"""

from collections.abc import Callable
from collections.abc import Mapping
from functools import partial

import torch

IGNORED = -100
OUTSIDE = -1


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


def weighted_ce(
    log_probs: torch.Tensor, labels: torch.Tensor, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return -sum_j w_j log q_j / sum_j w_j over all positions of all windows: what the cross-entropies differ in is w.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        weigh (`Callable`): from log q_j, held fixed and 0 where there is no label, and from where there is one, both `(N, G)`,
            to w, 0 where there is no label.

    Returns:
        `torch.Tensor`: a scalar, in nats; 0 if no position has a label.
    """
    picked, has_label = _picked(log_probs, labels)
    return -_mean(picked, weigh(picked.detach(), has_label).to(picked.dtype))


def cross_entropy(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return -mean_j log q_j over all positions that have a label.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): takes no part.

    Returns:
        `torch.Tensor`: a scalar, in nats; 0 if no position has a label.
    """
    return weighted_ce(log_probs, labels, lambda picked, has_label: has_label)


def decayed_cross_entropy(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return -sum_j w_j log q_j / sum_j w_j over all positions that have a label, w as in `position_weights`.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): see `position_weights`.

    Returns:
        `torch.Tensor`: a scalar, in nats; 0 if no position has a label.

    Source: arXiv:2602.06036, section 4.
    """
    weights = position_weights(labels.shape[1], decay, log_probs.device)
    return weighted_ce(log_probs, labels, lambda picked, has_label: weights * has_label)


def streak(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return -mean over windows of sum_m prod_{j<=m} q_j: minus the expected accepted length of a sampled draft.

    Its gradient at a late position is the product of all earlier probabilities, so it vanishes for an untrained drafter: use it
    beside a cross-entropy, not alone.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): takes no part.

    Returns:
        `torch.Tensor`: a scalar, in tokens.

    Source: SpecDiff-2, arXiv:2511.00606, Eq. 6; the same sum beside a cross-entropy is the chain term of arXiv:2606.11552.
    """
    picked, has_label = _picked(log_probs, labels)
    return -(picked.cumsum(1).exp() * has_label).sum(1).mean()


def chain(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return -mean_m prod_{j<=m} q_j over all positions that have a label: the streak by the position, beside another term.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): takes no part.

    Returns:
        `torch.Tensor`: a scalar from -1 to 0.

    Source: arXiv:2606.11552, the chain loss; how it is normalised there is not told, so weights are not comparable.
    """
    picked, has_label = _picked(log_probs, labels)
    return -_mean(picked.cumsum(1).exp(), has_label.to(picked.dtype))


def total_variation(log_probs: torch.Tensor, labels: torch.Tensor, target_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the mean over positions with a label of 1/2 sum_x |p(x) - q(x)|, which is sum_x max(q(x) - p(x), 0).

    That is the probability that the ratio test rejects a token drawn from q: what to lower for sampling. In the second form the
    sum needs no token that q never draws, and is right for a reduced vocabulary too.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens; tells which positions count.
        target_log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the target's, given the text before each position; of
            the tokens that are drafted, in its law over all.

    Returns:
        `torch.Tensor`: a scalar from 0 to 1.

    Source: arXiv:2211.17192, section 3.4 (the acceptance rate); as an objective arXiv:2602.23881.
    """
    distance = (log_probs.exp() - target_log_probs.exp()).clamp(min=0).sum(-1)
    return _mean(distance, (labels != IGNORED).to(distance.dtype))


def forward_kl(log_probs: torch.Tensor, labels: torch.Tensor, target_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the mean over positions with a label of sum_x p(x) (log p(x) - log q(x)).

    The sum goes over the drafted tokens. Over a reduced vocabulary it lacks the others, which no drafter of these tokens can
    bring nearer.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens; tells which positions count.
        target_log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the target's, given the text before each position.

    Returns:
        `torch.Tensor`: a scalar, in nats.

    Source: knowledge distillation; for drafters arXiv:2310.08461.
    """
    divergence = _divergence(log_probs, target_log_probs)
    return _mean(divergence, (labels != IGNORED).to(divergence.dtype))


def dpace_kl(
    log_probs: torch.Tensor, labels: torch.Tensor, target_log_probs: torch.Tensor, smoothing: float = 0.5
) -> torch.Tensor:
    """Return the divergence of `forward_kl`, each position weighted as in `dpace`.

    One text shows one token at each position, the law shows what might stand there as well: with little text to learn from
    that is what keeps a drafter from learning it by heart.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens, from which the weights come.
        target_log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the target's, given the text before each position.
        smoothing (`float`): see `dpace`.

    Returns:
        `torch.Tensor`: a scalar, in nats.

    Source: the weights of arXiv:2605.18810 on the divergence of arXiv:2310.08461.
    """
    picked, has_label = _picked(log_probs, labels)
    return _mean(_divergence(log_probs, target_log_probs), _dpace_weights(picked.detach(), has_label, smoothing))


def log_streak(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return -sum_j s_j log q_j / sum_j s_j with s_j = prod_{i<j} q_i held fixed: each position as often as it is reached.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): takes no part.

    Returns:
        `torch.Tensor`: a scalar, in nats.

    Source: the surrogate in the code published with arXiv:2511.00606.
    """
    return weighted_ce(log_probs, labels, lambda picked, has_label: (picked.cumsum(1) - picked).exp() * has_label)


def first_error_focal(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0) -> torch.Tensor:
    """Return the mean over windows of -w_j log q_j at the first position j whose most probable token is wrong.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): of w, see `position_weights`.

    Returns:
        `torch.Tensor`: a scalar, in nats; windows without an error count as 0.

    Source: arXiv:2606.11552.
    """
    picked, has_label = _picked(log_probs, labels)
    wrong = (log_probs.argmax(-1) != labels) & has_label
    first = wrong & (wrong.cumsum(1) == 1)
    return -(first * position_weights(labels.shape[1], decay, log_probs.device) * picked).sum(1).mean()


def dpace(log_probs: torch.Tensor, labels: torch.Tensor, decay: float = 7.0, smoothing: float = 0.5) -> torch.Tensor:
    """Return -mean over windows of sum_j w_j log q_j / sum_j w_j with w_j = sum_{m>=j} prod_{i<=m} a_i held fixed.

    a_i = (1 - smoothing) q_i + smoothing; without smoothing w_j is the streak's derivative by log q_j. So a window's weight
    lies where its accepted length is decided: early in hard text, everywhere in easy text. Each window is scaled to weigh the
    same, or easy text, whose weights sum to much more, would drown the hard.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        decay (`float`): takes no part.
        smoothing (`float`): from 0 (the streak's own weights) to 1 (linear decay).

    Returns:
        `torch.Tensor`: a scalar, in nats.

    Source: D-PACE, arXiv:2605.18810.
    """
    return weighted_ce(log_probs, labels, partial(_dpace_weights, smoothing=smoothing))


def _dpace_weights(picked: torch.Tensor, has_label: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return w_j `(N, G)` of `dpace`, from log q_j."""
    confidence = ((1 - smoothing) * picked.exp() + smoothing) * has_label
    weights = confidence.cumprod(1).flip(1).cumsum(1).flip(1)
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


OBJECTIVES = {
    "ce": cross_entropy,
    "decayed_ce": decayed_cross_entropy,
    "streak": streak,
    "chain": chain,
    "log_streak": log_streak,
    "focal": first_error_focal,
    "dpace": dpace,
}
DISTILLATION = {"tv": total_variation, "kl": forward_kl, "dpace_kl": dpace_kl}
LOSSES = (*OBJECTIVES, *DISTILLATION)


def combined_loss(
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    weights: Mapping[str, float],
    decay: float = 7.0,
    target_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of several objectives.

    Args:
        log_probs (`torch.Tensor` of shape `(N, G, V)`, float32): the drafter's, in nats.
        labels (`torch.Tensor` of shape `(N, G)`, int64): the target's tokens.
        weights (`Mapping[str, float]`): a weight for each of some of the names in `LOSSES`.
        decay (`float`): see `position_weights`.
        target_log_probs (`torch.Tensor` of shape `(N, G, V)`, float32, *optional*): for the names in `DISTILLATION`.

    Returns:
        `torch.Tensor`: a scalar.

    Raises:
        ValueError: if an objective asks for the target's law and there is none.
    """
    terms = []
    for name, weight in weights.items():
        if name in OBJECTIVES:
            terms.append(weight * OBJECTIVES[name](log_probs, labels, decay))
        elif target_log_probs is None:
            raise ValueError(f"`target_log_probs` must be given for the objective {name!r}, got None.")
        else:
            terms.append(weight * DISTILLATION[name](log_probs, labels, target_log_probs))
    return torch.stack(terms).sum()


def next_token_cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log p(next token) over sequences padded on the right.

    Args:
        logits (`torch.Tensor` of shape `(N, S, V)`): at every token.
        input_ids (`torch.Tensor` of shape `(N, S)`, int64): the sequences.
        lengths (`torch.Tensor` of shape `(N,)`, int64): tokens of each without padding.

    Returns:
        `torch.Tensor`: a scalar, in nats.
    """
    is_text = torch.arange(1, input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    labels = input_ids[:, 1:].masked_fill(~is_text, IGNORED)
    return cross_entropy(torch.log_softmax(logits[:, :-1].float(), dim=-1), labels)


def _picked(log_probs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q_j, 0 where there is no label, and where there is one; both `(N, G)`."""
    has_label = labels >= 0
    picked = log_probs.gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2)
    return picked.masked_fill(~has_label, 0.0), has_label


def _divergence(log_probs: torch.Tensor, target_log_probs: torch.Tensor) -> torch.Tensor:
    """Return sum_x p(x) (log p(x) - log q(x)) at each position, `(N, G)`."""
    # A token that the drafter may never write has log q = -inf, and the target's p = 0 where it may not either.
    gap = (target_log_probs - log_probs).nan_to_num(nan=0.0, neginf=0.0)
    return (target_log_probs.exp() * gap).sum(-1)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * values).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

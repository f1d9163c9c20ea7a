"""How good a drafter is while it is being trained: held-out prompts through the real loop.

The loss tells how well windows are filled; what counts is how many drafted tokens in a row are accepted by the target.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hf_specdiff.core.generate import generate


@dataclass(frozen=True, slots=True)
class Streaks:
    """How far the target followed a drafter's chains, greedily.

    Attributes:
        num_rounds (`torch.Tensor`, a scalar, float64): rounds that drafted.
        num_reaching (`torch.Tensor` of shape `(G,)`, float64): rounds that accepted at least 1, 2, ..., G drafted tokens.
        num_drafting (`torch.Tensor` of shape `(G,)`, float64): rounds that drafted at least 1, 2, ..., G tokens.
    """

    num_rounds: torch.Tensor
    num_reaching: torch.Tensor
    num_drafting: torch.Tensor

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round adds, the target's own included."""
        return float(1 + self.num_reaching.sum() / self.num_rounds.clamp(min=1))

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the rounds that drafted a position in which all up to it were accepted."""
        return (self.num_reaching / self.num_drafting.clamp(min=1)).tolist()


def decode_held_out(
    target: Any, drafter: Any, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Streaks:
    """Decode prompts with single chains, one by one; torch's generators are left as they were.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter; put into evaluation mode for the call.
        prompts (`list[list[int]]`): token ids; none of them seen in training.
        max_new_tokens (`int`): tokens to write after each.
        temperature (`float`): 0: greedy, drafts met by match; else sampling, drafts drawn and met by the ratio test.
        seed (`int`): of sampling.

    Returns:
        `Streaks`: sums over all prompts.
    """
    gamma = drafter.config.max_gamma
    steps = torch.arange(1, gamma + 1)
    num_rounds = torch.zeros((), dtype=torch.float64)
    num_reaching, num_drafting = torch.zeros(2, gamma, dtype=torch.float64)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    settings |= {"draft_shape": "chain", "gamma": gamma}  # whole windows, whatever size would pay on this machine
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "acceptance": "ratio"}
    else:
        settings |= {"do_sample": False}
    was_training = drafter.training
    drafter.eval()
    devices = [target.device] if target.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for ids in prompts:
                inputs = torch.tensor([ids], device=target.device)
                stats = generate(target, inputs, assistant_model=drafter, **settings).speculation
                for (accepted,), (drafted,) in zip(stats.num_accepted, stats.num_drafted, strict=True):
                    num_rounds += drafted > 0
                    num_reaching += accepted >= steps
                    num_drafting += drafted >= steps
    finally:
        drafter.train(was_training)
    return Streaks(num_rounds, num_reaching, num_drafting)


def calibration_error(confidence: torch.Tensor, is_right: torch.Tensor, num_bins: int = 10) -> float:
    """Return how far the drafter's confidence is from how often it is right: mean |confidence - accuracy| over bins.

    Args:
        confidence (`torch.Tensor` of shape `(n,)`, float): probability of the most probable token.
        is_right (`torch.Tensor` of shape `(n,)`, bool): whether the target wrote it.
        num_bins (`int`): bins of equal width from 0 to 1, each weighted by what it holds.

    Returns:
        `float`: from 0 (calibrated) to 1.

    Source: expected calibration error, arXiv:1706.04599.
    """
    if not len(confidence):
        return 0.0
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    ones = torch.ones_like(confidence)
    zeros = torch.zeros(num_bins, dtype=confidence.dtype, device=confidence.device)
    gaps = zeros.index_add(0, bins, confidence - is_right.to(confidence.dtype)).abs()
    return float(gaps.sum() / ones.sum())

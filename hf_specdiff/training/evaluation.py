"""How good a drafter is while it is being trained: held-out prompts through the real loop.

The loss tells how well windows are filled; what counts is how many drafted tokens in a row are accepted by the target.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from hf_specdiff.core.generate import generate
from hf_specdiff.core.stats import acceptance_shares
from hf_specdiff.training.data import Sequences


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a run is judged by.

    Attributes:
        prompts (`list[list[int]]`): token ids, to be decoded with the real loop.
        sequences (`Sequences`): the same prompts with the target's continuations, for loss and calibration.
    """

    prompts: list[list[int]]
    sequences: Sequences

    @classmethod
    def of(cls, sequences: Sequences, max_length: int) -> "HeldOut":
        """Take the prompts from sequences that were kept out of training, each once."""
        rows = sequences.usable(max_length).nonzero()[:, 0].tolist()
        prompts = {sequences.groups[row].item(): sequences.prompt(row, max_length) for row in rows}
        return cls(list(prompts.values()), sequences)


@dataclass(frozen=True, slots=True)
class Streaks:
    """How far the target followed a drafter's chains, in the rounds that drafted.

    Attributes:
        num_drafted (`list[int]`): drafted tokens of each round, at least 1.
        num_accepted (`list[int]`): how many of them the target accepted.
        max_gamma (`int`): the most tokens that the drafter drafts.
    """

    num_drafted: list[int]
    num_accepted: list[int]
    max_gamma: int

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round adds, the target's own included."""
        return 1 + sum(self.num_accepted) / max(len(self.num_accepted), 1)

    @property
    def acceptance_per_position(self) -> list[float]:
        """For each of the `max_gamma` positions, the share of the rounds drafting it in which all up to it were accepted."""
        return acceptance_shares(self.num_drafted, self.num_accepted, self.max_gamma)


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
        `Streaks`: the rounds of all prompts.
    """
    gamma = drafter.config.max_gamma
    rounds: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    # Whole windows, whatever size would pay on this machine, and nothing that the drafter has not drafted.
    settings |= {"draft_shape": "chain", "gamma": gamma, "prompt_lookup_num_tokens": 0}
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
                pairs = zip(chain(*stats.num_drafted), chain(*stats.num_accepted), strict=True)
                rounds += [(drafted, accepted) for drafted, accepted in pairs if drafted > 0]
    finally:
        drafter.train(was_training)
    return Streaks([drafted for drafted, _ in rounds], [accepted for _, accepted in rounds], gamma)


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

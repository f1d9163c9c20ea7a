"""From a benchmark's notes to its figures. Measures nothing.

Every ratio is that of sums over the same prompts, and its interval comes from drawing prompts anew with replacement (paired
bootstrap): what differs between prompts but hits both methods alike does not widen it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import DETAIL
from hf_specdiff.benchmarks.runner import REFUSAL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import Call
from hf_specdiff.benchmarks.runner import Detail

NUM_RESAMPLES = 2000
# The interval holds the ratio in 95 of 100 benchmarks.
TAILS = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of speeds with its 95 % interval."""

    value: float
    low: float
    high: float


def speed_ratio(calls: list[Call], others: list[Call]) -> Interval:
    """Return how many times as fast one method writes as another one.

    Args:
        calls (`list[Call]`): of the one.
        others (`list[Call]`): of the other, on the same batches in the same order.

    Returns:
        `Interval`: tokens per second over tokens per second; the interval is the value itself if there is one batch only.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    table = torch.tensor(
        [[call.num_tokens, call.seconds, other.num_tokens, other.seconds] for call, other in zip(calls, others, strict=True)],
        dtype=torch.float64,
    )

    def ratio(sums: torch.Tensor) -> torch.Tensor:
        tokens, seconds, other_tokens, other_seconds = sums.unbind(-1)
        return (tokens / seconds) / (other_tokens / other_seconds)

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(table), (NUM_RESAMPLES, len(table)), generator=generator)
    low, high = torch.quantile(ratio(table[drawn].sum(dim=1)), torch.tensor(TAILS, dtype=torch.float64)).tolist()
    return Interval(float(ratio(table.sum(dim=0))), low, high)


def rows_of(block: Block, models: Models, journal: Journal) -> list[dict[str, Any]]:
    """Return the figures of a block's methods, for JSON.

    Args:
        block (`Block`): what was compared.
        models (`Models`): who decoded.
        journal (`Journal`): with the notes of all its batches.

    Returns:
        `list[dict]`: a row for each method; of one that could not run the reason alone.
    """
    calls = {method.name: _notes(journal, CALL, Call, block, method) for method in block.methods}
    plain = calls[PLAIN]
    fastest = max(
        (method.name for method in block.methods if method.is_ours and calls[method.name]), default=None, key=_speed(calls)
    )
    rows = []
    for method in block.methods:
        row: dict[str, Any] = {
            "task": block.task,
            "method": method.name,
            "loop": "hf_specdiff" if method.is_ours else "transformers",
            "temperature": block.temperature,
            "batch_size": block.batch_size,
            "arguments": method.arguments,
        }
        if own := calls[method.name]:
            details = _notes(journal, DETAIL, Detail, block, method)
            plain_details = _notes(journal, DETAIL, Detail, block, block.methods[0])
            row |= _speeds(own, plain, None if fastest is None else calls[fastest])
            row |= _rounds(own)
            row["identical"] = None if block.temperature else row["num_identical"] == row["num_prompts"]
            row |= _times(details, plain_details, window_of(method, models), row["ratio_to_plain"])
        else:
            (refusal,) = journal.select(kind=REFUSAL, block=block.name, method=method.name)
            row["refusal"] = refusal["reason"]
        rows.append(row)
    return rows


def window_of(method: Method, models: Models) -> int | None:
    """Return how many tokens a round of our loop may add at most; `None` for other loops."""
    return models.drafters[str(method.assistant)].config.block_size if method.is_ours else None


def _notes(journal: Journal, kind: str, note: type, block: Block, method: Method) -> list[Any]:
    """Return the notes of one method, in the order of the batches."""
    records = journal.select(kind=kind, block=block.name, method=method.name)
    return [note(**{name: value for name, value in record.items() if name != "kind"}) for record in records]


def _speed(calls: dict[str, list[Call]]) -> Any:
    """Return the key that finds the fastest method."""
    return lambda name: sum(call.num_tokens for call in calls[name]) / sum(call.seconds for call in calls[name])


def _speeds(calls: list[Call], plain: list[Call], fastest: list[Call] | None) -> dict[str, Any]:
    """Return speed, its ratio to plain decoding, and how much faster the fastest of our methods is."""
    ratio = speed_ratio(calls, plain)
    figures = {
        "tokens_per_second": sum(call.num_tokens for call in calls) / sum(call.seconds for call in calls),
        "ratio_to_plain": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }
    if fastest is not None:
        lead = speed_ratio(fastest, calls)
        figures |= {"best_to_this": lead.value, "best_low": lead.low, "best_high": lead.high}
    return figures


def _rounds(calls: list[Call]) -> dict[str, Any]:
    """Return what rounds brought."""
    rounds = [size for call in calls for size in call.rounds]
    drafted = [size for call in calls for size in call.drafted]
    depths = [depth for call in calls for depth in call.depths]
    return {
        "tokens_per_round": sum(rounds) / len(rounds) if rounds else 1.0,
        "drafted_per_round": sum(drafted) / len(drafted) if drafted else None,
        "histogram": [rounds.count(size) for size in range(max(rounds, default=0) + 1)],
        "acceptance_per_position": _acceptance(rounds, depths),
        "num_identical": sum(call.num_identical for call in calls),
        "num_prompts": sum(call.num_prompts for call in calls),
        "num_tokens": sum(call.num_tokens for call in calls),
        "shape_and_rule": calls[0].shape_and_rule or None,
    }


def _acceptance(rounds: list[int], depths: list[int]) -> list[float]:
    """Return for each position the share of the drafts reaching so far in which it was accepted."""
    shares = []
    for position in range(max(depths, default=0)):
        reached = [size - 1 > position for size, depth in zip(rounds, depths, strict=True) if depth > position]
        shares.append(sum(reached) / len(reached))
    return shares


def _times(details: list[Detail], plain: list[Detail], window: int | None, ratio: float) -> dict[str, Any]:
    """Return where the time goes, and how fast it could be on this machine.

    The limit is what is reached if drafts cost nothing and all else but the target's passes neither; the perfect ratio is that
    of drafts which are accepted whole, at the same cost of a pass.
    """
    if not details:
        return {}
    whole, num_rounds = sum(d.seconds for d in details), max(1, sum(d.num_rounds for d in details))
    in_target = sum(d.prefill_seconds + d.target_seconds for d in details)
    firsts = [d.first_token_seconds for d in details if d.first_token_seconds is not None]
    peaks = [d.peak_bytes for d in details if d.peak_bytes is not None]
    figures: dict[str, Any] = {
        "target_seconds": sum(d.target_seconds for d in details) / num_rounds,
        "drafter_seconds": sum(d.drafter_seconds for d in details) / num_rounds,
        "rest_seconds": sum(d.rest_seconds for d in details) / num_rounds,
        "first_token_seconds": sum(firsts) / len(firsts) if firsts else None,
        "peak_bytes": max(peaks) if peaks else None,
        "share_of_limit": in_target / whole,
        "limit_ratio": ratio * whole / in_target,
    }
    if window is not None and all(d.num_rounds for d in details):
        perfect = sum(
            d.prefill_seconds + math.ceil((d.num_tokens - 1) / window) * d.target_seconds / d.num_rounds for d in details
        )
        # Several rows of a batch are written at a time, so only one sequence tells how many rounds it needs.
        is_single = all(d.first_token_seconds is not None for d in details)
        figures["perfect_ratio"] = sum(d.seconds for d in plain) / perfect if is_single else None
    return figures

"""From a benchmark's notes to its figures. Measures nothing.

Every ratio is that of sums over the same prompts, and its interval comes from drawing prompts anew with replacement (paired
bootstrap): what differs between prompts but hits both methods alike does not widen it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import COMPILED
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import PLAIN_COMPILED
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.runner import ALONG
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import DETAIL
from hf_specdiff.benchmarks.runner import REFUSAL
from hf_specdiff.benchmarks.runner import WARM_UP
from hf_specdiff.benchmarks.runner import Along
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import Call
from hf_specdiff.benchmarks.runner import Detail
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.stats import acceptance_shares

NUM_RESAMPLES = 2000
TAILS = (0.025, 0.975)
# Fewer batches, drawn anew, say nothing of how others would be.
FEWEST_BATCHES = 5


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of speeds with its 95 % interval over prompts; without one where there are too few."""

    value: float
    low: float | None
    high: float | None


def speed_ratio(calls: list[Call], others: list[Call]) -> Interval:
    """Return how many times as fast one method writes as another one.

    Args:
        calls (`list[Call]`): of the one.
        others (`list[Call]`): of the other, on the same batches in the same order.

    Returns:
        `Interval`: tokens per second over tokens per second.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    table = torch.tensor(
        [[call.num_tokens, call.seconds, other.num_tokens, other.seconds] for call, other in zip(calls, others, strict=True)],
        dtype=torch.float64,
    )

    def ratio(sums: torch.Tensor) -> torch.Tensor:
        tokens, seconds, other_tokens, other_seconds = sums.unbind(-1)
        return (tokens / seconds) / (other_tokens / other_seconds)

    return _bootstrap(table, ratio)


def _bootstrap(table: torch.Tensor, figure: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
    """Return a figure of the sums of a table's columns, with its interval over rows that are drawn anew."""
    value = float(figure(table.sum(dim=0)))
    if len(table) < FEWEST_BATCHES:
        return Interval(value, None, None)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(table), (NUM_RESAMPLES, len(table)), generator=generator)
    low, high = torch.quantile(figure(table[drawn].sum(dim=1)), torch.tensor(TAILS, dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def expected_of(notes: list[Along]) -> dict[str, Any]:
    """Return what drafts are expected to bring along common texts, `{}` where that was not computed.

    Args:
        notes (`list[Along]`): of one method, a text each.

    Returns:
        `dict`: tokens per round, the target's own included, with an interval over texts; drafted tokens per round.
    """
    table = torch.tensor([[len(n.expected), sum(n.expected), sum(n.drafted)] for n in notes], dtype=torch.float64)
    if not len(table) or not table[:, 0].sum():
        return {}
    found = _bootstrap(table[table[:, 0] > 0], lambda sums: 1 + sums[..., 1] / sums[..., 0])
    return {
        "expected_tokens_per_round": found.value,
        "expected_low": found.low,
        "expected_high": found.high,
        "expected_drafted": float(table[:, 2].sum() / table[:, 0].sum()),
        "num_places": int(table[:, 0].sum()),
    }


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share found in `count` cases.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z = 1.96
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def rows_of(block: Block, models: Models, journal: Journal) -> list[dict[str, Any]]:
    """Return the figures of a block's methods, for JSON.

    Args:
        block (`Block`): what was compared.
        models (`Models`): who decoded.
        journal (`Journal`): with the notes of all its batches.

    Returns:
        `list[dict]`: a row for each method; of one that could not run the reason alone.
    """
    refusals = {record["method"]: record["reason"] for record in journal.select(kind=REFUSAL, block=block.name)}
    calls = {method.name: _notes(journal, CALL, Call, block, method) for method in block.methods if method.name not in refusals}
    contenders = [method.name for method in block.methods if method.is_ours and method.is_contender and method.name in calls]
    fastest = max(contenders, default=None, key=lambda name: _speed(calls[name]))
    rows = []
    for method in block.methods:
        row: dict[str, Any] = {
            "task": block.task,
            "method": method.name,
            "loop": method.loop,
            "temperature": block.temperature,
            "batch_size": block.batch_size,
            "arguments": method.arguments,
        }
        if method.name in calls:
            own = calls[method.name]
            details = _notes(journal, DETAIL, Detail, block, method)
            row |= _speeds(own, calls[PLAIN], None if fastest is None else calls[fastest])
            row |= _rounds(own, is_plain=method.name in (PLAIN, PLAIN_COMPILED))
            row["identical"] = None if block.temperature else row["num_identical"] == row["num_prompts"]
            row |= expected_of(_notes(journal, ALONG, Along, block, method))
            row |= times_of(details, _notes(journal, DETAIL, Detail, block, block.methods[0]), window_of(method, models))
            if PLAIN_COMPILED in calls:
                row |= _beside_compiled(method, calls)
            if method.is_compiled:
                row["first_call_seconds"] = journal.select(kind=WARM_UP, block=block.name, method=method.name)[0]["seconds"]
        else:
            row["refusal"] = refusals[method.name]
        rows.append(row)
    return rows


def window_of(method: Method, models: Models) -> int | None:
    """Return how many tokens a round may add at most; `None` for other loops, and where that changes from round to round."""
    if not method.is_ours or "auto" in method.arguments.values():
        return None
    drafter, arguments = models.drafters[str(method.assistant)], method.arguments
    if is_own_drafter(drafter):
        return None  # it drafts as much as it likes
    published = [getattr(drafter.generation_config, name, None) for name in ("gamma", "tree_budget")]
    if arguments.keys().isdisjoint(("draft_shape", "gamma", "tree_budget")) and published == [None, None]:
        return None  # the default follows the machine
    gamma = arguments.get("gamma") or published[0] or drafter.config.max_gamma
    return None if "auto" in (gamma, *published) else int(gamma) + 1


def _notes(journal: Journal, kind: str, note: type, block: Block, method: Method) -> list[Any]:
    """Return the notes of one method, in the order of the batches."""
    records = journal.select(kind=kind, block=block.name, method=method.name)
    return [note(**{name: value for name, value in record.items() if name != "kind"}) for record in records]


def _speed(calls: list[Call]) -> float:
    """Return tokens per second."""
    return sum(call.num_tokens for call in calls) / sum(call.seconds for call in calls)


def _speeds(calls: list[Call], plain: list[Call], fastest: list[Call] | None) -> dict[str, Any]:
    """Return speed, its ratio to plain decoding, and how much faster the fastest of our methods is, known afterwards."""
    ratio = speed_ratio(calls, plain)
    figures = {
        "tokens_per_second": _speed(calls),
        "ratio_to_plain": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }
    if fastest is not None:
        lead = speed_ratio(fastest, calls)
        figures |= {"best_to_this": lead.value, "best_low": lead.low, "best_high": lead.high}
    return figures


def _beside_compiled(method: Method, calls: dict[str, list[Call]]) -> dict[str, Any]:
    """Return a method's speed over compiled plain decoding's, and that of a compiled one over its own without."""
    pairs = {"compiled_plain": PLAIN_COMPILED}
    if method.is_compiled:
        pairs["eager"] = method.name.removesuffix(COMPILED)
    figures: dict[str, Any] = {}
    for name, other in pairs.items():
        if other in calls:
            ratio = speed_ratio(calls[method.name], calls[other])
            figures |= {f"ratio_to_{name}": ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return figures


def _rounds(calls: list[Call], *, is_plain: bool) -> dict[str, Any]:
    """Return what rounds brought; `tokens_per_round` is `None` of loops that do not tell."""
    rounds = [size for call in calls for size in call.rounds]
    drafted = [size for call in calls for size in call.drafted]
    depths = [depth for call in calls for depth in call.depths]
    return {
        "tokens_per_round": 1.0 if is_plain else sum(rounds) / len(rounds) if rounds else None,
        "drafted_per_round": sum(drafted) / len(drafted) if drafted else None,
        "histogram": [rounds.count(size) for size in range(max(rounds, default=0) + 1)],
        "acceptance_per_position": acceptance_shares(depths, [size - 1 for size in rounds]) if depths else [],
        "num_identical": sum(call.num_identical for call in calls),
        "num_near_ties": sum(call.num_near_ties for call in calls),
        "num_prompts": sum(call.num_prompts for call in calls),
        "num_tokens": sum(call.num_tokens for call in calls),
        "num_right": None if calls[0].num_right is None else sum(call.num_right or 0 for call in calls),
        "shape_and_rule": calls[0].shape_and_rule or None,
    }


def times_of(details: list[Detail], plain: list[Detail], window: int | None) -> dict[str, Any]:
    """Return where the time goes, and how fast it could be on this machine.

    The limit is what these accepted lengths would bring if nothing but the target's passes took time; the perfect ratio is that
    of drafts which are accepted whole, at the same cost of a pass. Both are of the calls that were looked into.
    """
    if not details:
        return {}
    whole, num_rounds = sum(d.seconds for d in details), max(1, sum(d.num_rounds for d in details))
    plain_seconds = sum(d.seconds for d in plain)
    in_target = sum(d.prefill_seconds + d.target_seconds for d in details)
    firsts = [d.first_token_seconds for d in details if d.first_token_seconds is not None]
    peaks = [d.peak_bytes for d in details if d.peak_bytes is not None]
    loops = [d.loop_seconds for d in details if d.loop_seconds is not None]
    between = sum(loops) - sum(d.seconds - d.rest_seconds for d in details) if loops else None
    if between is not None and between < 0:  # an "auto" call measured again what passes cost, outside its rounds
        between = None
    figures: dict[str, Any] = {
        "target_seconds": sum(d.target_seconds for d in details) / num_rounds,
        "drafter_seconds": sum(d.drafter_seconds for d in details) / num_rounds,
        "rest_seconds": sum(d.rest_seconds for d in details) / num_rounds,
        "between_share": None if between is None else between / (sum(loops) - sum(d.prefill_seconds for d in details)),
        "first_token_seconds": sum(firsts) / len(firsts) if firsts else None,
        "peak_bytes": max(peaks) if peaks else None,
        "share_of_limit": in_target / whole,
        "limit_ratio": plain_seconds / in_target,
    }
    # Several rows of a batch are written at a time, so only one sequence tells how many rounds it needs.
    if window is not None and len(firsts) == len(details) and all(d.num_rounds for d in details):
        perfect = sum(
            d.prefill_seconds + math.ceil((d.num_tokens - 1) / window) * d.target_seconds / d.num_rounds for d in details
        )
        figures["perfect_ratio"] = plain_seconds / perfect
    return figures

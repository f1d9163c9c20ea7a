"""From notes to figures, worked out by hand."""

from dataclasses import replace

import pytest

from hf_specdiff.benchmarks.figures import share_interval
from hf_specdiff.benchmarks.figures import speed_ratio
from hf_specdiff.benchmarks.figures import times_of
from hf_specdiff.benchmarks.runner import Call
from hf_specdiff.benchmarks.runner import Detail


def call_of(seconds: float, num_tokens: int) -> Call:
    return Call("b", "m", 0, seconds, num_tokens, 1, 1, [], [], [], [])


def test_the_interval_is_that_of_paired_prompts() -> None:
    """Prompts differ tenfold in length, but one method is twice as fast on each: the interval must not be wide."""
    plain = [call_of(seconds, 100) for seconds in (1.0, 10.0, 5.0, 2.0, 4.0)]
    steady = speed_ratio([call_of(call.seconds / 2, 100) for call in plain], plain)
    assert (steady.value, steady.low, steady.high) == pytest.approx((2, 2, 2))
    shaky = speed_ratio([call_of(seconds, 100) for seconds in (1.0, 2.5, 5.0, 1.0, 2.0)], plain)
    assert shaky.low is not None
    assert shaky.high is not None
    assert 1 <= shaky.low < shaky.value < shaky.high <= 4
    assert shaky.value == pytest.approx(22 / 11.5)
    assert speed_ratio(plain[:4], plain[:4]).low is None


def test_figures_of_times_are_those_worked_out_by_hand() -> None:
    """Two calls of 10 s and 6 s: prefill 1 s each, 4 + 2 passes of 1 s, drafter 2 s and 1 s."""
    common = {"block": "b", "method": "m", "batch": 0, "prefill_seconds": 1.0, "num_tokens": 17, "peak_bytes": 5}
    one = {"seconds": 10, "target_seconds": 4, "drafter_seconds": 2, "rest_seconds": 3, "loop_seconds": 8, "num_rounds": 4}
    two = {"seconds": 6, "target_seconds": 2, "drafter_seconds": 1, "rest_seconds": 2, "loop_seconds": 5, "num_rounds": 2}
    details = [Detail(**common, **one, first_token_seconds=2), Detail(**common, **two, first_token_seconds=1)]
    found = times_of(details, [replace(detail, seconds=20) for detail in details], window=8)
    assert found["target_seconds"] == 1
    assert found["drafter_seconds"] == 0.5
    assert found["rest_seconds"] == pytest.approx(5 / 6)
    assert found["between_share"] == pytest.approx((13 - 11) / (13 - 2))  # loops of 13 s, passes of 11 s, prefill of 2 s
    measured = [replace(detail, loop_seconds=3.0) for detail in details]  # passes outside the loop: no share of it
    assert times_of(measured, details, window=8)["between_share"] is None
    assert found["first_token_seconds"] == 1.5
    assert found["share_of_limit"] == 8 / 16
    assert found["limit_ratio"] == 40 / 8
    assert found["perfect_ratio"] == 40 / (2 + 2 + 2)  # 16 tokens after the first: two rounds of eight in each call


def test_a_shares_interval_is_wilsons() -> None:
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = share_interval(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == 1

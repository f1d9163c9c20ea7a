"""What is known of costs and acceptance, and how rounds correct it: class by class, and never for ever."""

from dataclasses import replace

import pytest
import torch

from hf_specdiff.core.costs import LARGEST_FACTOR
from hf_specdiff.core.costs import NUM_CLASSES
from hf_specdiff.core.costs import Calibration
from hf_specdiff.core.costs import Pace
from hf_specdiff.core.costs import Profile


def test_costs_are_interpolated_and_extrapolated() -> None:
    profile = Profile([1, 3, 5], [1.0, 2.0, 6.0], 0.5)
    assert [profile.target_cost(n) for n in (1, 2, 3, 4, 5, 6)] == pytest.approx([1.0, 1.5, 2.0, 4.0, 6.0, 8.0])
    assert profile.round_cost(3, is_drafted=True) == pytest.approx(2.5)
    assert profile.round_cost(3, is_drafted=False) == pytest.approx(2.0)
    trees = replace(profile, node_seconds=0.1, drawn_seconds=0.2)
    assert trees.round_cost(3, is_drafted=True, num_nodes=4) == pytest.approx(2.9)
    assert trees.round_cost(3, is_drafted=True, num_nodes=4, is_drawn=True) == pytest.approx(3.7)
    assert trees.round_cost(3, is_drafted=False, num_nodes=4, is_drawn=True) == pytest.approx(2.0)
    # One token that begins a new tile does not make each of a large batch's tokens so dear.
    tiles = Profile([1, 33, 64, 65], [1.0, 2.0, 3.0, 4.0], 0.5)
    assert tiles.target_cost(97) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (([1, 1], [1.0, 2.0], 1.0), "rising `sizes`"),
        (([1, 2], [1.0], 1.0), "rising `sizes`"),
        (([1, "2"], [1.0, 2.0], 1.0), "must hold numbers"),
        (([1, 2], [1.0, 2.0], 1.0, "", [1.0] * (2 * NUM_CLASSES), True), "must hold numbers"),
        (([1, 2], [0.0, 2.0], 1.0), "positive times and factors"),
        (([1, 2], [1.0, 2.0], 1.0, "", [1.0]), "`factors`, got 1"),
        (([1, 2], [1.0, 2.0], 1.0, "", [1.0] * (2 * NUM_CLASSES), None, False, -0.1), "at least 0"),
        (([1, 2], [1.0, 2.0], 1.0, "", [1.0] * (2 * NUM_CLASSES), None, False, 0.1, "much"), "must hold numbers"),
    ],
)
def test_profiles_that_mean_nothing_are_refused(fields: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Profile(*fields)


def test_the_least_of_two_profiles_keeps_what_was_known_of_the_drafter() -> None:
    factors = [0.5] * (2 * NUM_CLASSES)
    earlier = Profile([1, 9], [2.0, 3.0], 0.4, "here", factors, 1.5, is_doubtful=True, node_seconds=0.3)
    now = Profile([1, 5, 9], [1.0, 4.0, 5.0], 0.5, "here", node_seconds=0.2, drawn_seconds=0.1)
    assert now.least(earlier) == Profile([1, 5, 9], [1.0, 2.5, 3.0], 0.4, "here", factors, 1.5, node_seconds=0.2)


def test_a_busy_machine_slows_both_kinds_of_rounds() -> None:
    """Rounds that were not seen yet are expected to be as slow as the others, so that no choice changes."""
    pace = Pace()
    for _ in range(100):
        pace.observe(2.0, is_drafted=True)
    assert pace.ratio(is_drafted=True) == pytest.approx(2.0, rel=0.1)
    assert pace.ratio(is_drafted=False) == pytest.approx(2.0, rel=0.15)
    assert not pace.is_too_quick
    for _ in range(100):
        pace.observe(1.0, is_drafted=False)
    assert pace.ratio(is_drafted=False) == pytest.approx(1.0, rel=0.1)


def test_one_slow_round_is_no_reason() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe(1.0, is_drafted=True)
    pace.observe(50.0, is_drafted=True)
    assert pace.ratio(is_drafted=True) < 1.1


@pytest.mark.parametrize("is_drafted", [True, False])
def test_rounds_that_are_quicker_than_a_pass_can_be_accuse_the_profile(is_drafted: bool) -> None:
    pace = Pace()
    assert not pace.is_too_quick
    for _ in range(6):
        pace.observe(0.5, is_drafted=is_drafted)
    assert pace.is_too_quick


NEUTRAL = [1.0] * (2 * NUM_CLASSES)


def test_factors_follow_what_was_accepted_class_by_class() -> None:
    """Sure nodes that fail half of the time, and drawn children that are accepted more often than their rank says."""
    calibration = Calibration(NEUTRAL)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sure, drawn = (float(x) < rate for x, rate in zip(torch.rand(2, generator=generator), (0.5, 0.16), strict=True))
        calibration.forget()
        calibration.learn([0.98, 0.02], [False, True], [sure, drawn])
    assert 0.5 < calibration.rate(0.98, is_drawn=False) < 0.6
    assert 0.08 < calibration.rate(0.02, is_drawn=True) < 0.16
    # What was never seen is read as it stands.
    assert calibration.rate(0.02, is_drawn=False) == pytest.approx(0.02)
    assert calibration.rate(0.98, is_drawn=True) == pytest.approx(0.98)


def test_a_round_is_one_observation_however_many_nodes_it_has() -> None:
    few, many = Calibration(NEUTRAL), Calibration(NEUTRAL)
    few.learn([0.9], [False], [False])
    many.learn([0.9] * 15, [False] * 15, [False] * 15)
    assert few.rate(0.9, is_drawn=False) == pytest.approx(many.rate(0.9, is_drawn=False), rel=0.02)


def test_what_was_learnt_is_forgotten_and_no_rate_exceeds_one() -> None:
    calibration = Calibration(NEUTRAL)
    for _ in range(30):
        calibration.learn([0.6, 0.001], [False, True], [True, True])
    assert calibration.rate(0.9, is_drawn=False) == 1
    assert calibration.rate(0.001, is_drawn=True) == pytest.approx(0.001 * LARGEST_FACTOR)
    assert calibration.rate(0.0, is_drawn=False) == 0
    for _ in range(2000):
        calibration.forget()
    assert calibration.factors == pytest.approx(NEUTRAL)

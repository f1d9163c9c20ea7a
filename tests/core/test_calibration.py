"""How drafted tokens' probabilities are read after some rounds: class by class, and never for ever."""

import pytest
import torch

from hf_specdiff.core.calibration import LARGEST_FACTOR
from hf_specdiff.core.calibration import NUM_CLASSES
from hf_specdiff.core.calibration import Calibration

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

"""Figures that follow from what a call did, worked out by hand."""

import pytest

from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.core.stats import acceptance_shares


def test_acceptance_counts_the_drafts_that_reach_a_position() -> None:
    assert acceptance_shares([3, 3, 2], [0, 2, 3]) == pytest.approx([2 / 3, 2 / 3, 0.0])
    assert acceptance_shares([], []) == []
    with pytest.raises(ValueError, match="zip"):
        acceptance_shares([3], [])


def test_acceptance_is_told_of_as_many_positions_as_are_asked_for() -> None:
    assert acceptance_shares([2, 1], [1, 1], 4) == [1.0, 0.0, 0.0, 0.0]
    assert acceptance_shares([2, 1], [1, 1], 1) == [1.0]


def test_a_call_counts_how_far_its_drafts_reached() -> None:
    """Of trees not all nodes, but the longest path."""
    stats = SpeculationStats("tree", "match", [[6, 6], [6]], [[2, 0], [1]])
    assert len(stats.acceptance_per_position) == 6
    stats.draft_depths = [[2, 2], [1]]
    assert stats.acceptance_per_position == [2 / 3, 1 / 2]

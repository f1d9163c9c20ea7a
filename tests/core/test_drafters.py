"""Which positions are revealed when."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_specdiff.core.drafters import reveal_by_confidence
from hf_specdiff.core.drafters import reveal_counts
from hf_specdiff.core.drafters import reveal_left_to_right


@given(gamma=st.integers(1, 64), steps=st.integers(1, 64))
def test_reveal_counts_split_the_window(gamma: int, steps: int) -> None:
    counts = reveal_counts(gamma, steps)
    assert sum(counts) == gamma
    assert len(counts) == min(gamma, steps)
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_left_to_right_takes_the_next_hidden_positions() -> None:
    revealed = torch.tensor([[True, True, False, False, False]])
    assert reveal_left_to_right(revealed, 2).tolist() == [[False, False, True, True, False]]


def test_confidence_takes_the_surest_hidden_positions() -> None:
    revealed = torch.tensor([[True, False, False, False], [False, False, False, True]])
    confidence = torch.tensor([[0.99, 0.2, 0.9, 0.5], [0.1, 0.6, 0.7, 0.99]])
    assert reveal_by_confidence(confidence, revealed, 2).tolist() == [[False, False, True, True], [False, True, True, False]]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_every_position_is_revealed_once(steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    revealed = torch.zeros(2, 7, dtype=torch.bool)
    for count in reveal_counts(7, steps):
        chosen = reveal_by_confidence(torch.rand(2, 7, generator=generator), revealed, count)
        assert not bool((chosen & revealed).any())
        assert chosen.sum(1).tolist() == [count, count]
        revealed |= chosen
    assert bool(revealed.all())

"""Clocks count each pass once, recordings and memory tell what was there when."""

import pytest
import torch

from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.clocks import PeakMemory
from hf_specdiff.benchmarks.clocks import Recording


class Hands:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_the_clock_counts_a_pass_inside_a_pass_once_and_knows_whose_it_was() -> None:
    hands = Hands()

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hands.seconds += 1
            return x

    outer = torch.nn.Sequential(Slow(), Slow())
    inner = outer[0]
    with PassClock([outer, inner], torch.device("cpu"), hands) as clock:
        outer(torch.zeros(1))
        hands.seconds += 5  # between the passes
        inner(torch.zeros(1))
    outer(torch.zeros(1))
    assert clock.passes_of(outer, inner) == [2, 1]
    assert (clock.passes_of(outer), clock.passes_of(inner), clock.passes_of()) == ([2], [1], [])


def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(64_000_000, dtype=torch.uint8).sum()
    if memory.num_bytes is None:
        pytest.skip("this kernel does not count")
    assert 60_000_000 < memory.num_bytes < 1_000_000_000


def test_recordings_tell_what_was_there_when() -> None:
    hands = Hands()
    recording = Recording(clock=hands)
    for piece in ([1, 2, 3], [4], [5, 6]):
        hands.seconds += 0.5
        recording.put(torch.tensor([piece]))
    assert recording.duration == 1.5
    assert [recording.tokens_at(seconds) for seconds in (0.4, 0.6, 1.0, 1.4, 1.5)] == [[], [], [4], [4], [4, 5, 6]]
    assert recording.sizes == [1, 2]

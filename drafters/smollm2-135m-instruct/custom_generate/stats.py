"""What a call did, round by round, and how long its stages took: the figures that follow from it.

Knows CPU clocks and CUDA events, of which the loop itself reads none; knows no other tensors.
"""

import time
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from itertools import chain
from typing import Any

import torch


@dataclass(slots=True)
class SpeculationStats:
    """What a call to `generate` did, round by round.

    A round's `num_accepted` is the number of tokens that it added to the text less one: the last of them counts as the bonus
    token, also where an end of the text fell inside the accepted window.

    Attributes:
        draft_shape (`str`): the shape that was used.
        acceptance (`str`): the rule that was used.
        num_drafted (`list[list[int]]`): for each round and sequence, tokens drafted.
        num_accepted (`list[list[int]]`): for each round and sequence, drafted tokens kept; a row that has ended takes no part.
        prefill_seconds (`float`): the target's pass over the prompt.
        drafter_seconds (`float`): all drafter passes.
        target_seconds (`float`): all target passes after the prefill.
        total_seconds (`float`): the whole decoding, prefill included.
        draft_depths (`list[list[int]]`): for each round and sequence, how far ahead the draft reached: the drafted tokens of a
            chain, the longest path of a tree. Empty: that of chains.
        num_copied (`list[list[int]]`): for each round and sequence, those of the accepted tokens that were copied from the
            text.
    """

    draft_shape: str
    acceptance: str
    num_drafted: list[list[int]]
    num_accepted: list[list[int]]
    prefill_seconds: float = 0.0
    drafter_seconds: float = 0.0
    target_seconds: float = 0.0
    total_seconds: float = 0.0
    draft_depths: list[list[int]] = field(default_factory=list)
    num_copied: list[list[int]] = field(default_factory=list)

    @property
    def num_rounds(self) -> int:
        """Rounds: one draft and one target pass each."""
        return len(self.num_accepted)

    @property
    def num_drafted_tokens(self) -> int:
        """Drafted tokens over all rounds and sequences."""
        return sum(map(sum, self.num_drafted))

    @property
    def num_copied_tokens(self) -> int:
        """Accepted tokens that were copied from the text, over all rounds and sequences."""
        return sum(map(sum, self.num_copied))

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round adds, the bonus included (tau, block efficiency); 0 without rounds."""
        accepted = [count for row in self.num_accepted for count in row]
        return sum(accepted) / len(accepted) + 1 if accepted else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, all of a tree's nodes counted; 0 without drafts."""
        return sum(map(sum, self.num_accepted)) / max(self.num_drafted_tokens, 1)

    @property
    def acceptance_per_position(self) -> list[float]:
        """For each window position, the share of the drafts reaching so far in which it was accepted."""
        return acceptance_shares(chain(*(self.draft_depths or self.num_drafted)), chain(*self.num_accepted))

    @property
    def other_seconds(self) -> float:
        """Time that was spent neither in the drafter nor in the target."""
        return self.total_seconds - self.prefill_seconds - self.drafter_seconds - self.target_seconds


def acceptance_shares(depths: Iterable[int], accepted: Iterable[int], num_positions: int | None = None) -> list[float]:
    """Return for each window position the share of the drafts reaching so far in which it was accepted.

    Args:
        depths (`Iterable[int]`): how far ahead each draft reached.
        accepted (`Iterable[int]`): drafted tokens of each that were kept, in the same order.
        num_positions (`int`, *optional*): positions to tell about; by default those that a draft reached.

    Returns:
        `list[float]`: from 0 to 1; 0 where no draft reached.
    """
    pairs = list(zip(depths, accepted, strict=True))
    if num_positions is None:
        num_positions = max((depth for depth, _ in pairs), default=0)
    shares = []
    for position in range(num_positions):
        reached = [kept > position for depth, kept in pairs if depth > position]
        shares.append(sum(reached) / max(len(reached), 1))
    return shares


class Stopwatch:
    """Add up the time that a method takes over many calls.

    Args:
        device (`torch.device`): where the method works. On CUDA events are recorded in the stream and read at the end, so
            that nothing waits; elsewhere the wall clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def attach(self, owner: Any, method: str) -> None:
        """Time every call of `owner.method` from now on.

        Args:
            owner (`Any`): an object made for one generation.
            method (`str`): the name of the method; it is replaced on this object only.
        """
        setattr(owner, method, self._timed(getattr(owner, method)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_cuda:
                start = time.perf_counter()
                result = function(*args, **kwargs)
                self._seconds += time.perf_counter() - start
                return result
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self._events.append((begin, end))
            return result

        return call

    def seconds(self) -> float:
        """Return the time so far, in seconds; on CUDA it waits for the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3

"""Seconds per stage, without a clock in the loop.

Knows CPU clocks and CUDA events.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


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

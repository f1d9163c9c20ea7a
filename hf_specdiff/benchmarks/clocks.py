"""What a call costs besides its wall-clock time: where the time goes, when the first token comes, how much memory it takes.

Knows modules, devices and the kernel's counters; knows no method.
"""

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Linux: what resets the kernel's mark of the largest resident size, and where it is read.
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
# Seconds since some beginning. Whoever wants the same figures on every machine hands in one that counts work.
Clock = Callable[[], float]


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class PassClock:
    """The time of each forward pass of some modules; a pass inside another one is part of it.

    On a GPU the time is taken between two events in its queue, so nothing waits.

    Args:
        modules (`list[torch.nn.Module]`): to time, inside `with`.
        device (`torch.device`): where they run.
        clock (`Callable[[], float]`): read where there is no GPU, in seconds.
    """

    def __init__(self, modules: list[torch.nn.Module], device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.modules = modules
        self.device = device
        self.clock = clock
        self._depth = 0
        self._owners: list[torch.nn.Module] = []
        self._stamps: list[Any] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "PassClock":
        for module in self.modules:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def passes_of(self, *modules: torch.nn.Module) -> list[float]:
        """Return the seconds of each pass of some of the modules, in their order."""
        if self.device.type == "cuda":
            wait(self.device)
        pairs = zip(self._owners, self._stamps[::2], self._stamps[1::2], strict=True)
        return [self._between(begin, end) for owner, begin, end in pairs if any(owner is module for module in modules)]

    def _begin(self, module: torch.nn.Module, *arguments: Any) -> None:
        if self._depth == 0:
            self._owners.append(module)
            self._stamps.append(self._now())
        self._depth += 1

    def _end(self, *arguments: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stamps.append(self._now())

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        # Of the modules' device: another one may be current.
        event.record(torch.cuda.current_stream(self.device))
        return event


class Recording:
    """A streamer that keeps each piece with the second it came at, and hands it on.

    Args:
        streamer (*optional*): another one to hand the pieces to.
        clock (`Callable[[], float]`): read when a piece comes, in seconds.
    """

    def __init__(self, streamer: Any | None = None, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.start = clock()
        self.pieces: list[tuple[float, list[int]]] = []
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        """Keep a piece; the first one is the prompt."""
        self.pieces.append((self.clock() - self.start, value.flatten().tolist()))
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Hand the end on."""
        if self.streamer is not None:
            self.streamer.end()

    def tokens_at(self, seconds: float) -> list[int]:
        """Return what had been written by then, prompt left out."""
        return [token for when, piece in self.pieces[1:] if when <= seconds for token in piece]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each piece, prompt left out."""
        return [len(piece) for _, piece in self.pieces[1:]]

    @property
    def duration(self) -> float:
        """Seconds to the last piece."""
        return self.pieces[-1][0]


class PeakMemory:
    """The most memory that was taken inside `with`, above what was taken before.

    On a GPU it is what torch allocated there; elsewhere the process's resident size, as the Linux kernel counts it.

    Args:
        device (`torch.device`): where the models are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif CLEAR_REFS.exists():
            # What the last method left free would hide what this one takes.
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
            with suppress(OSError):  # some containers forbid it
                CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
                self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        self.num_bytes = None if peak is None else max(0, peak - self._before)


def _resident(name: str) -> int | None:
    """Return a figure of the kernel's, in bytes, if it has it."""
    lines = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name)]
    return 1024 * int(lines[0].split()[1]) if lines else None

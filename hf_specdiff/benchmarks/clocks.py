"""What a call costs besides its wall-clock time: where the time goes, when the first token comes, how much memory it takes.

Knows modules, devices and the kernel's counters; knows no method.
"""

import ctypes
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Linux: what resets the kernel's mark of the largest resident size, and where it is read.
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


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
    """

    def __init__(self, modules: list[torch.nn.Module], device: torch.device) -> None:
        self.modules = modules
        self.device = device
        self._depth = 0
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

    @property
    def passes(self) -> list[float]:
        """Seconds of each pass, in their order."""
        pairs = zip(self._stamps[::2], self._stamps[1::2], strict=True)
        if self.device.type == "cuda":
            wait(self.device)
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    def _begin(self, *arguments: Any) -> None:
        if self._depth == 0:
            self._stamps.append(self._now())
        self._depth += 1

    def _end(self, *arguments: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stamps.append(self._now())

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # Of the modules' device: another one may be current.
        event.record(torch.cuda.current_stream(self.device))
        return event


class Recording:
    """A streamer that keeps each piece with the second it came at, and hands it on.

    Args:
        streamer (*optional*): another one to hand the pieces to.
    """

    def __init__(self, streamer: Any | None = None) -> None:
        self.start = time.perf_counter()
        self.pieces: list[tuple[float, list[int]]] = []
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        """Keep a piece; the first one is the prompt."""
        self.pieces.append((time.perf_counter() - self.start, value.flatten().tolist()))
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

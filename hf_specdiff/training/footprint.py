"""What a training step costs: seconds and memory, for the log and for the benchmark."""

import sys
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

# Not every system has it.
RESOURCE: Any = import_module("resource") if find_spec("resource") else None


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory that was in use at once.

    Args:
        device (`torch.device`): where the work is done.

    Returns:
        `int`, *optional*: in bytes: on CUDA what tensors took since the last reset; elsewhere what the whole process took since
            its start, and `None` where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if RESOURCE is None:
        return None
    peak: int = RESOURCE.getrusage(RESOURCE.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # there in bytes, elsewhere in KiB


class Footprint(TrainerCallback):
    """Count a trainer's steps and the seconds between their beginnings and ends.

    Evaluations, checkpoints and the reading of data lie between steps and do not count. A resumed run counts on from what its
    checkpoint's log tells of the earlier parts.

    Args:
        device (`torch.device`): of the drafter.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_steps = self._num_logged = 0
        self.seconds = self._seconds_logged = self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the memory that came before, the target's continuations' for one, and take up what earlier parts logged."""
        for entry in state.log_history:
            if "loss" in entry and "seconds_per_step" in entry:
                self.seconds += (entry["step"] - self.num_steps) * entry["seconds_per_step"]
                self.num_steps = entry["step"]
        self._num_logged, self._seconds_logged = self.num_steps, self.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._start
        self.num_steps += 1

    def since_last_log(self) -> dict[str, float]:
        """Return `seconds_per_step` over the steps since the last call, if there were any, and `peak_memory_bytes`."""
        steps, seconds = self.num_steps - self._num_logged, self.seconds - self._seconds_logged
        self._num_logged, self._seconds_logged = self.num_steps, self.seconds
        return self._figures(steps, seconds)

    def of_all_steps(self) -> dict[str, float]:
        """Return `seconds_per_step` over all steps, if there were any, and `peak_memory_bytes`."""
        return self._figures(self.num_steps, self.seconds)

    def summary(self) -> str:
        """Return `of_all_steps` as a line of text."""
        figures, parts = self.of_all_steps(), [f"{self.num_steps} steps"]
        if "seconds_per_step" in figures:
            parts.append(f"{figures['seconds_per_step']:.3f} s per step")
        if "peak_memory_bytes" in figures:
            parts.append(f"peak memory {figures['peak_memory_bytes'] / 2**30:.2f} GiB ({self.device.type})")
        return ", ".join(parts) + "."

    def _figures(self, num_steps: int, seconds: float) -> dict[str, float]:
        peak = peak_memory(self.device)
        figures = {"seconds_per_step": seconds / num_steps} if num_steps else {}
        return figures if peak is None else figures | {"peak_memory_bytes": peak}

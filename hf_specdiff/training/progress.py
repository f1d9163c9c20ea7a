"""How far a long piece of work is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments


class Speedometer:
    """Tell how much is done, how many tokens a second that makes, and how much time is left.

    Args:
        what (`str`): the work, for its line.
        total (`int`): its items.
        done (`int`): items of an earlier run; they count as done and cost nothing.
        is_shown (`bool`): false for all but one of several processes.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, is_shown: bool = True) -> None:
        self.what, self.total, self.done = what, total, done
        self.num_tokens = self.num_items = 0
        self._start = time.perf_counter()
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._bar = Progress(*columns, console=console) if is_shown and console.is_terminal else None
        self._is_logged = is_shown and self._bar is None
        self._task = None if self._bar is None else self._bar.add_task(what, total=total, completed=done, speed="")

    def __enter__(self) -> "Speedometer":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_items: int, num_tokens: int) -> None:
        """Count finished items and the tokens that they took."""
        self.num_items += num_items
        self.num_tokens += num_tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=num_items, speed=self.speed())

    def log(self) -> None:
        """Write a line, where no bar shows it."""
        if self._is_logged:
            print(f"{self.what}: {self.done + self.num_items:,} of {self.total:,}, {self.speed()}", file=sys.stderr, flush=True)

    def speed(self) -> str:
        """Return tokens per second and the time left, by what this run has done so far."""
        seconds = time.perf_counter() - self._start
        if not self.num_items:
            return ""
        left = (self.total - self.done - self.num_items) * seconds / self.num_items
        return f"{self.num_tokens / max(seconds, 1e-9):,.0f} tokens/s, {as_time(left)} left"


class TrainingLog(TrainerCallback):
    """Say how far a training run is, where no bar shows it: a line for every entry of the log."""

    def __init__(self) -> None:
        self._start, self._first_step = time.perf_counter(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock."""
        self._start, self._first_step = time.perf_counter(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a line of step, loss or acceptance, and the time that is left."""
        entry = state.log_history[-1] if state.log_history else {}
        shown = [f"{name} {entry[name]:.3f}" for name in ("loss", "eval_loss", "eval_tokens_per_round") if name in entry]
        if not shown or not state.is_world_process_zero:
            return
        done = state.global_step - self._first_step
        left = (state.max_steps - state.global_step) * (time.perf_counter() - self._start) / max(done, 1)
        time_left = f", {as_time(left)} left" if done and state.global_step < state.max_steps else ""
        line = f"Step {state.global_step:,} of {state.max_steps:,}: {', '.join(shown)}{time_left}".replace("eval_", "held-out ")
        if args.disable_tqdm:
            print(line, file=sys.stderr, flush=True)


def as_time(seconds: float) -> str:
    """Return a time as people say it: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

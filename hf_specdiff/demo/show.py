"""`hf-specdiff demo` in the terminal: one example side by side, then the comparison as a table."""

import json
import os
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hf_specdiff import __version__
from hf_specdiff.demo.bundle import PROMPT_SETS
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.comparison import MAX_NEW_TOKENS
from hf_specdiff.demo.comparison import PLAIN
from hf_specdiff.demo.comparison import RoundTimes
from hf_specdiff.demo.comparison import Tally
from hf_specdiff.demo.comparison import compare
from hf_specdiff.demo.comparison import demo_decoders
from hf_specdiff.demo.comparison import measure_rounds

OURS = "hf_specdiff, feature drafter, chain"
ROUNDS = [(kind, shape) for kind in ("features", "tokens") for shape in ("chain", "tree")]


class Recording:
    """A streamer that keeps each piece with the second it came at."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.pieces: list[tuple[float, list[int]]] = []

    def put(self, value: torch.Tensor) -> None:
        """Keep a piece."""
        self.pieces.append((time.perf_counter() - self.start, value.flatten().tolist()))

    def end(self) -> None:
        """Nothing is left to do."""

    def text_at(self, seconds: float, tokenizer: Any) -> str:
        """Return what had been written by then, prompt left out."""
        tokens = [token for when, piece in self.pieces[1:] if when <= seconds for token in piece]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def duration(self) -> float:
        """Seconds to the last piece."""
        return self.pieces[-1][0]


def show_side_by_side(console: Console, tokenizer: Any, decoders: dict[str, Any], prompt: str) -> None:
    """Decode one prompt with plain `generate` and with ours, one after the other, and replay both at their true speed."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    recordings = {}
    for name in (PLAIN, OURS):
        decoders[name](ids, MAX_NEW_TOKENS["math"])
        recordings[name] = Recording()
        decoders[name](ids, MAX_NEW_TOKENS["math"], recordings[name])
    console.print(Panel(Text(prompt), title="one held-out prompt", border_style="dim"))
    console.print("Both were decoded just now, one after the other; they are replayed side by side at their true speed.")

    def frame(now: float) -> Columns:
        width = max(30, (console.width - 2) // 2)
        panels = []
        for name, recording in recordings.items():
            is_done = now >= recording.duration
            title = f"{name}: {recording.duration:.2f} s" if is_done else f"{name} ..."
            style = "green" if is_done else "yellow"
            panels.append(Panel(Text(recording.text_at(now, tokenizer)), title=title, border_style=style, width=width))
        return Columns(panels)

    longest = max(recording.duration for recording in recordings.values())
    if not console.is_terminal:
        console.print(frame(longest))
        return
    with Live(frame(0.0), console=console, refresh_per_second=30) as live:
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < longest:
            live.update(frame(now))
            time.sleep(1 / 60)
        live.update(frame(longest))


def table_of(task: str, tallies: dict[str, Tally]) -> Table:
    """Return the comparison of one prompt set as a table."""
    plain = tallies[PLAIN].tokens_per_second
    table = Table(title=f"{task}: {tallies[PLAIN].num_prompts} held-out prompts, greedy, float32")
    for heading in ("decoder", "tokens/s", "ratio to plain", "tokens per round", "identical"):
        table.add_column(heading, justify="left" if heading == "decoder" else "right")
    for name, tally in tallies.items():
        table.add_row(
            name,
            f"{tally.tokens_per_second:.0f}",
            f"{tally.tokens_per_second / plain:.2f}x",
            f"{tally.tokens_per_round:.2f}",
            f"{tally.num_identical}/{tally.num_prompts}",
        )
    return table


def run_demo(num_prompts: int, output: Path | None = None) -> bool:
    """Show the bundled pair at work.

    Args:
        num_prompts (`int`): held-out prompts of each set, at least 1.
        output (`pathlib.Path`, *optional*): a JSON file for the figures.

    Returns:
        `bool`: whether every output equalled plain `generate`'s.

    Raises:
        ValueError: if there are not so many prompts.
    """
    sets = {task: [str(record["prompt"]) for record in load_prompts(task)] for task in PROMPT_SETS}
    available = min(map(len, sets.values()))
    if not 1 <= num_prompts <= available:
        raise ValueError(f"`num_prompts` must be from 1 to {available}, the prompts of a set, got {num_prompts}.")
    console = Console()
    transformers.logging.disable_progress_bar()
    tokenizer, decoders = demo_decoders()
    console.print(
        f"A target, its diffusion drafters and an autoregressive assistant, on {torch.get_num_threads()} CPU threads, float32."
    )
    show_side_by_side(console, tokenizer, decoders, sets["math"][-1])
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for task, texts in sets.items():
            bar = progress.add_task(f"{task} prompts", total=num_prompts)
            prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts[:num_prompts]]
            results[task] = compare(decoders, prompts, MAX_NEW_TOKENS[task], partial(progress.advance, bar))
    for task, tallies in results.items():
        console.print(table_of(task, tallies))
    timed = sets["math"][:num_prompts]
    rounds = {pair: measure_rounds(*pair, timed, MAX_NEW_TOKENS["math"]) for pair in ROUNDS}
    for (kind, shape), times in rounds.items():
        console.print(
            f"a round of math, {kind}, {shape}: target pass {1e3 * times.target_pass:.2f} ms, drafter pass "
            f"{1e3 * times.drafter_pass:.2f} ms, everything between them {100 * times.between_share:.1f} %",
            highlight=False,
        )
    # Plain generate is what the others are compared with.
    everything = [tally for tallies in results.values() for name, tally in tallies.items() if name != PLAIN]
    num_identical = sum(tally.num_identical for tally in everything)
    num_outputs = sum(tally.num_prompts for tally in everything)
    console.print(f"identical: {num_identical}/{num_outputs}")
    if output is not None:
        tree_budget = load_demo()[1].generation_config.tree_budget
        write_results(output, results, rounds, tree_budget)
        console.print(f"figures written to {output}")
    return num_identical == num_outputs


def write_results(
    path: Path, results: dict[str, dict[str, Tally]], rounds: dict[tuple[str, str], RoundTimes], tree_budget: int
) -> None:
    """Write figures and their conditions to a JSON file, beside it first."""
    record = {
        "conditions": {
            "hf_specdiff": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "settings": f"greedy, float32, batch 1, gamma 15, one denoising step, trees of {tree_budget}",
            "command": f"hf-specdiff demo --num-prompts {next(iter(results['math'].values())).num_prompts} --output {path}",
        },
        "rounds": [
            {"task": "math", "drafter": kind, "shape": shape, **asdict(times), "between_share": times.between_share}
            for (kind, shape), times in rounds.items()
        ],
        "rows": [
            {
                "task": task,
                "decoder": name,
                **{key: value for key, value in asdict(tally).items() if key != "round_tokens"},
                "tokens_per_second": tally.tokens_per_second,
                "ratio_to_plain": tally.tokens_per_second / tallies[PLAIN].tokens_per_second,
                "tokens_per_round": tally.tokens_per_round,
                "histogram": [tally.round_tokens.count(size) for size in range(max(tally.round_tokens, default=0) + 1)],
            }
            for task, tallies in results.items()
            for name, tally in tallies.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)

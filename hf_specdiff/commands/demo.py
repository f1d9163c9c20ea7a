"""`hf-specdiff demo` in the terminal: one example side by side, then the comparison as a table."""

import time
from functools import partial
from statistics import median
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

from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.standard import bundled_models
from hf_specdiff.demo.bundle import MAX_NEW_TOKENS
from hf_specdiff.demo.bundle import PROMPT_SETS
from hf_specdiff.demo.bundle import load_prompts

FASTEST = ours("features", "chain", draft_shape="chain")
METHODS = [
    Method(PLAIN, {}),
    Method("transformers, AR assistant", {}, "AR assistant"),
    Method("transformers, tokens", {}, "tokens"),
    *(ours(kind, shape, draft_shape=shape) for kind in ("tokens", "features") for shape in ("chain", "tree")),
]


def show_side_by_side(console: Console, models: Models, prompt: str) -> None:
    """Decode one prompt with plain `generate` and with ours, one after the other, and replay both at their true speed."""
    inputs = models.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS["math"]}
    recordings = {}
    for method in (METHODS[0], FASTEST):
        method.decode(models, inputs, **settings)
        recordings[method.name] = Recording()
        method.decode(models, inputs, **settings, streamer=recordings[method.name])
    console.print(Panel(Text(prompt), title="one held-out prompt", border_style="dim"))
    console.print("Both were decoded just now, one after the other; they are replayed side by side at their true speed.")

    def frame(now: float) -> Columns:
        width = max(30, (console.width - 2) // 2)
        panels = []
        for name, recording in recordings.items():
            is_done = now >= recording.duration
            title = f"{name}: {recording.duration:.2f} s" if is_done else f"{name} ..."
            style = "green" if is_done else "yellow"
            text = models.tokenizer.decode(recording.tokens_at(now), skip_special_tokens=True)
            panels.append(Panel(Text(text), title=title, border_style=style, width=width))
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


def with_medians(rows: list[dict[str, Any]], block: Block, journal: Journal) -> list[dict[str, Any]]:
    """Return the rows with medians over the prompts in place of sums.

    A prompt's ratio is that of two calls made one right after the other, and the median of these is what most prompts saw: one
    call during which the machine was busy elsewhere would weigh as much as all others in a sum.

    Args:
        rows (`list[dict]`): of `rows_of`.
        block (`Block`): what was compared.
        journal (`Journal`): with the notes of all its prompts.

    Returns:
        `list[dict]`: with other "tokens_per_second" and "ratio_to_plain".
    """

    def speeds(method: str) -> list[float]:
        return [call["num_tokens"] / call["seconds"] for call in journal.select(kind=CALL, block=block.name, method=method)]

    changed, plain = [], speeds(PLAIN)
    for row in rows:
        own = speeds(row["method"])
        ratio = median(speed / other for speed, other in zip(own, plain, strict=True))
        changed.append(row | {"tokens_per_second": median(own), "ratio_to_plain": ratio})
    return changed


def table_of(task: str, rows: list[dict[str, Any]]) -> Table:
    """Return the comparison of one prompt set as a table."""
    table = Table(title=f"{task}: {rows[0]['num_prompts']} held-out prompts, greedy, float32, medians over the prompts")
    table.add_column("method", no_wrap=True)
    for heading in ("tokens/s", "to plain", "tokens a round", "identical"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"hf_specdiff, {row['method']}" if row["loop"] == "hf_specdiff" else row["method"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_plain']:.2f}x",
            f"{row['tokens_per_round']:.2f}",
            f"{row['num_identical']}/{row['num_prompts']}",
        )
    return table


def run_demo(num_prompts: int) -> bool:
    """Show the bundled pair at work.

    Args:
        num_prompts (`int`): held-out prompts of each set, at least 1.

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
    models = bundled_models()
    console.print(
        f"A target, its diffusion drafters and an autoregressive assistant, on {torch.get_num_threads()} CPU threads, float32."
    )
    show_side_by_side(console, models, sets["math"][-1])
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for task, texts in sets.items():
            block = Block(task, texts[:num_prompts], METHODS, MAX_NEW_TOKENS[task], num_detailed=0)
            bar = progress.add_task(f"{task} prompts", total=len(block.steps))
            journal = Journal()
            run_block(models, block, journal, partial(progress.advance, bar))
            compared = [row for row in rows_of(block, models, journal) if "refusal" not in row]
            rows.append(with_medians(compared, block, journal))
    for task, compared in zip(sets, rows, strict=True):
        console.print(table_of(task, compared))
    # Plain generate is what the others are compared with.
    others = [row for compared in rows for row in compared if row["method"] != PLAIN]
    num_identical, num_outputs = (sum(row[name] for row in others) for name in ("num_identical", "num_prompts"))
    console.print(f"identical: {num_identical}/{num_outputs}")
    return bool(num_identical == num_outputs)

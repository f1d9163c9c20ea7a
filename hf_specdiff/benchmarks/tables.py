"""A benchmark's figures as tables: cells for the terminal, and Markdown. Measures nothing."""

from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_specdiff.benchmarks.figures import share_interval
from hf_specdiff.benchmarks.methods import COMPILED

SPEED_TITLES = [
    "task",
    "temperature",
    "batch_size",
    "method",
    "tokens/s",
    "ratio to plain (95 %)",
    "tokens per round",
    "our fastest to it (95 %)",
    "identical",
]
TIME_TITLES = [
    "method",
    "a round",
    "target",
    "drafter",
    "rest of the call",
    "between passes, of a round",
    "first token",
    "memory",
    "share of the limit",
    "the limit",
    "perfect drafts",
]
PREFIX_TITLES = ["method", "expected tokens per round (95 %)", "drafted", "places"]

RIGHT_TITLE = "right answers"
RIGHT_NOTE = (
    "Right answers: texts whose last number is the right one, texts cut off at the length limit included. Greedy in float32, "
    "ours and plain `generate`'s are the same texts and so equally often right."
)
TIE_NOTE = (
    "Near ties: texts that first differ from plain `generate`'s where the two tokens are as close as rounding brings logits, "
    "measured at that place; plain `generate` parts from itself there too when the batch changes."
)
COMPILED_TITLES = [
    "task",
    "temperature",
    "batch_size",
    "method",
    "tokens/s",
    "ratio to compiled plain (95 %)",
    "ratio to itself uncompiled (95 %)",
    "first call",
]
GAIN_TITLES = ["strategy", "method", "right answers (95 %)", "gain over plain generate"]


def speed_cells(row: dict[str, Any]) -> list[str]:
    """Return how fast a method is, under `SPEED_TITLES`; of one that could not run the reason."""
    cells = [row["task"], f"{row['temperature']:g}", str(row["batch_size"]), row["method"]]
    if "refusal" in row:
        return [*cells, "", f"cannot run: {row['refusal']}", "", "", ""]
    identical = "by law" if row["temperature"] else identical_cell(row)
    lead = times(row["best_to_this"], row["best_low"], row["best_high"]) if "best_to_this" in row else ""
    ratio = times(row["ratio_to_plain"], row["ratio_low"], row["ratio_high"])
    rounds = "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}"
    return [*cells, f"{row['tokens_per_second']:.0f}", ratio, rounds, lead, identical]


def identical_cell(row: dict[str, Any]) -> str:
    """Return how many greedy texts are plain `generate`'s, and how many of the others part from it at a near tie."""
    num_ties = row.get("num_near_ties", 0)  # results of earlier versions do not tell
    ties = f", {num_ties} near tie{'s' if num_ties > 1 else ''}" if num_ties else ""
    return f"{row['num_identical']}/{row['num_prompts']}{ties}"


def compiled_cells(row: dict[str, Any]) -> list[str]:
    """Return what compiling brings a method, under `COMPILED_TITLES`; of one that did not run the reason."""
    cells = speed_cells(row)[:5]
    if "refusal" in row:
        return [*cells, f"cannot run: {row['refusal']}", "", ""]
    pairs = [
        times(row[f"ratio_to_{name}"], row[f"{name}_low"], row[f"{name}_high"]) if f"ratio_to_{name}" in row else ""
        for name in ("compiled_plain", "eager")
    ]
    first = f"{row['first_call_seconds']:.1f} s" if "first_call_seconds" in row else ""
    return [*cells, *pairs, first]


def right_cell(row: dict[str, Any]) -> str:
    """Return how many answers ended in the right number; empty where that is not known."""
    return "" if row.get("num_right") is None else f"{row['num_right']}/{row['num_prompts']}"


def times(value: float, low: float | None, high: float | None) -> str:
    """Return a ratio with its interval, if it has one."""
    return f"{value:.2f}x" if low is None else f"{value:.2f}x ({low:.2f} to {high:.2f})"


def time_cells(row: dict[str, Any]) -> list[str]:
    """Return where the time of a method's rounds goes, under `TIME_TITLES`; what is not known is left empty."""
    parts = [row[name] for name in ("target_seconds", "drafter_seconds", "rest_seconds")]
    first, peak, perfect = row["first_token_seconds"], row["peak_bytes"], row.get("perfect_ratio")
    between = row["between_share"]
    return [
        row["method"],
        f"{1e3 * sum(parts):.1f} ms",
        *(f"{1e3 * part:.1f} ms" for part in parts[:2]),
        f"{1e3 * parts[2]:.1f} ms",
        "" if between is None else f"{100 * between:.1f} %",
        "" if first is None else f"{1e3 * first:.1f} ms",
        "" if peak is None else f"{peak / 1e6:.0f} MB",
        f"{100 * row['share_of_limit']:.0f} %",
        f"{row['limit_ratio']:.2f}x",
        "" if perfect is None else f"{perfect:.1f}x",
    ]


def gain_cells(gain: dict[str, Any]) -> list[str]:
    """Return a gain under `GAIN_TITLES`."""
    percent = "" if gain["gain_percent"] is None else f"{gain['gain_percent']:+.0f} %"
    low, high = share_interval(gain["accuracy"], gain["problems"])
    share = f"{100 * gain['accuracy']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    return [gain["strategy"], gain["method"], share, percent]


def setting(conditions: dict[str, Any]) -> str:
    """Return what figures were measured on, in a few words."""
    return f"{conditions['dtype']}, transformers {conditions['transformers']}, {conditions['machine']}"


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of speeds; with right answers and notes, where there is something to say."""
    has_answers, has_ties = any(right_cell(row) for row in rows), any(row.get("num_near_ties") for row in rows)
    titles = [*SPEED_TITLES, RIGHT_TITLE] if has_answers else SPEED_TITLES
    table = markdown(titles, [[*speed_cells(row), right_cell(row)][: len(titles)] for row in rows])
    notes = [RIGHT_NOTE] * has_answers + [TIE_NOTE] * has_ties
    return "\n\n".join([table, *notes])


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of what was compiled, and of the eager methods beside it."""
    return markdown(COMPILED_TITLES, [compiled_cells(row) for row in compared_with_compiled(rows)])


def compared_with_compiled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of methods that run compiled, each behind its own without."""
    names = {row["method"].removesuffix(COMPILED) for row in rows if row["method"].endswith(COMPILED)}
    return [row for row in rows if row["method"].removesuffix(COMPILED) in names]


def time_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of where the time of a round goes, of the methods that were looked into."""
    return markdown(TIME_TITLES, [time_cells(row) for row in rows if "target_seconds" in row])


def terminal_table(titles: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """Return a table for the terminal."""
    table = Table(title=title)
    for name in titles:
        table.add_column(name, no_wrap=name == "method")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def prefix_cells(row: dict[str, Any]) -> list[str]:
    """Return what a method's drafts are expected to bring at common places of common texts, under `PREFIX_TITLES`."""
    low, high = row["expected_low"], row["expected_high"]
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    expected = f"{row['expected_tokens_per_round']:.2f}{interval}"
    return [row["method"], expected, f"{row['expected_drafted']:.1f}", str(row["num_places"])]


def time_tables(rows: list[dict[str, Any]]) -> str:
    """Return `time_table` of each group of methods that were compared, under a heading."""
    return _by_group(rows, time_table, "")


def prefix_tables(rows: list[dict[str, Any]]) -> str:
    """Return for each group that was sampled what was expected along common texts, under a heading."""
    sampled = [row for row in rows if "expected_tokens_per_round" in row]
    return _by_group(sampled, lambda group: markdown(PREFIX_TITLES, list(map(prefix_cells, group))), ": common texts")


def _by_group(rows: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str], heading: str) -> str:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SPEED_TITLES[:3]), []).append(row)
    return "\n\n".join(
        f"### {task}, temperature {temperature:g}, batch {batch_size}{heading}\n\n{table(group)}"
        for (task, temperature, batch_size), group in groups.items()
    )

"""README's tables and pictures from the result files: `python -m benchmarks.report README.md`.

Knows the files that `hf-specdiff bench` and `benchmarks.alignment` write. Measures nothing.
"""

import json
import re
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.benchmarks.journal import write_text
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.tables import GAIN_TITLES
from hf_specdiff.benchmarks.tables import gain_cells
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.benchmarks.tables import time_table
from hf_specdiff.benchmarks.time_budget import gains

RESULTS = Path("benchmarks") / "results"
BASELINE = "uniform CE"


def standard_section(record: dict[str, Any]) -> str:
    """Return how fast every method is, and where its time goes."""
    conditions, rows = record["conditions"], record["rows"]
    first = rows[0]
    lines = [
        f"{first['num_prompts']} held-out prompts a task, {conditions['dtype']}, transformers "
        f"{conditions['transformers']}, {conditions['machine']};",
        "all methods in one process, in turn on each prompt. Written by "
        f"`{conditions['command']}` ([`standard.json`](benchmarks/results/standard.json)).",
        "",
        speed_table([row for row in rows if not is_of_curve(row)]),
        "",
        "![Speed of every method](benchmarks/results/ratio.png)",
        "",
        f"Where the time goes ({first['task']}, greedy):",
        "",
        time_table([row for row in rows if is_like(row, first) and not is_of_curve(row)]),
        "",
        'How far chains are accepted; "unaligned" is the feature-conditioned drafter before alignment:',
        "",
        "![Acceptance by position](benchmarks/results/acceptance.png)",
        "",
        "Self-selection, as in SpecDiff-2, beside the walk over the same joint samples:",
        "",
        "![Self-selection and the walk](benchmarks/results/samples.png)",
    ]
    return "\n".join(lines)


def is_of_curve(row: dict[str, Any]) -> bool:
    """Return whether a row is there for the curve over K alone."""
    return row["arguments"].get("num_drafts", 8) != 8


def is_like(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two rows may be compared."""
    return all(row[name] == other[name] for name in ("task", "temperature", "batch_size"))


def time_budget_section(record: dict[str, Any]) -> str:
    """Return what speed is worth in right answers."""
    conditions = record["conditions"]
    headline = conditions["headline_seconds"]
    lines = [
        f"{conditions['num_problems']} held-out problems of each difficulty ({', '.join(map(str, conditions['difficulties']))} "
        f"steps), {headline:g} s for each, a budget fixed before the run; written by",
        f"`{conditions['command']}` ([`time_budget.json`](benchmarks/results/time_budget.json)). One answer is greedy and read "
        f"where the time is up; a vote is the majority of attempts sampled at {conditions['temperature']:g}.",
        "",
        markdown(GAIN_TITLES, [gain_cells(gain) for gain in gains(record["rows"], headline)]),
        "",
        "![Accuracy against the time for a problem](benchmarks/results/time_budget.png)",
    ]
    return "\n".join(lines)


def alignment_section(record: dict[str, Any]) -> str:
    """Return what each objective brings, against uniform cross-entropy of the same conditioning; means over the seeds."""
    conditions, rows = record["conditions"], record["rows"]
    seeds = {row["seed"] for row in rows}
    lines = [
        f"Objectives at equal compute: {rows[0]['steps']} steps of {conditions['batch_size']} sequences from nothing, "
        f"{len(seeds)} seeds, {conditions['eval_prompts']} held-out word problems, greedy chains "
        "([`alignment.json`](benchmarks/results/alignment.json),",
        f"`{conditions['command']}`). Runs are short: they compare objectives, not drafters.",
        "",
        "| conditioning | objective | tokens per round | to uniform CE | by seed | last 5 positions accepted | at T = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["conditioning"], row["objective"]), []).append(row)
    for (conditioning, objective), group in sorted(groups.items(), key=lambda item: item[0][0]):
        base = mean_of(groups[conditioning, BASELINE], "tokens_per_round")
        rate = mean_of(group, "tokens_per_round")
        late = [sum(row["acceptance_per_position"][-5:]) / 5 for row in group]
        by_seed = ", ".join(f"{row['tokens_per_round']:.2f}" for row in group)
        lines.append(
            f"| {conditioning} | {objective} | {rate:.2f} | {rate / base:.2f}x | {by_seed} | {sum(late) / len(late):.3f} "
            f"| {mean_of(group, 'tokens_per_round_sampled'):.2f} |"
        )
    return "\n".join(lines)


def mean_of(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean of one figure over rows."""
    return sum(row[name] for row in rows) / len(rows)


def between_markers(text: str, name: str, body: str) -> str:
    """Return a text with what stands between two markers replaced.

    Args:
        text (`str`): with one pair of HTML comments `name` and `/name`.
        name (`str`): of the markers.
        body (`str`): what is to stand there.

    Returns:
        `str`: the new text.

    Raises:
        ValueError: if there is not one pair.
    """
    block = f"<!-- {name} -->\n{body}\n<!-- /{name} -->"
    new, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"`readme` must have one pair of markers {name!r}, got {count}.")
    return new


# What stands between which markers of the README, and the file that it is made from.
SECTIONS = {"standard": standard_section, "time_budget": time_budget_section, "alignment": alignment_section}


def main(readme: Annotated[Path, typer.Argument(help="the README to bring up to date")]) -> None:
    """Write the tables between README's result markers and draw the pictures beside the result files."""
    folder = readme.parent / RESULTS
    text = readme.read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        text = between_markers(text, name, section(record))
        if name == "standard":
            plot_all(record, folder)
        elif name == "time_budget":
            save(plot_accuracy(record["rows"]), folder / "time_budget.png")
    write_text(readme, text)
    typer.echo(f"{len(SECTIONS)} tables written to {readme}")


if __name__ == "__main__":
    typer.run(main)

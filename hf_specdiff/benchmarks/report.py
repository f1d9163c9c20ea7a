"""README's tables and plot from the result files: `python -m hf_specdiff.benchmarks.report README.md`.

Knows the files that `hf-specdiff demo --output` and `hf_specdiff.benchmarks.shapes` write. Measures nothing.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated
from typing import Any

import matplotlib as mpl
import typer

mpl.use("Agg")

from matplotlib import pyplot as plt

from hf_specdiff.benchmarks.shapes import NUM_DRAFTS
from hf_specdiff.benchmarks.shapes import PLAIN

RESULTS = Path("benchmarks") / "results"
BASELINE = "uniform CE"


def demo_section(record: dict[str, Any]) -> str:
    """Return the comparison with plain `generate` and the AR assistant, and where a round's time goes."""
    conditions = record["conditions"]
    lines = [
        f"The bundled pair on its held-out prompts: {conditions['settings']}, {conditions['threads']} CPU threads "
        f"({conditions['machine']}), torch {conditions['torch']},",
        f"transformers {conditions['transformers']}; all decoders in one process, interleaved prompt by prompt. "
        "`make bench` measures it again and writes",
        "[`demo.json`](benchmarks/results/demo.json), which also holds the histogram of the tokens per round.",
        "",
        "| task | decoder | tokens/s | ratio to plain | tokens per round | identical to plain |",
        "|---|---|---|---|---|---|",
    ]
    lines += [demo_row(row) for row in record["rows"]]
    lines += [
        "",
        "Tokens per round counts the target's own token. For the assistants in transformers' loop the pass over the prompt is "
        "a round.",
        "",
        "| a round of math | whole | target pass | drafter pass | everything between them |",
        "|---|---|---|---|---|",
    ]
    lines += [round_row(times) for times in record["rounds"]]
    return "\n".join(lines)


def demo_row(row: dict[str, Any]) -> str:
    """Return one decoder's line."""
    return (
        f"| {row['task']} | {row['decoder']} | {row['tokens_per_second']:.0f} | {row['ratio_to_plain']:.2f}x | "
        f"{row['tokens_per_round']:.2f} | {row['num_identical']}/{row['num_prompts']} |"
    )


def round_row(times: dict[str, Any]) -> str:
    """Return the line of one kind of round."""
    whole = times["target_pass"] + times["drafter_pass"] + times["between"]
    cells = [f"{1e3 * seconds:.1f} ms" for seconds in (whole, times["target_pass"], times["drafter_pass"])]
    return f"| {times['drafter']} drafter, {times['shape']} | {' | '.join(cells)} | {100 * times['between_share']:.1f} % |"


def shapes_section(record: dict[str, Any]) -> str:
    """Return every shape and rule as a table."""
    lines = [
        f"Shapes and rules, by `{record['conditions']['command']}` "
        "([`shapes.json`](benchmarks/results/shapes.json)); ratios are to plain `generate` at the same temperature and batch "
        "size:",
        "",
        "| task | temperature | batch | method | ratio to plain | tokens per round | drafted per round | identical to plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [shapes_row(row) for row in record["rows"] if " samples by " not in row["method"]]
    lines += [
        "",
        "![Self-selection and the walk over the same joint samples](benchmarks/results/samples.png)",
    ]
    return "\n".join(lines)


def shapes_row(row: dict[str, Any]) -> str:
    """Return one method's line."""
    identical = "by law" if row["temperature"] else f"{row['num_identical']}/{row['num_prompts']}"
    return (
        f"| {row['task']} | {row['temperature']:g} | {row['batch_size']} | {row['method']} | {row['ratio_to_plain']:.2f}x | "
        f"{row['tokens_per_round']:.2f} | {row['drafted_per_round']:.1f} | {identical} |"
    )


def alignment_section(record: dict[str, Any]) -> str:
    """Return what each objective brings, against uniform cross-entropy of the same conditioning; means over the seeds."""
    conditions, rows = record["conditions"], record["rows"]
    seeds = {row["seed"] for row in rows}
    lines = [
        f"Objectives at equal compute: {rows[0]['steps']} steps of {conditions['batch_size']} sequences from nothing, "
        f"{len(seeds)} seeds, {conditions['eval_prompts']} held-out prompts of both kinds, greedy chains "
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


def plot_samples(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot tokens per round against K: SpecDiff-2's self-selection beside the walk on the same kind of drafts.

    Args:
        rows (`list[dict]`): of `shapes.json`.
        path (`pathlib.Path`): the PNG file.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, temperature, title in zip(axes, (0.0, 1.0), ("greedy", "sampling at temperature 1"), strict=True):
        for rule, label in (("match", "walk over all drafts"), ("self-selection", "self-selection")):
            names = [f"features, {count} samples by {rule}" for count in NUM_DRAFTS]
            found = {row["method"]: row["tokens_per_round"] for row in rows if row["temperature"] == temperature}
            axis.plot(NUM_DRAFTS, [found[name] for name in names], marker="o", label=label)
        axis.set(xscale="log", xlabel="joint drafts K", title=f"math, {title}")
        axis.set_xticks(NUM_DRAFTS, [str(count) for count in NUM_DRAFTS])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per round")
    axes[0].legend()
    beside = path.with_suffix(".partial.png")
    figure.savefig(beside, dpi=120)
    plt.close(figure)
    os.replace(beside, path)


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


def main(readme: Annotated[Path, typer.Argument(help="the README to bring up to date")]) -> None:
    """Write the tables between README's result markers and draw the plot beside the result files."""
    folder = readme.parent / RESULTS
    demo = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    plot_samples(shapes["rows"], folder / "samples.png")
    text = readme.read_text(encoding="utf-8")
    new = between_markers(text, "results", f"{demo_section(demo)}\n\n{shapes_section(shapes)}")
    if (folder / "alignment.json").is_file():
        alignment = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
        new = between_markers(new, "alignment", alignment_section(alignment))
    beside = readme.with_suffix(".partial")
    beside.write_text(new, encoding="utf-8")
    os.replace(beside, readme)
    plain = [row for row in shapes["rows"] if row["method"] == PLAIN]
    typer.echo(f"{len(demo['rows'])} and {len(shapes['rows']) - len(plain)} rows written to {readme}")


if __name__ == "__main__":
    typer.run(main)

"""The documentation's tables and pictures from the result files: `python -m benchmarks.report`.

Knows the files that `hf-specdiff bench` and `benchmarks.alignment` write, and the pages that show them. Measures nothing.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from benchmarks.context_cache import context_cache_section
from benchmarks.experts import experts_section
from benchmarks.growth import growth_table
from benchmarks.papers_tables import longer_tables
from benchmarks.papers_tables import papers_tables
from benchmarks.papers_tables import plot_papers
from hf_specdiff.benchmarks.journal import write_text
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.plots import plot_growth
from hf_specdiff.benchmarks.plots import plot_tasks
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.tables import GAIN_TITLES
from hf_specdiff.benchmarks.tables import RIGHT_NOTE
from hf_specdiff.benchmarks.tables import compiled_table
from hf_specdiff.benchmarks.tables import gain_cells
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import right_cell
from hf_specdiff.benchmarks.tables import setting
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.benchmarks.tables import time_table
from hf_specdiff.benchmarks.tables import times
from hf_specdiff.benchmarks.time_budget import gains

RESULTS = Path("benchmarks") / "results"
PASS_TITLES = ["drafted tokens", "accepted", "tokens per round", "target passes per round"]
TASKS = {
    "math": "word problems",
    "code": "code",
    "gsm8k": "SmolLM2-135M-Instruct on GSM8K",
    "humaneval": "SmolLM2-135M-Instruct on HumanEval",
}
REAL_SUMMARY = (("gsm8k", 0, 1, "drafter, default"), ("humaneval", 0, 1, "drafter, default"))
BASELINE = "uniform CE"
# README's rows, by task, temperature, batch size and method: others' loops first, ours, and two where drafting does not pay.
SUMMARY = (
    ("math", 0, 1, "transformers, AR assistant"),
    ("math", 0, 1, "transformers' dflash loop, features"),
    ("math", 0, 1, "features, tree of 15 with copies"),
    ("math", 0, 1, "tokens, tree of 15"),
    ("math", 0, 8, "features, chain"),
    ("math", 1, 1, "features, chain by match"),
    ("code", 0, 1, "transformers, prompt lookup"),
    ("code", 0, 1, "features, tree of 15 with copies"),
    ("code", 0, 1, "features, 8 samples by self-selection"),
    ("code", 1, 1, "features, chain by ratio"),
)


def standard_section(record: dict[str, Any]) -> str:
    """Return how fast every method is, and where its time goes."""
    conditions, rows = record["conditions"], record["rows"]
    first = rows[0]
    lines = [
        f"{first['num_prompts']} held-out prompts a task, {conditions['dtype']}, transformers "
        f"{conditions['transformers']}, {conditions['machine']};",
        "all methods in one process, in turn on each prompt. Written by "
        f"`{conditions['command']}` ([`standard.json`](../benchmarks/results/standard.json)).",
        "",
        speed_table([row for row in rows if not is_of_curve(row)]),
        "",
        "![Speed of every method](../benchmarks/results/ratio.png)",
        "",
        f"Where the time goes ({first['task']}, greedy):",
        "",
        time_table([row for row in rows if is_like(row, first) and not is_of_curve(row)]),
        "",
        'How far chains are accepted; "unaligned" is the feature-conditioned drafter before alignment:',
        "",
        "![Acceptance by position](../benchmarks/results/acceptance.png)",
        "",
        "Self-selection, as in SpecDiff-2, beside the walk over the same joint samples:",
        "",
        "![Self-selection and the walk](../benchmarks/results/samples.png)",
    ]
    return "\n".join(lines)


def compiled_section(record: dict[str, Any]) -> str:
    """Return what compiling brings plain `generate` and ours."""
    rows = record["rows"]
    num_same, num_all = (sum(row[name] for row in rows) for name in ("num_identical", "num_prompts"))
    lines = [
        f"{rows[0]['num_prompts']} held-out prompts, {setting(record['conditions'])}.",
        f"{num_same} of {num_all} texts are plain `generate`'s. Written by",
        f"`{record['conditions']['command']}` ([`compiled.json`](../benchmarks/results/compiled.json)).",
        "",
        compiled_table(rows),
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
        f"`{conditions['command']}` ([`time_budget.json`](../benchmarks/results/time_budget.json)). One answer is greedy and "
        f"read where the time is up; a vote is the majority of attempts sampled at {conditions['temperature']:g}.",
        "",
        markdown(GAIN_TITLES, [gain_cells(gain) for gain in gains(record["rows"], headline)]),
        "",
        "![Accuracy against the time for a problem](../benchmarks/results/time_budget.png)",
    ]
    return "\n".join(lines)


def alignment_section(record: dict[str, Any]) -> str:
    """Return what each objective brings, against uniform cross-entropy of the same conditioning; means over the seeds."""
    conditions, rows = record["conditions"], record["rows"]
    seeds = {row["seed"] for row in rows}
    lines = [
        f"Objectives at equal compute: {rows[0]['steps']} steps of {conditions['batch_size']} sequences from nothing, "
        f"{len(seeds)} seeds, {conditions['eval_prompts']} held-out word problems, greedy chains "
        "([`alignment.json`](../benchmarks/results/alignment.json),",
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


def growth_section(record: dict[str, Any] | None) -> str:
    """Return how acceptance grows with data and hours."""
    if record is None:
        return "Not measured yet; `python -m benchmarks.growth` writes it from the logs of training runs."
    picture = "![Tokens per round over steps and hours](../benchmarks/results/growth.png)"
    return f"{growth_table(record['points'])}\n\n{picture}"


def papers_section(record: dict[str, Any] | None) -> str:
    """Return the papers' experiment in small."""
    if record is None:
        return "Not measured yet; `python -m benchmarks.specdiff_papers` does it."
    return papers_tables(record)


def papers_longer_section(record: dict[str, Any] | None) -> str:
    """Return what a longer alignment brings to it."""
    return "A longer alignment is not measured yet." if record is None else longer_tables(record)


def hybrid_section(record: dict[str, Any] | None) -> str:
    """Return how fast a hybrid target is, and how many of its passes a round takes."""
    if record is None:
        return "Not measured yet; `python -m benchmarks.hybrid` does it."
    conditions, pair = record["conditions"], record["pair"]
    plain = next(row for row in record["rows"] if row["method"] == PLAIN)
    kinds, sizes = pair["layers"], [pair[f"{name}_parameters"] / 1e6 for name in ("target", "drafter")]
    lines = [
        f"An {pair['target_type']} of {sizes[0]:.1f}M parameters, {kinds.count('conv')} of its {len(kinds)} layers "
        f"convolutions, with a drafter of {sizes[1]:.1f}M;",
        f"{conditions['dtype']}, {conditions['machine']}, transformers {conditions['transformers']}. Written by "
        f"`{conditions['command']}` ([`hybrid.json`](../benchmarks/results/hybrid.json)). "
        f"The target answers {plain['num_right']} of {plain['num_prompts']} problems right.",
        "",
        speed_table(record["rows"]),
        "",
        "Passes of the target that chains of several lengths take:",
        "",
        markdown(PASS_TITLES, [_pass_cells(found) for found in record["passes"]]),
    ]
    return "\n".join(lines)


def _pass_cells(found: dict[str, Any]) -> list[str]:
    share, rates = f"{100 * found['acceptance_rate']:.0f} %", (found["tokens_per_round"], found["passes_per_round"])
    return [str(found["gamma"]), share, *(f"{rate:.2f}" for rate in rates)]


def mean_of(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean of one figure over rows."""
    return sum(row[name] for row in rows) / len(rows)


def smollm2_section(record: dict[str, Any] | None) -> str:
    """Return how fast a real model is on real prompts; a table for each temperature."""
    if record is None:
        return "Not measured yet; `python -m benchmarks.smollm2` does it."
    conditions, rows = record["conditions"], record["rows"]
    lines = [
        f"{conditions['target']} ({conditions['target_parameters'] / 1e6:.0f}M parameters) with its drafter "
        f"({conditions['drafter_parameters'] / 1e6:.1f}M), {conditions['dtype']}, {conditions['machine']}, transformers "
        f"{conditions['transformers']};",
        "all methods in one process, in turn on each held-out prompt. Speed against plain `generate` on the same prompts, "
        "tokens per round in brackets.",
        f"Written by `{conditions['command']}` ([`smollm2.json`](../benchmarks/results/smollm2.json)).",
    ]
    for heat in dict.fromkeys(row["temperature"] for row in rows):
        group = [row for row in rows if row["temperature"] == heat]
        lines += ["", f"Sampled at temperature {heat:g}:" if heat else "Greedy:", "", _by_task(group)]
    lines += ["", RIGHT_NOTE, "", "![Speed on real prompts](../benchmarks/results/smollm2.png)"]
    return "\n".join(lines)


def _by_task(rows: list[dict[str, Any]]) -> str:
    """Return one temperature's figures: a line for each task, a column for each method, Spec-Bench's mean and worst below."""
    plain = [row for row in rows if row["method"] == PLAIN]
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != PLAIN))
    found = {(row["task"], row["method"]): row for row in rows}
    titles = ["prompts", "number", "plain, tokens/s", *names, "same tokens", "right answers: plain, ours"]
    lines = []
    for base in plain:
        others = [found.get((base["task"], name)) for name in names]
        measured = [row for row in others if row is not None and "refusal" not in row]
        ours = [row for row in measured if row["loop"] == "hf_specdiff"]
        num_same, num_all = (sum(row[name] for row in ours) for name in ("num_identical", "num_prompts"))
        same = "by law" if base["temperature"] else f"{num_same}/{num_all}"
        right = "" if base["num_right"] is None else f"{right_cell(base)}, {', '.join(map(right_cell, ours[:1]))}"
        speed = [base["task"], str(base["num_prompts"]), f"{base['tokens_per_second']:.1f}"]
        lines.append([*speed, *map(_ratio_cell, others), same, right])
    for title, pick in (("mean of its categories", lambda values: sum(values) / len(values)), ("its worst category", min)):
        cells = []
        for name in names:
            ratios = [row["ratio_to_plain"] for (task, method), row in found.items() if _is_category(task) and method == name]
            cells.append(f"{pick(ratios):.2f}x" if ratios else "")
        if any(cells):
            lines.append([f"spec-bench: {title}", "", "", *cells, "", ""])
    return markdown(titles, lines)


def _is_category(task: str) -> bool:
    return task.startswith("spec-bench: ")


def _ratio_cell(row: dict[str, Any] | None) -> str:
    if row is None or "refusal" in row:
        return "" if row is None else "cannot run"
    rounds = "" if row["tokens_per_round"] is None else f" ({row['tokens_per_round']:.2f})"
    return f"{row['ratio_to_plain']:.2f}x{rounds}"


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
        raise ValueError(f"`text` must have one pair of markers {name!r}, got {count}.")
    return new


def row_of(rows: list[dict[str, Any]], task: str, temperature: float, batch_size: int, method: str) -> dict[str, Any]:
    """Return one row of the standard set.

    Raises:
        ValueError: if it was not measured.
    """
    wanted = {"task": task, "temperature": temperature, "batch_size": batch_size, "method": method}
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if len(found) != 1 or "refusal" in found[0]:
        raise ValueError(
            f"`results` must hold one measured row of {wanted}, got {len(found)}. Run `make bench`, or change SUMMARY."
        )
    return found[0]


def promise_section(record: dict[str, Any]) -> str:
    """Return the best and the worst of README's own rows in one sentence, with what they were measured on."""
    rows = {key: row_of(record["rows"], *key) for key in SUMMARY}
    ours = [row for row in rows.values() if row["loop"] == "hf_specdiff"]
    best, worst = (pick(ours, key=lambda row: row["ratio_to_plain"]) for pick in (max, min))
    conditions = record["conditions"]
    return (
        f"Measured with the bundled pair on {conditions['threads']} CPU threads in {conditions['dtype']}: "
        f"**{best['ratio_to_plain']:.1f} times as fast** as `model.generate` on {_where(best)}, "
        f"{worst['ratio_to_plain']:.1f} times on {_where(worst)}."
    )


def _where(row: dict[str, Any]) -> str:
    """Return what a row was measured on, in words."""
    task = TASKS.get(row["task"], row["task"])
    how = "greedy" if row["temperature"] == 0 else f"sampled at temperature {row['temperature']:g}"
    return f"{task}, {how}" if row["batch_size"] == 1 else f"{task}, {how}, batches of {row['batch_size']}"


def summary_section(record: dict[str, Any], real: dict[str, Any] | None) -> str:
    """Return README's few rows: the bundled pair's and, where it was measured, two of a real model's."""
    rows = [row_of(record["rows"], *key) for key in SUMMARY]
    rows += [] if real is None else [row_of(real["rows"], *key) for key in REAL_SUMMARY]
    cells = []
    for row in rows:
        same = "by law" if row["identical"] is None else f"{row['num_identical']}/{row['num_prompts']}"
        ratio = times(row["ratio_to_plain"], row["ratio_low"], row["ratio_high"])
        loop = row["method"] if row["loop"] == "transformers" else f"ours: {row['method']}"
        cells.append([_where(row), loop, ratio, f"{row['tokens_per_round']:.1f}", same])
    return markdown(["prompts", "method", "to plain `generate` (95 %)", "tokens per round", "same tokens"], cells)


# The pages, what stands between which markers of them, and the files that it is made from.
PAGES: dict[str, dict[str, tuple[tuple[str, ...], Callable[..., str]]]] = {
    "README.md": {"promise": (("standard",), promise_section), "summary": (("standard", "smollm2"), summary_section)},
    "docs/results.md": {
        "standard": (("standard",), standard_section),
        "compiled": (("compiled",), compiled_section),
        "time_budget": (("time_budget",), time_budget_section),
        "smollm2": (("smollm2",), smollm2_section),
        "hybrid": (("hybrid",), hybrid_section),
        "specdiff_papers": (("specdiff_papers",), papers_section),
        "specdiff_papers_longer": (("specdiff_papers_longer",), papers_longer_section),
        "context_cache": (("context_cache",), context_cache_section),
        "experts": (("experts",), experts_section),
    },
    "docs/training.md": {"alignment": (("alignment",), alignment_section)},
    "docs/your-model.md": {"growth": (("growth",), growth_section)},
}
# What a machine may not have measured yet.
OPTIONAL = ("smollm2", "hybrid", "growth", "specdiff_papers", "specdiff_papers_longer")


def read_record(root: Path, name: str) -> dict[str, Any]:
    """Return one of the repository's result files."""
    record: dict[str, Any] = json.loads((root / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def section_of(root: Path, page: str, name: str) -> str:
    """Return what stands between a page's markers, from the result files; `None` stands for one that is not there yet."""
    sources, section = PAGES[page][name]
    is_there = [source not in OPTIONAL or (root / RESULTS / f"{source}.json").is_file() for source in sources]
    return section(*(read_record(root, source) if here else None for source, here in zip(sources, is_there, strict=True)))


def main(root: Annotated[Path, typer.Argument(help="the repository")] = Path()) -> None:
    """Write the tables between the pages' result markers and draw the pictures beside the result files."""
    for page, sections in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        for name in sections:
            text = between_markers(text, name, section_of(root, page, name))
        write_text(root / page, text)
    plot_all(read_record(root, "standard"), root / RESULTS)
    save(plot_accuracy(read_record(root, "time_budget")["rows"]), root / RESULTS / "time_budget.png")
    if (root / RESULTS / "smollm2.json").is_file():
        rows = [row for row in read_record(root, "smollm2")["rows"] if "refusal" not in row and row["method"] != PLAIN]
        save(plot_tasks(rows), root / RESULTS / "smollm2.png")
    if (root / RESULTS / "growth.json").is_file():
        save(plot_growth(read_record(root, "growth")["points"]), root / RESULTS / "growth.png")
    if (root / RESULTS / "specdiff_papers.json").is_file():
        save(plot_papers(read_record(root, "specdiff_papers")), root / RESULTS / "specdiff_papers.png")
    typer.echo(f"Tables written to {', '.join(PAGES)}.")


if __name__ == "__main__":
    typer.run(main)

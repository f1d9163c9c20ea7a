"""Pictures of a benchmark's figures. Measures nothing."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_specdiff.benchmarks.methods import NUM_DRAFTS
from hf_specdiff.core.files import write_whole

OURS, THEIRS = "#2a6f97", "#b08968"
PARTS = (
    ("target_seconds", "target", "#2a6f97"),
    ("drafter_seconds", "drafter", "#e9c46a"),
    ("rest_seconds", "rest", "#bc4749"),
)


def plot_all(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw everything that a record has figures for.

    Args:
        record (`dict`): of `benchmark`.
        folder (`pathlib.Path`): for the PNG files.

    Returns:
        `list[pathlib.Path]`: ratio.png, rounds.png, acceptance.png, time.png, cost.png; samples.png if K was varied.
    """
    rows = [row for row in record["rows"] if "refusal" not in row]
    single = [row for row in rows if row["batch_size"] == min(row["batch_size"] for row in rows)]
    curve = [row for row in single if " samples by " in row["method"]]
    others = [row for row in single if row not in curve or row["arguments"]["num_drafts"] == 8]
    pictures = {
        "ratio": plot_bars(others, "ratio_to_plain", "speed, times plain generate", has_interval=True),
        "rounds": plot_bars(others, "tokens_per_round", "tokens per round", has_interval=False),
        "acceptance": plot_acceptance(others),
        "time": plot_times(others),
    }
    if record["profile"] is not None:
        pictures["cost"] = plot_cost(record["profile"])
    if len({row["arguments"]["num_drafts"] for row in curve}) > 2:
        pictures["samples"] = plot_samples(curve)
    return [save(figure, folder / f"{name}.png") for name, figure in pictures.items()]


Panels = list[tuple[Axes, list[dict[str, Any]]]]


def panels(rows: list[dict[str, Any]], height: float | None = None) -> tuple[Figure, Panels]:
    """Return a picture with an axis for each task and temperature, and the rows that go there.

    Args:
        rows (`list[dict]`): of a record.
        height (`float`, *optional*): of an axis, in inches; by default room for a line of each row.
    """
    kinds = sorted({(row["temperature"], row["task"]) for row in rows}, key=lambda kind: (kind[0], kind[1] != rows[0]["task"]))
    height = 0.9 + 0.24 * len(rows) / len(kinds) if height is None else height
    num_columns = min(2, len(kinds))
    num_rows = math.ceil(len(kinds) / num_columns)
    size = (5.6 * num_columns, height * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    found = []
    for axis, (temperature, task) in zip(axes.flat, kinds, strict=False):
        axis.set_title(f"{task}, {f'temperature {temperature:g}' if temperature else 'greedy'}", fontsize=10)
        axis.grid(alpha=0.3)
        found.append((axis, [row for row in rows if (row["temperature"], row["task"]) == (temperature, task)]))
    return figure, found


def plot_bars(rows: list[dict[str, Any]], name: str, label: str, *, has_interval: bool) -> Figure:
    """Draw one figure of every method, task and temperature."""
    figure, charts = panels(rows)
    for axis, chosen in charts:
        values = [row[name] or 0.0 for row in chosen]
        has_interval = has_interval and all(row["ratio_low"] is not None for row in chosen)
        spread = [[row[name] - row["ratio_low"], row["ratio_high"] - row[name]] for row in chosen] if has_interval else None
        colors = [OURS if row["loop"] == "hf_specdiff" else THEIRS for row in chosen]
        errors = None if spread is None else [list(side) for side in zip(*spread, strict=True)]
        axis.barh([row["method"] for row in chosen], values, color=colors, xerr=errors, error_kw={"elinewidth": 1})
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel(label)
    return figure


def plot_acceptance(rows: list[dict[str, Any]]) -> Figure:
    """Draw the share of chains accepted up to each position; those of trees, which differ in depth, would not compare."""
    figure, charts = panels(rows, 3.0)
    for axis, chosen in charts:
        for row in chosen:
            if row["acceptance_per_position"] and row["shape_and_rule"][0] == "chain":
                positions = range(1, len(row["acceptance_per_position"]) + 1)
                axis.plot(positions, row["acceptance_per_position"], label=row["method"], linewidth=1)
        axis.set(xlabel="position in the draft", ylabel="accepted", ylim=(0, 1))
        if axis.lines:
            axis.legend(fontsize=6)
    return figure


def plot_times(rows: list[dict[str, Any]]) -> Figure:
    """Draw how a round's time is split."""
    timed = [row for row in rows if row.get("target_seconds") is not None]
    figure, charts = panels(timed)
    for axis, chosen in charts:
        left = [0.0] * len(chosen)
        for name, label, color in PARTS:
            widths = [1e3 * row[name] for row in chosen]
            axis.barh([row["method"] for row in chosen], widths, left=left, color=color, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel("ms per round")
        axis.legend(fontsize=7)
    return figure


def plot_cost(profile: dict[str, list[float]]) -> Figure:
    """Draw what a target pass costs over how many tokens."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    axis.plot(profile["sizes"], [1e3 * seconds for seconds in profile["target_seconds"]], marker="o", color=OURS)
    axis.set(xlabel="tokens in a target pass", ylabel="ms", ylim=(0, None))
    axis.grid(alpha=0.3)
    return figure


def plot_samples(rows: list[dict[str, Any]]) -> Figure:
    """Draw tokens per round against K: SpecDiff-2's self-selection beside the walk on the same kind of drafts."""
    figure, charts = panels([row for row in rows if row["task"] == rows[0]["task"]], 3.2)
    for axis, chosen in charts:
        for rule, label in (("match", "walk over all drafts"), ("self_selection", "self-selection")):
            drawn = [row for row in chosen if row["arguments"]["acceptance"] == rule]
            found = {row["arguments"]["num_drafts"]: row["tokens_per_round"] for row in drawn}
            axis.plot(list(found), list(found.values()), marker="o", label=label)
        axis.set(xscale="log", xlabel="joint drafts K", ylabel="tokens per round")
        axis.set_xticks(NUM_DRAFTS, [str(count) for count in NUM_DRAFTS])
        axis.legend()
    return figure


def plot_tasks(rows: list[dict[str, Any]]) -> Figure:
    """Draw the speed of a few methods on many tasks, an axis for each temperature and the tasks one under the other."""
    heats = sorted({row["temperature"] for row in rows})
    tasks = {heat: list(dict.fromkeys(row["task"] for row in rows if row["temperature"] == heat)) for heat in heats}
    height = 1.0 + 0.75 * max(map(len, tasks.values()))
    figure, axes = plt.subplots(1, len(heats), figsize=(5.6 * len(heats), height), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["method"] for row in rows))
    colors = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for axis, heat in zip(axes.flat, heats, strict=True):
        chosen = [row for row in rows if row["temperature"] == heat]
        methods = [name for name in names if any(row["method"] == name for row in chosen)]
        for place, name in enumerate(methods):
            own = [row for row in chosen if row["method"] == name]
            levels = [tasks[heat].index(row["task"]) + 0.8 * (place + 0.5) / len(methods) - 0.4 for row in own]
            widths = [row["ratio_to_plain"] for row in own]
            axis.barh(levels, widths, height=0.8 / len(methods), color=colors[name], label=name)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(tasks[heat])), tasks[heat], fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="speed, times plain generate", title=f"temperature {heat:g}" if heat else "greedy")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def plot_growth(points: list[dict[str, Any]]) -> Figure:
    """Draw tokens per round over the steps and, where they were timed, the hours of several training runs.

    Args:
        points (`list[dict]`): `run`, `step`, `hours` or `None`, `tokens_per_round`.
    """
    axes_names = [("step", "steps")] + ([("hours", "hours")] if all(point["hours"] is not None for point in points) else [])
    size = (4.6 * len(axes_names), 3.4)
    figure, axes = plt.subplots(1, len(axes_names), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (name, label) in zip(axes.flat, axes_names, strict=True):
        for run in dict.fromkeys(point["run"] for point in points):
            own = [point for point in points if point["run"] == run]
            axis.plot([point[name] for point in own], [point["tokens_per_round"] for point in own], marker=".", label=run)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("tokens per round, held-out prompts")
    axes[0, 0].legend(fontsize=7)
    return figure


def plot_accuracy(rows: list[dict[str, Any]]) -> Figure:
    """Draw accuracy against the budget, for each difficulty and strategy."""
    difficulties = sorted({row["difficulty"] for row in rows})
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    shape = (len(strategies), len(difficulties))
    size = (3.6 * shape[1], 3.1 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (strategy, difficulty) in zip(axes.flat, itertools.product(strategies, difficulties), strict=True):
        chosen = [row for row in rows if (row["strategy"], row["difficulty"]) == (strategy, difficulty)]
        for method in dict.fromkeys(row["method"] for row in chosen):
            own = [row for row in chosen if row["method"] == method]
            axis.plot([row["budget_seconds"] for row in own], [row["accuracy"] for row in own], marker=".", label=method)
        axis.set(xscale="log", xlabel="seconds for a problem", title=f"{strategy}, {_in_words(difficulty)}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers")
    axes[0, 0].legend(fontsize=7)
    return figure


def _in_words(difficulty: int | str) -> str:
    return difficulty if isinstance(difficulty, str) else f"{difficulty} steps"


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, and close it."""
    write_whole(path, partial(figure.savefig, dpi=110, format="png"))
    plt.close(figure)
    return path

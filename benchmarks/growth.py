"""How acceptance grows with data and hours: `python -m benchmarks.growth OUTPUT LABEL=FOLDER LABEL=FOLDER ...`.

Reads what training runs have logged, one run for each amount of data, and writes `growth.json`, a table and a picture of tokens
per round on held-out prompts. Measures nothing.
"""

import json
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.benchmarks.journal import write_text
from hf_specdiff.benchmarks.plots import plot_growth
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import markdown

RATE = "eval_tokens_per_round"
STATE = "trainer_state.json"
TITLES = ["data", "steps", "epochs", "hours", "tokens per round", "best"]
POINTS = 4  # of each run in the table; the picture has all


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a run has logged.

    Args:
        folder (`pathlib.Path`): of a training run, or one of its checkpoints.

    Returns:
        `list[dict]`: the log of the latest `trainer_state.json` in it.

    Raises:
        ValueError: if there is none.
    """
    files = [*folder.glob(STATE), *folder.glob(f"checkpoint-*/{STATE}"), *folder.glob(f"*/checkpoint-*/{STATE}")]
    states = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if not states:
        raise ValueError(f"`runs` must be folders of training runs, got {str(folder)!r}, which holds no {STATE}.")
    history: list[dict[str, Any]] = max(states, key=lambda state: state["global_step"])["log_history"]
    return history


def points_of(label: str, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a run's evaluations.

    Args:
        label (`str`): what tells the run from the others.
        history (`list[dict]`): the trainer's `log_history`.

    Returns:
        `list[dict]`: `run`, `step`, `epoch`, `hours` of training steps up to there (`None` if steps were not timed) and
            `tokens_per_round`, by step.

    Raises:
        ValueError: if held-out prompts were never decoded.
    """
    points: list[dict[str, Any]] = []
    seconds, last = 0.0, 0
    is_timed = False
    for entry in history:
        if "seconds_per_step" in entry and "loss" in entry:
            seconds += entry["seconds_per_step"] * (entry["step"] - last)
            last, is_timed = entry["step"], True
        if RATE in entry:
            hours = seconds / 3600 if is_timed else None
            place = {"run": label, "step": entry["step"], "epoch": entry.get("epoch"), "hours": hours}
            points.append(place | {"tokens_per_round": entry[RATE]})
    if not points:
        raise ValueError(f"`runs` must have decoded held-out prompts, got none in {label!r}. Train with --eval-prompts.")
    return points


def growth_table(points: list[dict[str, Any]]) -> str:
    """Return a few evaluations of each run as a Markdown table, its last and its best among them."""
    rows = []
    for label in dict.fromkeys(point["run"] for point in points):
        own = [point for point in points if point["run"] == label]
        best = max(own, key=lambda point: point["tokens_per_round"])
        chosen = {round(i * (len(own) - 1) / max(POINTS - 1, 1)) for i in range(POINTS)} | {own.index(best)}
        for index in sorted(chosen):
            point = own[index]
            rows.append(
                [
                    label,
                    f"{point['step']:,}",
                    "" if point["epoch"] is None else f"{point['epoch']:.1f}",
                    "" if point["hours"] is None else f"{point['hours']:.2f}",
                    f"{point['tokens_per_round']:.2f}",
                    "best" if point is best else "",
                ]
            )
    return markdown(TITLES, rows)


def main(
    output: Annotated[Path, typer.Argument(help="folder for growth.json, growth.md and growth.png")],
    runs: Annotated[list[str], typer.Argument(help="LABEL=FOLDER of each training run, the least data first")],
) -> None:
    """Show how tokens per round grow over training runs with different amounts of data."""
    named = [run.partition("=") for run in runs]
    for label, _, folder in named:
        if not label or not folder:
            raise typer.BadParameter(f"`runs` must be LABEL=FOLDER, got {label!r}.")
    points = [point for label, _, folder in named for point in points_of(label, history_of(Path(folder)))]
    write_record(output / "growth.json", {"points": points})
    write_text(output / "growth.md", growth_table(points) + "\n")
    save(plot_growth(points), output / "growth.png")
    typer.echo(growth_table(points))


if __name__ == "__main__":
    typer.run(main)

"""Pictures of a training run: the loss, tokens per round over the steps, and acceptance per position before and after."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from hf_specdiff.core.files import write_whole


def plot_run(history: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what a trainer has logged.

    Args:
        history (`list[dict]`): `trainer.state.log_history`.
        folder (`pathlib.Path`): gets `curves.png` and, if held-out prompts were decoded, `acceptance.png`.

    Returns:
        `list[pathlib.Path]`: the files.
    """
    files = [_plot_curves(history, folder / "curves.png")]
    evaluations = [entry for entry in history if "eval_tokens_per_round" in entry]
    if evaluations:
        best = max(evaluations, key=lambda entry: entry["eval_tokens_per_round"])
        files.append(_plot_acceptance(evaluations[0], best, folder / "acceptance.png"))
    return files


def acceptance_of(evaluation: dict[str, Any]) -> list[float]:
    """Return acceptance per position from an entry of the log."""
    names = [name for name in evaluation if name.startswith("eval_acceptance_")]
    return [evaluation[name] for name in sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))]


def _plot_curves(history: list[dict[str, Any]], path: Path) -> Path:
    figure, (losses, rates) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label)
    points = [(entry["step"], entry["eval_tokens_per_round"]) for entry in history if "eval_tokens_per_round" in entry]
    if points:
        rates.plot(*zip(*points, strict=True), marker="o")
    losses.set(xlabel="step", ylabel="loss")
    rates.set(xlabel="step", ylabel="tokens per round", title="held-out prompts, greedy chains")
    if losses.lines:
        losses.legend()
    return _save(figure, path)


def _plot_acceptance(first: dict[str, Any], best: dict[str, Any], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for entry, label in ((first, f"step {first['step']}"), (best, f"step {best['step']} (best)")):
        shares = acceptance_of(entry)
        axis.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axis.set(xlabel="drafted position", ylabel="accepted up to here", ylim=(0, 1))
    axis.legend()
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    write_whole(path, partial(figure.savefig, dpi=120, format="png"))
    plt.close(figure)
    return path

"""The papers' experiment as tables and a picture, beside what the papers report. Measures nothing."""

from typing import Any

from matplotlib.figure import Figure

from hf_specdiff.benchmarks.plots import plt
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import times

UNALIGNED = "unaligned"
CENTRE = {"gamma": 16, "num_denoising_steps": 1, "num_drafts": 0, "draft_temperature": 0.0}
# What arXiv:2511.00606 reports of its parts, with targets of 13 to 72 billion weights; read in digests of the paper, not in it.
PAPER = {
    "unaligned": "1",
    "+ streak": "about 1.3x aligned, 1.4x to 1.5x with self-selection",
}


def find(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """Return the row that has these values, and those of `CENTRE` for all others; `None` if it was not decoded."""
    wanted = {**CENTRE, **fields}
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def cell(row: dict[str, Any] | None) -> str:
    """Return tokens per round with its interval."""
    return "" if row is None else f"{row['tokens_per_round']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def best_samples(rows: list[dict[str, Any]], drafter: str, temperature: float) -> dict[str, Any] | None:
    """Return the setting of joint samples with the most tokens per round, of those of 16 tokens."""
    own = [row for row in rows if (row["drafter"], row["temperature"], row["gamma"]) == (drafter, temperature, CENTRE["gamma"])]
    return max((row for row in own if row["num_drafts"]), key=lambda row: row["tokens_per_round"], default=None)


def papers_tables(record: dict[str, Any]) -> str:
    """Return what was decoded, as Markdown.

    Args:
        record (`dict`): of `benchmarks.specdiff_papers`.

    Returns:
        `str`: several tables.
    """
    conditions, rows = record["conditions"], record["rows"]
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    drafter, target = (conditions["parameters"][name] / 1e6 for name in ("drafter", "target"))
    lines = [
        f"A masked diffusion language model of {drafter:.1f} million weights ({conditions['num_layers']} layers of Qwen2, rows "
        f"shifted) for the bundled target of {target:.1f} million: {conditions['language_model_steps']:,} steps of "
        f"{conditions['batch_size']} texts as a language model, then {conditions['alignment_steps']:,} steps of "
        f"{conditions['batch_size']} texts of {conditions['num_anchors']} windows for each objective and each of "
        f"{conditions['num_seeds']} seeds.",
        f"Decoded are {conditions['num_prompts']} held-out word problems, {conditions['num_tokens']} tokens each, by the real "
        f"loop: {conditions['num_settings']} of {conditions['num_settings_planned']} settings so far.",
        "Tokens per round, with 95 % intervals over prompts and seeds; written by",
        f"`{conditions['command']}` ([`specdiff_papers.json`](../benchmarks/results/specdiff_papers.json)).",
        "",
        _alignment(rows, drafters),
        "",
        _samples(rows, drafters[-1]),
        "",
        _chains(rows, drafters),
    ]
    if record["speed"]:
        lines += ["", _speed(record["speed"])]
    return "\n".join([*lines, "", "![Tokens per round, K and draft temperature](../benchmarks/results/specdiff_papers.png)"])


def _alignment(rows: list[dict[str, Any]], drafters: list[str]) -> str:
    """Return what each objective brings, at both temperatures of the target."""
    titles = ["drafter", "likeliest tokens, T = 0", "best K, T = 0", "likeliest tokens, T = 1", "best K, T = 1"]
    lines = []
    base = best_samples(rows, UNALIGNED, 0.0)
    for name in drafters:
        best = [best_samples(rows, name, heat) for heat in (0.0, 1.0)]
        chains = [find(rows, drafter=name, temperature=heat) for heat in (0.0, 1.0)]
        gain = "" if base is None or best[0] is None else f"{best[0]['tokens_per_round'] / base['tokens_per_round']:.2f}x"
        lines.append([name, cell(chains[0]), cell(best[0]), cell(chains[1]), cell(best[1]), gain, PAPER.get(name, "")])
    return markdown([*titles, "to unaligned, best K, T = 0", "SpecDiff-2"], lines)


def _samples(rows: list[dict[str, Any]], name: str) -> str:
    """Return self-selection among K joint samples, by the temperature that they are drawn at."""
    own = [row for row in rows if row["drafter"] == name and row["num_drafts"] and row["gamma"] == CENTRE["gamma"]]
    counts, heats = (sorted({row[key] for row in own}) for key in ("num_drafts", "draft_temperature"))
    lines = []
    for temperature, count in ((temperature, count) for temperature in (0.0, 1.0) for count in counts):
        found = [find(own, temperature=temperature, num_drafts=count, draft_temperature=heat, drafter=name) for heat in heats]
        lines.append([f"{temperature:g}", str(count), *map(cell, found)])
    titles = ["T", f"K, drafter {name}", *(f"draft temperature {heat:g}" for heat in heats)]
    note = "SpecDiff-2 reports about +15 % from self-selection, +20 % at K = 8, most of it from hot drafts (2)."
    return f"{markdown(titles, lines)}\n\n{note}"


def _chains(rows: list[dict[str, Any]], drafters: list[str]) -> str:
    """Return what more denoising steps and longer drafts bring."""
    columns: dict[str, dict[str, Any]] = {"16 tokens, 1 step": {}}
    columns |= {f"{steps} steps": {"num_denoising_steps": steps} for steps in (2, 4)}
    columns |= {f"{gamma} tokens": {"gamma": gamma} for gamma in (8, 32)}
    hot = {"num_drafts": 8, "draft_temperature": 2.0}
    columns |= {f"{gamma} tokens, K = 8": {"gamma": gamma, **hot} for gamma in (8, 16, 32)}
    lines = []
    for temperature, name in ((temperature, name) for temperature in (0.0, 1.0) for name in drafters):
        found = [find(rows, drafter=name, temperature=temperature, **fields) for fields in columns.values()]
        lines.append([f"{temperature:g}", name, *map(cell, found)])
    note = "The papers report that more steps cost in proportion and bring little, and that drafts can be too long."
    return f"{markdown(['T', 'drafter', *columns], lines)}\n\n{note}"


def _speed(rows: list[dict[str, Any]]) -> str:
    lines = [
        [f"{row['temperature']:g}", row["method"], times(row["ratio_to_plain"], row["ratio_low"], row["ratio_high"])]
        for row in rows
        if "refusal" not in row
    ]
    return markdown(["T", "method", "speed to plain `generate` (95 %)"], lines)


def plot_papers(record: dict[str, Any]) -> Figure:
    """Draw the drafters side by side, and one of them over K for each draft temperature.

    Args:
        record (`dict`): of `benchmarks.specdiff_papers`.
    """
    rows = record["rows"]
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for shift, temperature in ((-0.2, 0.0), (0.2, 1.0)):
        found = [(i, best_samples(rows, name, temperature)) for i, name in enumerate(drafters)]
        bars = [(i + shift, row) for i, row in found if row is not None]
        values = [row["tokens_per_round"] for _, row in bars]
        lows, highs = ([row[name] for _, row in bars] for name in ("low", "high"))
        below = [value - low for value, low in zip(values, lows, strict=True)]
        errors = [below, [high - value for value, high in zip(values, highs, strict=True)]]
        left.bar([place for place, _ in bars], values, 0.38, yerr=errors, label=f"T = {temperature:g}")
    left.set_xticks(range(len(drafters)), drafters, fontsize=8)
    left.set(ylabel="tokens per round, best K", ylim=(1, None))
    own = [row for row in rows if row["drafter"] == drafters[-1] and row["num_drafts"] and row["gamma"] == CENTRE["gamma"]]
    for temperature, style in ((0.0, "-"), (1.0, "--")):
        for heat in sorted({row["draft_temperature"] for row in own}):
            line = sorted(
                (row["num_drafts"], row["tokens_per_round"])
                for row in own
                if (row["temperature"], row["draft_temperature"]) == (temperature, heat)
            )
            if line:
                right.plot(*zip(*line, strict=True), style, marker=".", label=f"T = {temperature:g}, drafts at {heat:g}")
    right.set(xlabel=f"K, drafter {drafters[-1]}", ylabel="tokens per round")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure

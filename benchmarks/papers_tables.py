"""The papers' experiment as tables and a picture, beside what the papers report. Measures nothing."""

import math
from typing import Any

from matplotlib.figure import Figure

from hf_specdiff.benchmarks.plots import plt
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import times

UNALIGNED = "unaligned"
ENTROPY, STREAK = "+ CE", "+ streak"
CENTRE = {"gamma": 16, "num_denoising_steps": 1, "num_drafts": 0, "draft_temperature": 0.0}
TEMPERATURES = (0.0, 1.0)
# A gain of less than this is "little".
LITTLE = 0.05
# What arXiv:2511.00606 and arXiv:2408.05636 report, with targets of 13 to 72 billion weights; read in digests of the papers,
# not in them. The last word: whether it is a gain, or none to speak of.
PAPER = (
    ("streak-distillation, to unaligned: likeliest tokens", "about 1.3x", "gain"),
    ("streak-distillation, to unaligned: a joint sample", "about 1.3x", "gain"),
    ("streak instead of cross-entropy: likeliest tokens", "about 1.5x: without the product 35 % slower", "gain"),
    ("streak instead of cross-entropy: best K", "about 1.5x: without the product 35 % slower", "gain"),
    ("self-selection among 8 joint samples, to 1", "about 1.15x, up to 1.2x", "gain"),
    ("streak and self-selection, to unaligned: likeliest tokens", "1.4x to 1.5x", "gain"),
    ("4 denoising steps, to 1", "little", "none"),
)


def find(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """Return the row that has these values, and those of `CENTRE` for all others; `None` if it was not decoded."""
    wanted = {**CENTRE, **fields}
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


def best_samples(
    rows: list[dict[str, Any]], drafter: str, temperature: float, num_drafts: int | None = None
) -> dict[str, Any] | None:
    """Return the setting of K joint samples with the most tokens per round, of those of 16 tokens; of any K by default."""
    own = [row for row in rows if (row["drafter"], row["temperature"], row["gamma"]) == (drafter, temperature, CENTRE["gamma"])]
    found = [row for row in own if row["num_drafts"] and num_drafts in (None, row["num_drafts"])]
    return max(found, key=lambda row: row["tokens_per_round"], default=None)


def cell(row: dict[str, Any] | None) -> str:
    """Return tokens per round with its interval."""
    return "" if row is None else f"{row['tokens_per_round']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def gain(row: dict[str, Any] | None, base: dict[str, Any] | None) -> tuple[float, float, float] | None:
    """Return how many times one row's tokens per round are another's, with an interval as if the two were independent."""
    if row is None or base is None:
        return None
    value = row["tokens_per_round"] / base["tokens_per_round"]
    spread = math.hypot(*((one["high"] - one["low"]) / 2 / one["tokens_per_round"] for one in (row, base)))
    return value, value * math.exp(-spread), value * math.exp(spread)


def papers_tables(record: dict[str, Any]) -> str:
    """Return what was decoded, as Markdown.

    Args:
        record (`dict`): of `benchmarks.specdiff_papers`.

    Returns:
        `str`: several tables, each without the columns of which nothing was decoded.
    """
    rows = record["rows"]
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    parts = [_conditions(record), _beside_the_papers(rows), _alignment(rows, drafters), _samples(rows, drafters[-1])]
    parts += [_steps(rows, drafters), _lengths(rows, drafters)]
    parts += [_speed(record["speed"])] if record["speed"] else []
    picture = "![Tokens per round, K and draft temperature](../benchmarks/results/specdiff_papers.png)"
    return "\n\n".join([part for part in parts if part] + [picture])


def longer_tables(record: dict[str, Any]) -> str:
    """Return what a longer alignment brings, as Markdown: whatever of `papers_tables` compares drafters.

    Args:
        record (`dict`): of `benchmarks.specdiff_papers`, with fewer objectives, seeds or settings.

    Returns:
        `str`: a paragraph and a table.
    """
    conditions, rows = record["conditions"], record["rows"]
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    lines = [
        f"The same language model aligned for {conditions['alignment_steps']:,} steps, {', '.join(conditions['objectives'])} "
        f"alone, {conditions['num_seeds']} seed; {conditions['num_settings']} settings were decoded. Written by",
        f"`{conditions['command']}` ([`specdiff_papers_longer.json`](../benchmarks/results/specdiff_papers_longer.json)).",
    ]
    return "\n".join(lines) + "\n\n" + _alignment(rows, drafters)


def _conditions(record: dict[str, Any]) -> str:
    """Return how large the experiment was, and whether the text stayed right."""
    conditions, rows = record["conditions"], record["rows"]
    drafter, target = (conditions["parameters"][name] / 1e6 for name in ("drafter", "target"))
    greedy = [row for row in rows if "num_identical" in row]
    identical, total = (sum(row[name] for row in greedy) for name in ("num_identical", "num_prompts"))
    num_batches = -(-conditions["num_prompts"] // conditions["prompts_together"])
    lines = [
        f"A masked diffusion language model of {drafter:.1f} million weights ({conditions['num_layers']} layers of Qwen2, rows "
        f"shifted) for the bundled target of {target:.1f} million: {conditions['language_model_steps']:,} steps of "
        f"{conditions['batch_size']} texts as a language model, then {conditions['alignment_steps']:,} steps of "
        f"{conditions['batch_size']} texts of {conditions['num_anchors']} windows for each objective and each of "
        f"{conditions['num_seeds']} seeds; {conditions['num_texts']:,} texts of at most {conditions['max_length']} tokens for "
        "either. (SpecDiff-2 aligns models of 7 billion weights for 30,000 to 60,000 steps.)",
        f"Decoded are {conditions['num_prompts']} held-out word problems, {conditions['num_tokens']} tokens each, by the real "
        f"loop, in {conditions['num_settings']} settings of {conditions['num_settings_planned']} that the command has. At "
        f"temperature 0 {identical} of {total} texts are plain `generate`'s, token by token.",
        f"Tokens per round, with 95 % intervals (resampled: {num_batches} batches of prompts for each seed); written by",
        f"`{conditions['command']}` ([`specdiff_papers.json`](../benchmarks/results/specdiff_papers.json)).",
    ]
    return "\n".join(lines)


def _beside_the_papers(rows: list[dict[str, Any]]) -> str:
    """Return what the papers report, and whether it goes the same way here."""
    lines = []
    measured = zip(*(_pairs(rows, temperature) for temperature in TEMPERATURES), strict=True)
    for (what, theirs, kind), pairs in zip(PAPER, measured, strict=True):
        found = [gain(*pair) for pair in pairs]
        if any(found):
            verdicts = [_verdict(one, kind) for one in found]
            lines.append([what, theirs, *("" if one is None else times(*one) for one in found), ", ".join(verdicts)])
    titles = ["tokens per round", "SpecDiff-2, speed", "here, T = 0", "here, T = 1", "the same way?"]
    note = "Of joint samples the best draft temperature counts. Intervals take the two settings as independent."
    return f"{markdown(titles, lines)}\n\n{note}" if lines else ""


def _pairs(rows: list[dict[str, Any]], temperature: float) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Return what is compared for each of `PAPER`, and with what, at a temperature of the target."""

    def likeliest(name: str, **fields: Any) -> dict[str, Any] | None:
        return find(rows, drafter=name, temperature=temperature, **fields)

    def samples(name: str, num_drafts: int | None = None) -> dict[str, Any] | None:
        return best_samples(rows, name, temperature, num_drafts)

    return [
        (likeliest(STREAK), likeliest(UNALIGNED)),
        (samples(STREAK, 1), samples(UNALIGNED, 1)),
        (likeliest(STREAK), likeliest(ENTROPY)),
        (samples(STREAK), samples(ENTROPY)),
        (samples(STREAK, 8), samples(STREAK, 1)),
        (samples(STREAK), likeliest(UNALIGNED)),
        (likeliest(STREAK, num_denoising_steps=4), likeliest(STREAK)),
    ]


def _verdict(found: tuple[float, float, float] | None, kind: str) -> str:
    """Return whether an interval agrees with a gain, or with none to speak of."""
    if found is None:
        return "not decoded"
    value, low, high = found
    if kind == "none":
        return "yes" if abs(value - 1) < LITTLE else "not told apart" if low < 1 < high else "no"
    return "yes" if low > 1 else "no" if high < 1 else "not told apart"


def _alignment(rows: list[dict[str, Any]], drafters: list[str]) -> str:
    """Return what each objective brings with each number of joint samples, at both temperatures of the target."""
    counts = sorted({row["num_drafts"] for row in rows if row["num_drafts"] and row["gamma"] == CENTRE["gamma"]})
    lines = []
    for temperature, name in ((temperature, name) for temperature in TEMPERATURES for name in drafters):
        found = [find(rows, drafter=name, temperature=temperature)]
        found += [best_samples(rows, name, temperature, count) for count in counts]
        ratio = gain(*(best_samples(rows, one, temperature) for one in (name, UNALIGNED)))
        aligned = "" if ratio is None or name == UNALIGNED else times(*ratio)
        lines.append([f"{temperature:g}", name, *map(cell, found), aligned])
    return markdown(["T", "drafter", "likeliest tokens", *(f"K = {count}" for count in counts), "best K, to unaligned"], lines)


def _samples(rows: list[dict[str, Any]], name: str) -> str:
    """Return self-selection among K joint samples, by the temperature that they are drawn at."""
    own = [row for row in rows if row["drafter"] == name and row["num_drafts"] and row["gamma"] == CENTRE["gamma"]]
    counts, heats = (sorted({row[key] for row in own}) for key in ("num_drafts", "draft_temperature"))
    lines = []
    for temperature, count in ((temperature, count) for temperature in TEMPERATURES for count in counts):
        found = [find(own, temperature=temperature, num_drafts=count, draft_temperature=heat, drafter=name) for heat in heats]
        lines.append([f"{temperature:g}", str(count), *map(cell, found)])
    if len(own) <= 4:  # the table before holds them all
        return ""
    titles = ["T", f"K, drafter {name}", *(f"draft temperature {heat:g}" for heat in heats)]
    return f"{markdown(titles, lines)}\n\nSpecDiff-2 finds that more samples help only if they are drawn hot: at 2 with K = 8."


def _steps(rows: list[dict[str, Any]], drafters: list[str]) -> str:
    """Return what more denoising steps bring."""
    columns = {f"{steps} step{'s' if steps > 1 else ''}": {"num_denoising_steps": steps} for steps in (1, 2, 4)}
    note = "The papers report that more steps cost in proportion, a pass of the drafter each, and bring little."
    return _table(rows, drafters, columns, note)


def _lengths(rows: list[dict[str, Any]], drafters: list[str]) -> str:
    """Return what longer drafts bring."""
    hot: dict[str, Any] = {"num_drafts": 8, "draft_temperature": 2.0}
    columns = {f"{gamma} tokens": {"gamma": gamma} for gamma in (8, 16, 32)}
    columns |= {f"{gamma} tokens, K = 8": {"gamma": gamma, **hot} for gamma in (8, 16, 32)}
    return _table(rows, drafters, columns, "SpecDiff-2 drafts 16 or 32 tokens, and reports that drafts can be too long to pay.")


def _table(rows: list[dict[str, Any]], drafters: list[str], columns: dict[str, dict[str, Any]], note: str) -> str:
    """Return a row for each drafter and temperature, with the columns that were decoded; nothing where none can be compared."""
    pairs = [(temperature, name) for temperature in TEMPERATURES for name in drafters]
    found = {
        title: [find(rows, drafter=name, temperature=temperature, **fields) for temperature, name in pairs]
        for title, fields in columns.items()
    }
    found = {title: cells for title, cells in found.items() if any(cells)}
    varied = {(columns[title].get("gamma"), columns[title].get("num_denoising_steps")) for title in found}
    if len(varied) < 2:
        return ""
    lines = [[f"{pair[0]:g}", pair[1], *(cell(cells[i]) for cells in found.values())] for i, pair in enumerate(pairs)]
    return f"{markdown(['T', 'drafter', *found], lines)}\n\n{note}"


def _speed(rows: list[dict[str, Any]]) -> str:
    """Return the speed of whole calls, timed one prompt at a time on an idle machine."""
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
    for shift, temperature in zip((-0.2, 0.2), TEMPERATURES, strict=True):
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

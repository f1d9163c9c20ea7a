"""A pair made and measured on one GPU in bfloat16: `python -m benchmarks.gpu FOLDER`.

A target of 110 million parameters learns the bundled corpus and continues the recipe's prompts, and a feature-conditioned
drafter learns from these texts with D-PACE weights: eight minutes, and what loading takes. Then the pair goes through what
`hf-specdiff bench --compile` does, on the bundled prompts, greedily and at temperature 1, alone and in batches, which takes
longer.
Finished stages are skipped and an interrupted one goes on, so the same command may be given again. `FOLDER/gpu.json` is what
belongs under `benchmarks/results`.

In bfloat16 two logits can be so close that the shape of a pass decides which is larger. A greedy output may then differ from
plain `generate`'s without anything being wrong: every row counts those that do not (`num_identical`).
"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from transformers import AutoTokenizer

from benchmarks.pair import DRAFTER
from benchmarks.pair import FULL
from benchmarks.pair import TARGET
from benchmarks.pair import TEXT
from benchmarks.pair import TINY
from benchmarks.pair import WHOLE
from benchmarks.pair import Job
from benchmarks.pair import load
from benchmarks.pair import make_pair
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import BATCH_SIZE
from hf_specdiff.benchmarks.standard import Extent
from hf_specdiff.benchmarks.standard import benchmark
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.demo.bundle import PROMPT_SETS
from hf_specdiff.demo.bundle import load_prompts

# Of a dry run: every path is walked, nothing is learnt.
DRY_MINUTES, DRY_PROMPTS = 0.02, 2


def find_device(*, is_dry_run: bool) -> torch.device:
    """Return the GPU; for a dry run the CPU where there is none.

    Args:
        is_dry_run (`bool`): whether a CPU is enough.

    Returns:
        `torch.device`: where everything runs.

    Raises:
        ValueError: if there is no GPU that computes in bfloat16, or there are several.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and is_dry_run:
        return torch.device("cpu")
    if count == 0:
        raise ValueError("`device` must be a CUDA GPU, got none. Pass --dry-run to walk through all of it on a CPU.")
    if count > 1:
        raise ValueError(f"`device` must be one GPU, got {count}. Set CUDA_VISIBLE_DEVICES to one of them.")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"`device` must compute in bfloat16, got {torch.cuda.get_device_name()}. Take a newer GPU.")
    return torch.device("cuda", 0)


def measure(job: Job, num_prompts: int, command: str) -> dict[str, Any]:
    """Put the pair through the benchmark and write `gpu.json`.

    Args:
        job (`Job`): whose pair is finished.
        num_prompts (`int`): of each bundled set.
        command (`str`): what was typed, without this machine's folders.

    Returns:
        `dict`: what is in `gpu.json`: what `benchmark` returns, and `pair` (how large, how long it took to make).
    """
    tokenizer = AutoTokenizer.from_pretrained(job.output / TARGET, padding_side="left")
    models = Models(load(job, TARGET), tokenizer, {DRAFTER: load(job, DRAFTER)})
    texts = {name: [str(record["prompt"]) for record in load_prompts(name)[:num_prompts]] for name in PROMPT_SETS}
    extent = Extent(texts, job.size.max_new_tokens, batch_sizes=(1, BATCH_SIZE), compiles=True)
    names = {"target": TARGET, "drafters": [DRAFTER], "assistant": None}
    record = benchmark(models, extent, job.output / "bench", names, command)
    record["pair"] = {
        "target_parameters": models.target.num_parameters(),
        "drafter_parameters": models.drafters[DRAFTER].num_parameters(),
        "target_steps": job.settled(TARGET),
        "drafter_steps": job.settled(DRAFTER),
        "batch_size": job.size.batch_size,
        "seconds": {stage: job.seconds(stage) for stage in (TARGET, TEXT, DRAFTER, WHOLE)},
    }
    write_record(job.output / "gpu.json", record)
    return record


def share_identical(rows: list[dict[str, Any]]) -> float:
    """Return the share of greedy outputs, those of plain `generate` left out, that are its outputs."""
    greedy = [row for row in rows if row["temperature"] == 0 and row["method"] != PLAIN and "refusal" not in row]
    return sum(row["num_identical"] for row in greedy) / sum(row["num_prompts"] for row in greedy)


def bench_command(output: Path) -> str:
    """Return what measures the pair once more, without the making."""
    folders = " ".join(shlex.quote(str(output / name)) for name in (TARGET, DRAFTER))
    return (
        f"hf-specdiff bench {folders} --dtype bfloat16 --compile --batch-size 1 --batch-size {BATCH_SIZE} "
        f"--output {shlex.quote(str(output / 'again'))}"
    )


def main(
    output: Annotated[Path, typer.Argument(help="folder for the pair and the figures; an earlier run's goes on")],
    target_minutes: Annotated[float, typer.Option(min=0.01, help="to train the target")] = 3.5,
    text_minutes: Annotated[float, typer.Option(min=0.01, help="for it to continue prompts")] = 1.0,
    drafter_minutes: Annotated[float, typer.Option(min=0.01, help="to train the drafter")] = 3.5,
    num_prompts: Annotated[int, typer.Option(min=1, help="of each bundled set, to measure with")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny models and seconds, on a CPU too; for no figures")] = False,
) -> None:
    """Make a pair on a GPU and measure it."""
    device = find_device(is_dry_run=dry_run)
    minutes = {TARGET: target_minutes, TEXT: text_minutes, DRAFTER: drafter_minutes}
    command = "python -m benchmarks.gpu FOLDER"
    if dry_run:
        minutes, num_prompts, command = dict.fromkeys(minutes, DRY_MINUTES), DRY_PROMPTS, f"{command} --dry-run"
    else:
        command += "".join(f" --{stage}-minutes {value:g}" for stage, value in minutes.items())
        command += f" --num-prompts {num_prompts}"
    size = TINY if dry_run else FULL
    transformers.logging.set_verbosity_error()
    job = Job(output, Journal(output, {"size": asdict(size), "minutes": minutes}), size, minutes, device)
    make_pair(job)
    record = measure(job, num_prompts, command)
    pair, num_near_ties = record["pair"], sum(row.get("num_near_ties", 0) for row in record["rows"])
    typer.echo(speed_table(record["rows"]))
    typer.echo(
        f"\nA target of {pair['target_parameters'] / 1e6:.1f}M and a drafter of {pair['drafter_parameters'] / 1e6:.1f}M "
        f"parameters, made in {pair['seconds'][WHOLE] / 60:.1f} minutes.\n"
        f"Of all greedy outputs {100 * share_identical(record['rows']):.1f} % are plain generate's; {num_near_ties} "
        f"of the others part at near ties.\nThe figures are in {output / 'gpu.json'}. The pair can be measured again by\n"
        f"  {bench_command(output)}"
    )


if __name__ == "__main__":
    typer.run(main)

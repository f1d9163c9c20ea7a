"""`hf-specdiff bench`: from words to an `Extent` or a `Plan`, and the pictures of what comes of it."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from typing import TypeVar

import typer
from rich.console import Console

from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.standard import Extent
from hf_specdiff.benchmarks.standard import benchmark
from hf_specdiff.benchmarks.standard import bundled_models
from hf_specdiff.benchmarks.standard import prompt_sets
from hf_specdiff.benchmarks.tables import GAIN_TITLES
from hf_specdiff.benchmarks.tables import SPEED_TITLES
from hf_specdiff.benchmarks.tables import gain_cells
from hf_specdiff.benchmarks.tables import speed_cells
from hf_specdiff.benchmarks.tables import terminal_table
from hf_specdiff.benchmarks.time_budget import HEADLINE
from hf_specdiff.benchmarks.time_budget import Plan
from hf_specdiff.benchmarks.time_budget import benchmark_time_budget
from hf_specdiff.benchmarks.time_budget import gains
from hf_specdiff.benchmarks.time_budget import scaling_methods
from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.demo.bundle import MAX_NEW_TOKENS

DEFAULT_NEW_TOKENS = 128
T = TypeVar("T")


def bench_command(
    output: Annotated[Path, typer.Option(help="folder of figures and pictures; the same command resumes an interrupted run")],
    target: Annotated[str | None, typer.Argument(help="a folder or a Hub repository; by default the bundled pair")] = None,
    drafters: Annotated[list[str] | None, typer.Argument(help="its drafters: folders or Hub repositories")] = None,
    assistant: Annotated[str | None, typer.Option(help="an autoregressive assistant to compare with")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file or JSON lines; by default the bundled prompts")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="of each set")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=2)] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="0: greedy; several times; by default 0 and 1")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="several times; by default 1")] = None,
    method: Annotated[list[str] | None, typer.Option(help="only methods whose name holds this; several times")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
    time_budget: Annotated[bool, typer.Option("--time-budget", help="right answers within a wall-clock time instead")] = False,
    budget: Annotated[float | None, typer.Option(help="with --time-budget: the seconds at which gains are stated")] = None,
) -> None:
    """Lay plain generate, transformers' own speculation and ours side by side; or, with --time-budget, what speed is worth."""
    is_bundled = target is None
    if is_bundled and (dtype, device_map) != ("float32", "auto"):
        raise ValueError(
            f"`--dtype` and `--device-map` must come with a target, got {dtype} and {device_map} for the bundled pair."
        )
    if is_bundled and assistant is not None:
        raise ValueError(f"`--assistant` must come with a target, got {assistant!r} for the bundled pair, which has one.")
    if budget is not None and not time_budget:
        raise ValueError(f"`--budget` must come with `--time-budget`, got {budget} alone.")
    if time_budget and (prompts_file, temperature, batch_size, method, assistant) != (None,) * 5:
        raise ValueError(
            "`--time-budget` must stand without --prompts-file, --temperature, --batch-size, --method and --assistant, got one."
        )
    models = bundled_models() if target is None else _models_of(target, drafters or [], assistant, dtype, device_map)
    names = {"target": target, "drafters": drafters, "assistant": assistant}
    command = shlex.join(["hf-specdiff", *sys.argv[1:]])
    console = Console()
    if time_budget:
        methods = scaling_methods(("unaligned", "features") if is_bundled else list(models.drafters))
        headline = HEADLINE if budget is None else budget
        plan = Plan(methods, headline, num_problems=num_prompts, max_new_tokens=max_new_tokens or 256, seed=seed)
        record = benchmark_time_budget(models, plan, output, names, command)
        save(plot_accuracy(record["rows"]), output / "time_budget.png")
        console.print(terminal_table(GAIN_TITLES, [gain_cells(gain) for gain in gains(record["rows"], plan.headline)]))
    else:
        texts = prompt_sets(prompts_file, num_prompts)
        usual = MAX_NEW_TOKENS if prompts_file is None else dict.fromkeys(texts, DEFAULT_NEW_TOKENS)
        limits = {task: max_new_tokens or usual[task] for task in texts}
        extent = Extent(texts, limits, once(temperature or [0.0, 1.0]), once(batch_size or [1]), seed, once(method or []))
        record = benchmark(models, extent, output, names, command, is_standard=is_bundled and prompts_file is None)
        plot_all(record, output)
        for (task, heat, size), rows in itertools.groupby(record["rows"], lambda row: [row[name] for name in SPEED_TITLES[:3]]):
            cells = [speed_cells(row)[3:] for row in rows]
            console.print(terminal_table(SPEED_TITLES[3:], cells, title=f"{task}, temperature {heat:g}, batch {size}"))
    console.print(f"Figures and pictures are in {output}.", highlight=False)


def once(values: Sequence[T]) -> tuple[T, ...]:
    """Return values in their order without repetitions."""
    return tuple(dict.fromkeys(values))


def _models_of(target: str, drafters: list[str], assistant: str | None, dtype: str, device_map: str) -> Models:
    """Load a target and what drafts for it; drafters are called by the last part of their names."""
    if not drafters:
        raise ValueError("`drafters` must be given with a target, got none.")
    names = [Path(name).name for name in drafters]
    if len(set(names)) < len(names):
        raise ValueError(f"`drafters` must have different last parts of their names, got {', '.join(drafters)}.")
    settings = {"dtype": dtype, "device_map": device_map}
    model = load_model("target", target, **settings)
    loaded = {name: load_model("drafters", path, **settings) for name, path in zip(names, drafters, strict=True)}
    for name, drafter in loaded.items():
        if drafter.config.model_type != "specdiff":
            raise ValueError(
                f"`drafters` must be SpecDiffDrafters, got {type(drafter).__name__} in {name!r}. Pass other assistants as "
                "--assistant."
            )
    assistants = {}
    if assistant is not None:
        assistants["AR assistant"] = load_model("assistant", assistant, **settings)
    return Models(model, load_tokenizer("target", target), loaded, assistants)

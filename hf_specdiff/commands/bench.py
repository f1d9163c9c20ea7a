"""`hf-specdiff bench`: from words to an `Extent` or a `Plan`, and the pictures of what comes of it."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import TypeVar

import typer
from rich.console import Console

from hf_specdiff.benchmarks.data_sets import Questions
from hf_specdiff.benchmarks.data_sets import leave_out_long
from hf_specdiff.benchmarks.data_sets import read_questions
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.standard import Extent
from hf_specdiff.benchmarks.standard import benchmark
from hf_specdiff.benchmarks.standard import bundled_models
from hf_specdiff.benchmarks.standard import prompt_sets
from hf_specdiff.benchmarks.tables import COMPILED_TITLES
from hf_specdiff.benchmarks.tables import GAIN_TITLES
from hf_specdiff.benchmarks.tables import RIGHT_TITLE
from hf_specdiff.benchmarks.tables import SPEED_TITLES
from hf_specdiff.benchmarks.tables import compared_with_compiled
from hf_specdiff.benchmarks.tables import compiled_cells
from hf_specdiff.benchmarks.tables import gain_cells
from hf_specdiff.benchmarks.tables import right_cell
from hf_specdiff.benchmarks.tables import speed_cells
from hf_specdiff.benchmarks.tables import terminal_table
from hf_specdiff.benchmarks.time_budget import ANSWER
from hf_specdiff.benchmarks.time_budget import HEADLINE
from hf_specdiff.benchmarks.time_budget import STRATEGIES
from hf_specdiff.benchmarks.time_budget import Plan
from hf_specdiff.benchmarks.time_budget import benchmark_time_budget
from hf_specdiff.benchmarks.time_budget import gains
from hf_specdiff.benchmarks.time_budget import problems_of
from hf_specdiff.benchmarks.time_budget import scaling_methods
from hf_specdiff.commands.loading import is_python_name
from hf_specdiff.commands.loading import load_drafter
from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_own_drafter
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.demo.bundle import MAX_NEW_TOKENS
from hf_specdiff.training.prompts import as_turns

DEFAULT_NEW_TOKENS, DEFAULT_PROBLEM_TOKENS = 128, 256
T = TypeVar("T")


def bench_command(
    output: Annotated[Path, typer.Option(help="folder of figures and pictures; the same command resumes an interrupted run")],
    target: Annotated[str | None, typer.Argument(help="a folder or a Hub repository; by default the bundled pair")] = None,
    drafters: Annotated[list[str] | None, typer.Argument(help="its drafters: folders, Hub repositories, FILE.py:NAME")] = None,
    assistant: Annotated[str | None, typer.Option(help="an autoregressive assistant to compare with")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file or JSON lines; by default the bundled prompts")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="several times: gsm8k, humaneval, mbpp, math500 or spec-bench, from the Hub")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="with --prompts: a folder with NAME*.jsonl, in place of the Hub")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="leave texts as they are, also where there is a chat template")] = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="of each set, and of each category of spec-bench")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=2)] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="0: greedy; several times; by default 0 and 1")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="several times; by default 1")] = None,
    method: Annotated[list[str] | None, typer.Option(help="only methods whose name holds this; several times")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
    time_budget: Annotated[bool, typer.Option("--time-budget", help="right answers within a wall-clock time instead")] = False,
    one_answer: Annotated[
        bool, typer.Option("--one-answer", help="with --time-budget: greedy answers alone, no votes")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="plain generate and our chains and trees also compiled, over a static cache")
    ] = False,
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
    if one_answer and not time_budget:
        raise ValueError("`--one-answer` must come with `--time-budget`, got it alone.")
    if budget is not None and not time_budget:
        raise ValueError(f"`--budget` must come with `--time-budget`, got {budget} alone.")
    if prompts and prompts_file is not None:
        raise ValueError(
            f"`--prompts` must stand without `--prompts-file`, got {', '.join(prompts)} and {str(prompts_file)!r}."
        )
    if data is not None and not prompts:
        raise ValueError(f"`--data` must come with `--prompts`, got {str(data)!r} alone.")
    if time_budget and (compiled or (prompts_file, temperature, batch_size, method, assistant) != (None,) * 5):
        raise ValueError(
            "`--time-budget` must stand without --prompts-file, --temperature, --batch-size, --method, --assistant and "
            "--compile, got one."
        )
    limit = max_new_tokens or (DEFAULT_PROBLEM_TOKENS if time_budget else DEFAULT_NEW_TOKENS)
    sets = _read_sets(prompts or [], num_prompts, data)  # before anything is loaded: it may fail
    models = bundled_models() if target is None else _models_of(target, drafters or [], assistant, dtype, device_map)
    sets = {task: _as_asked(task, questions, models, limit, raw=raw) for task, questions in sets.items()}
    names = {"target": target, "drafters": drafters, "assistant": assistant}
    command, console = shlex.join(["hf-specdiff", *sys.argv[1:]]), Console()
    if time_budget:
        methods = scaling_methods(models, ("unaligned", "features") if is_bundled else list(models.drafters))
        plan = Plan(
            methods,
            HEADLINE if budget is None else budget,
            num_problems=num_prompts,
            max_new_tokens=limit,
            seed=seed,
            strategies=(ANSWER,) if one_answer else STRATEGIES,
            given=tuple(itertools.chain.from_iterable(problems_of(task, questions) for task, questions in sets.items())),
        )
        record = benchmark_time_budget(models, plan, output, names, command)
        save(plot_accuracy(record["rows"]), output / "time_budget.png")
        console.print(terminal_table(GAIN_TITLES, [gain_cells(gain) for gain in gains(record["rows"], plan.headline)]))
    else:
        usual = dict.fromkeys(sets, limit)
        if not prompts:
            others = prompt_sets(prompts_file, num_prompts)
            sets = {task: Questions(as_turns(texts, models.tokenizer, raw=raw)) for task, texts in others.items()}
            usual = MAX_NEW_TOKENS if prompts_file is None else dict.fromkeys(sets, limit)
        extent = Extent(
            {task: questions.prompts for task, questions in sets.items()},
            {task: max_new_tokens or usual[task] for task in sets},
            once(temperature or [0.0, 1.0]),
            once(batch_size or [1]),
            seed,
            once(method or []),
            {task: questions.answers for task, questions in sets.items() if questions.answers is not None},
            compiled,
        )
        is_standard = is_bundled and prompts_file is None and not prompts
        record = benchmark(models, extent, output, names, command, is_standard=is_standard)
        plot_all(record, output)
        _show(console, record["rows"])
    console.print(f"Figures and pictures are in {output}.", highlight=False)


def _read_sets(names: list[str], num_prompts: int, data: Path | None) -> dict[str, Questions]:
    """Read published sets by task; see `read_questions`."""
    return {task: found for name in once(names) for task, found in read_questions(name, num_prompts, data).items()}


def _as_asked(task: str, questions: Questions, models: Models, max_new_tokens: int, *, raw: bool) -> Questions:
    """Return a published set as the target will see it; prompts that it has no room for are left out, and counted aloud."""
    asked = replace(questions, prompts=as_turns(questions.prompts, models.tokenizer, raw=raw))
    room = getattr(models.target.config.get_text_config(), "max_position_embeddings", None)
    if room is None:
        return asked
    asked, num_long = leave_out_long(asked, models.tokenizer, room - max_new_tokens)
    if not asked.prompts:
        raise ValueError(
            f"`--prompts` must hold one that leaves {max_new_tokens} of the target's {room} positions, got none in {task!r}. "
            "Lower --max-new-tokens."
        )
    if num_long:
        typer.echo(f"{task}: {num_long} prompts are too long for the target's {room} positions, and left out.", err=True)
    return asked


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print a table for each task, temperature and batch size."""
    for (task, heat, size), group in itertools.groupby(rows, lambda row: [row[name] for name in SPEED_TITLES[:3]]):
        chosen = list(group)
        titles, cells = SPEED_TITLES[3:], [speed_cells(row)[3:] for row in chosen]
        if any(right_cell(row) for row in chosen):
            titles, cells = [*titles, RIGHT_TITLE], [[*own, right_cell(row)] for own, row in zip(cells, chosen, strict=True)]
        title = f"{task}, temperature {heat:g}, batch {size}"
        console.print(terminal_table(titles, cells, title=title))
        if beside := compared_with_compiled(chosen):
            cells = [compiled_cells(row)[3:] for row in beside]
            console.print(terminal_table(COMPILED_TITLES[3:], cells, title=f"{title}: compiled"))


def once(values: Sequence[T]) -> tuple[T, ...]:
    """Return values in their order without repetitions."""
    return tuple(dict.fromkeys(values))


def _models_of(target: str, drafters: list[str], assistant: str | None, dtype: str, device_map: str) -> Models:
    """Load a target and what drafts for it; drafters are called by the last part of their names."""
    if not drafters:
        raise ValueError("`drafters` must be given with a target, got none.")
    names = [name.rpartition(":")[2] if is_python_name(name) else Path(name).name for name in drafters]
    if len(set(names)) < len(names):
        raise ValueError(f"`drafters` must have different last parts of their names, got {', '.join(drafters)}.")
    settings = {"dtype": dtype, "device_map": device_map}
    model = load_model("target", target, **settings)
    loaded = {
        name: load_own_drafter(path, model) if is_python_name(path) else load_drafter(path, model, **settings)
        for name, path in zip(names, drafters, strict=True)
    }
    assistants = {}
    if assistant is not None:
        assistants["AR assistant"] = load_model("assistant", assistant, **settings)
    return Models(model, load_tokenizer("target", target), loaded, assistants)

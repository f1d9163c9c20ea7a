"""The command line: `hf-specdiff demo | generate | train | bench | doctor | publish`.

Turns words into calls and errors into one line; everything else lives in the modules it calls.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import TextStreamer
from transformers import logging

from hf_specdiff import doctor
from hf_specdiff import hub
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import Extent
from hf_specdiff.benchmarks.standard import benchmark
from hf_specdiff.benchmarks.standard import bundled_models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import SPEED_TITLES
from hf_specdiff.benchmarks.tables import speed_cells
from hf_specdiff.benchmarks.time_budget import GAIN_TITLES
from hf_specdiff.benchmarks.time_budget import HEADLINE
from hf_specdiff.benchmarks.time_budget import Plan
from hf_specdiff.benchmarks.time_budget import benchmark_time_budget
from hf_specdiff.benchmarks.time_budget import gain_cells
from hf_specdiff.benchmarks.time_budget import gains
from hf_specdiff.benchmarks.time_budget import scaling_methods
from hf_specdiff.demo.bundle import MAX_NEW_TOKENS
from hf_specdiff.demo.bundle import PROMPT_SETS
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.show import run_demo
from hf_specdiff.draft import SpeculationStats
from hf_specdiff.generate import generate
from hf_specdiff.repository import full_name
from hf_specdiff.training.data import Prompt
from hf_specdiff.training.data import encode
from hf_specdiff.training.data import processes
from hf_specdiff.training.data import read_prompts
from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.pipeline import TrainingPlan
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.trainer import spread_layers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, no_args_is_help=True)
INTERRUPTED = 130
DEFAULT_NEW_TOKENS = 128


@app.command("demo")
def demo_command(
    num_prompts: Annotated[int, typer.Option(help="held-out prompts of each set")] = 12,
) -> None:
    """Run the bundled pair: plain generate, an AR assistant and our drafters, on the same held-out prompts."""
    if not run_demo(num_prompts):
        raise typer.Exit(1)


@app.command("generate")
def generate_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    drafter: Annotated[str, typer.Argument(help="its drafter: a folder or a Hub repository")],
    prompt: Annotated[str | None, typer.Option(help="the prompt")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="a text file, one prompt a line, or JSON lines")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    do_sample: Annotated[bool, typer.Option("--sample/--greedy")] = False,
    temperature: Annotated[float | None, typer.Option(help="only with --sample")] = None,
    gamma: Annotated[str | None, typer.Option(help="tokens drafted per round, or auto")] = None,
    num_denoising_steps: Annotated[int | None, typer.Option(help="drafter passes per round")] = None,
    acceptance: Annotated[str | None, typer.Option(help="match, ratio, block, self_selection or auto")] = None,
    draft_shape: Annotated[str | None, typer.Option(help="chain, samples, tree or auto")] = None,
    num_drafts: Annotated[int | None, typer.Option(help="joint drafts of the shape samples")] = None,
    tree_budget: Annotated[str | None, typer.Option(help="nodes of a tree, or auto: as many as pay on this machine")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> None:
    """Generate from any target with its drafter, streaming, with the statistics at the end."""
    if (prompt is None) == (prompts_file is None):
        raise ValueError(
            "`--prompt` or `--prompts-file` must be given, one of them, got " + ("none." if prompt is None else "both.")
        )
    prompts: list[Prompt] = [prompt] if prompt is not None else read_prompts(prompts_file or Path())
    model = load_model("target", target, dtype=dtype, device_map=device_map)
    assistant = load_model("drafter", drafter, dtype=dtype, device_map=device_map)
    tokenizer = load_tokenizer("target", target)
    torch.manual_seed(seed)
    sampling = {} if temperature is None else {"temperature": temperature}
    all_stats = []
    for text in prompts:
        typer.echo(text if isinstance(text, str) else f"{text[-1]['content']}\n", nl=False)
        inputs = {"input_ids": torch.tensor([encode(tokenizer, text)], device=model.device)}
        result = generate(
            model,
            **inputs,
            assistant_model=assistant,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            gamma=number_or_word(gamma),
            num_denoising_steps=num_denoising_steps,
            acceptance=acceptance,
            draft_shape=draft_shape,
            num_drafts=num_drafts,
            tree_budget=number_or_word(tree_budget),
            return_dict_in_generate=True,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        typer.echo()
        all_stats.append(result.speculation)
    print_statistics(all_stats)


@app.command("train")
def train_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    prompts: Annotated[Path, typer.Option(help="a text file, one a line, or JSON lines with 'prompt', 'text' or 'messages'")],
    output: Annotated[Path, typer.Option(help="folder of the drafter; the same command resumes an interrupted run")],
    conditioning: Annotated[str, typer.Option(help="features or tokens")] = "features",
    num_target_layers: Annotated[int, typer.Option(help="target layers to read, for features")] = 5,
    mask_token_id: Annotated[int | None, typer.Option(help="by default the tokenizer's mask token")] = None,
    num_layers: Annotated[int, typer.Option(min=1)] = 3,
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    max_length: Annotated[int, typer.Option(min=4, help="tokens of a training sequence")] = 512,
    num_epochs: Annotated[float, typer.Option()] = 4,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    num_anchors: Annotated[int, typer.Option(min=1, help="windows of a sequence and step")] = 8,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    loss: Annotated[list[str] | None, typer.Option(help="objective:weight, several times; by default decayed_ce:1")] = None,
    context_weight: Annotated[float, typer.Option(help="of next-token prediction on the context, for tokens")] = 0.0,
    loss_decay: Annotated[float, typer.Option(help="positions after which a position's weight has fallen by e")] = 7.0,
    seed: Annotated[int, typer.Option()] = 0,
    save_steps: Annotated[int, typer.Option(min=1)] = 250,
    eval_prompts: Annotated[int, typer.Option(min=0, help="prompts kept out and decoded; a tenth of all at most")] = 32,
    regenerate_at: Annotated[float, typer.Option(min=0, help="temperature of the target's continuations; 0: greedy")] = 0.0,
    patience: Annotated[int, typer.Option(min=0, help="evaluations without a better one before stopping; 0: never stop")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16/--float32")] = True,
) -> None:
    """Train a drafter for a target on the target's own continuations of the prompts; Ctrl-C saves, the same command resumes."""
    if conditioning not in ("features", "tokens"):
        raise ValueError(f"`--conditioning` must be features or tokens, got {conditioning!r}.")
    texts = read_prompts(prompts)
    state = processes()
    # With several processes (accelerate launch) each has a target of its own beside its share of the drafter's work.
    device_map = "auto" if state.num_processes == 1 else {"": state.device}
    model = load_model("target", target, dtype="float32", device_map=device_map).eval()
    tokenizer = load_tokenizer("target", target)
    mask = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError(
            "`--mask-token-id` must be given where the tokenizer has no mask token, got none. Name an id never written."
        )
    num_available = model.config.get_text_config().num_hidden_layers
    plan = TrainingPlan(
        target_layer_ids=spread_layers(num_available, num_target_layers) if conditioning == "features" else None,
        num_layers=num_layers,
        block_size=block_size,
        max_length=max_length,
        num_epochs=num_epochs,
        batch_size=batch_size,
        num_anchors=num_anchors,
        learning_rate=learning_rate,
        loss_weights=read_loss_weights(loss) if loss else {"decayed_ce": 1.0},
        context_weight=context_weight,
        loss_decay=loss_decay,
        seed=seed,
        bf16=bf16,
        save_steps=save_steps,
        num_eval_prompts=eval_prompts,
        patience=patience,
        temperature=regenerate_at,
    )
    if not train_drafter(model, tokenizer, texts, output, plan, mask_token_id=mask):
        typer.echo(
            f"Interrupted; a checkpoint is in {output / 'work' / 'checkpoints'}. The same command goes on from it.", err=True
        )
        raise typer.Exit(INTERRUPTED)
    if state.is_main_process:
        typer.echo(f"The drafter is in {output}, with pictures of the run.")


@app.command("bench")
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
    names = {"target": target, "drafters": drafters, "assistant": assistant}
    is_bundled = target is None
    if is_bundled and (dtype, device_map) != ("float32", "auto"):
        raise ValueError(
            f"`--dtype` and `--device-map` must come with a target, got {dtype} and {device_map} for the bundled pair."
        )
    models = bundled_models() if target is None else _models_of(target, drafters or [], assistant, dtype, device_map)
    command = " ".join(["hf-specdiff", *sys.argv[1:]])
    console = Console()
    if time_budget:
        methods = scaling_methods(("unaligned", "features") if is_bundled else list(models.drafters))
        plan = Plan(methods, budget or HEADLINE, num_problems=num_prompts, max_new_tokens=max_new_tokens or 256, seed=seed)
        record = benchmark_time_budget(models, plan, output, names, command)
        console.print(_table(GAIN_TITLES, [gain_cells(gain) for gain in gains(record["rows"], plan.headline)]))
        console.print(f"Figures and curves are in {output}.", highlight=False)
        return
    if budget is not None:
        raise ValueError(f"`--budget` must come with `--time-budget`, got {budget} alone.")
    texts = _prompt_sets(prompts_file, num_prompts)
    limits = {task: max_new_tokens or MAX_NEW_TOKENS.get(task, DEFAULT_NEW_TOKENS) for task in texts}
    extent = Extent(texts, limits, tuple(temperature or (0.0, 1.0)), tuple(batch_size or (1,)), seed, tuple(method or ()))
    record = benchmark(models, extent, output, names, command, is_standard=is_bundled and prompts_file is None)
    for (task, heat, size), rows in itertools.groupby(record["rows"], lambda row: [row[name] for name in SPEED_TITLES[:3]]):
        cells = [speed_cells(row)[3:] for row in rows]
        console.print(_table(SPEED_TITLES[3:], cells, title=f"{task}, temperature {heat:g}, batch {size}"))
    console.print(f"Figures and pictures are in {output}.", highlight=False)


@app.command("doctor")
def doctor_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    drafter: Annotated[str, typer.Argument(help="its drafter: a folder or a Hub repository")],
    prompts_file: Annotated[Path | None, typer.Option(help="a text file or JSON lines; by default the bundled prompts")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="of each set")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures: publish puts them on the card")] = None,
) -> None:
    """Check that a drafter is loaded right and fits its target, and measure what it brings here."""
    prompts = _prompt_sets(prompts_file, num_prompts)
    model = load_model("target", target, dtype=dtype, device_map=device_map)
    assistant = load_model("drafter", drafter, dtype=dtype, device_map=device_map)
    tokenizer = load_tokenizer("target", target)
    console = Console()
    findings = doctor.compare(model, assistant, tokenizer)
    console.print(_table(["", "target", "drafter", ""], [[f.name, f.target, f.drafter, f.warning] for f in findings]))
    profile = doctor.costs(model, assistant)
    console.print("\n".join(doctor.cost_lines(profile, assistant.config.block_size - 1)), highlight=False)
    models = Models(model, tokenizer, {"drafter": assistant})
    rows = doctor.try_prompts(models, prompts, max_new_tokens)
    shifted = doctor.layers_that_fit_better(models, prompts)
    cells = [
        [
            r["task"],
            r["method"],
            f"{r['tokens_per_round']:.2f}",
            f"{r['ratio_to_plain']:.2f}x",
            f"{r['num_identical']}/{r['num_prompts']}",
        ]
        for r in rows
    ]
    console.print(_table(["task", "method", "tokens per round", "speed against plain", "identical"], cells))
    if output is not None:
        command = " ".join(["hf-specdiff", *sys.argv[1:]])
        conditions = {**conditions_of(models, command), "device": str(model.device), "max_new_tokens": max_new_tokens}
        write_record(output, {"conditions": conditions, "rows": rows})
        console.print(f"The figures are in {output}.", highlight=False)
    warnings = [f"{f.name}: {f.warning}" for f in findings if f.warning] + shifted + doctor.verdict(rows, profile, models)
    for warning in warnings:
        console.print(f"! {warning}", style="yellow", highlight=False, markup=False)
    if not warnings:
        console.print("Nothing wrong was found.", style="green")


@app.command("publish")
def publish_command(
    path: Annotated[Path, typer.Argument(help="folder of a trained drafter")],
    repo: Annotated[str, typer.Argument(help="name or org/name on the Hub")],
    target: Annotated[str | None, typer.Option(help="the target; by default the one that the drafter's config names")] = None,
    results: Annotated[Path | None, typer.Option(help="figures of `doctor --output`; by default PATH/results.json")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="the Hub's name of a licence, apache-2.0 for one")
    ] = None,
    prompt: Annotated[str, typer.Option(help="of the self-check")] = "Once upon a time",
    token: Annotated[str | None, typer.Option(help="by default the stored one, or HF_TOKEN", envvar="HF_TOKEN")] = None,
    private: Annotated[bool, typer.Option("--private", help="refused for a repository that is public already")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="do everything but the upload")] = False,
) -> None:
    """Put a drafter on the Hub: weights, code of both roles, card and tokenizer, checked, in one commit, tagged."""
    if dry_run:
        validate_repo_id(repo)
        repo = repo if "/" in repo else f"your-name/{repo}"
    else:
        hub.check_token(token, repo)
        repo = full_name(repo, token)
    settings: dict[str, Any] = {"target": target, "results": results, "license_name": license_name, "prompt": prompt}
    console = Console()
    with hub.staged(path, repo, **settings) as repository:
        sizes = [[name, f"{size:,}"] for name, size in repository.files]
        total = sum(size for _, size in repository.files)
        console.print(_table([f"{repo} ({'private' if private else 'public'})", "bytes"], [*sizes, ["all", f"{total:,}"]]))
        rate = repository.tokens_per_round
        console.print(f"Self-check passed: greedy tokens as plain generate's, {rate:.2f} tokens per round.", highlight=False)
        if dry_run:
            console.print("Dry run: nothing was uploaded.")
            return
        done = hub.publish(repository, repo, private=private, token=token, report=lambda text: typer.echo(text, err=True))
    console.print(f"Published {done.repo_id} {done.tag} (commit {done.commit[:8]}).", highlight=False)


def _prompt_sets(prompts_file: Path | None, num_prompts: int) -> dict[str, list[str]]:
    """Return prompts by the name of their set."""
    if prompts_file is not None:
        prompts = read_prompts(prompts_file)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts):
            raise ValueError(
                f"`--prompts-file` must hold texts, got {len(prompts) - len(texts)} chats in {str(prompts_file)!r}."
            )
        return {prompts_file.stem: texts[:num_prompts]}
    return {name: [str(record["prompt"]) for record in load_prompts(name)[:num_prompts]] for name in PROMPT_SETS}


def _models_of(target: str, drafters: list[str], assistant: str | None, dtype: str, device_map: str) -> Models:
    """Load a target and what drafts for it; drafters are called by the last part of their names."""
    if not drafters:
        raise ValueError("`drafters` must be given with a target, got none.")
    names = [Path(name).name for name in drafters]
    if len(set(names)) < len(names):
        raise ValueError(f"`drafters` must have different last parts of their names, got {', '.join(drafters)}.")
    model = load_model("target", target, dtype=dtype, device_map=device_map)
    loaded = {
        name: load_model("drafters", path, dtype=dtype, device_map=device_map)
        for name, path in zip(names, drafters, strict=True)
    }
    assistants = {}
    if assistant is not None:
        assistants["AR assistant"] = load_model("assistant", assistant, dtype=dtype, device_map=device_map)
    return Models(model, load_tokenizer("target", target), loaded, assistants)


def _table(titles: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """Return a table for the terminal."""
    table = Table(title=title)
    for name in titles:
        table.add_column(name, no_wrap=name == "method")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def number_or_word(value: str | None) -> int | str | None:
    """Return an option that is an integer or a word such as "auto"; the entry refuses other words."""
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value


def read_loss_weights(terms: list[str]) -> dict[str, float]:
    """Read `--loss` arguments.

    Args:
        terms (`list[str]`): each an objective's name, a colon and its weight; the weight may be left out and is then 1.

    Returns:
        `dict[str, float]`: weights by name.

    Raises:
        ValueError: if an objective is unknown or named twice, or a weight is no positive number.
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, _, weight = term.partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if name not in LOSSES or name in weights or not 0 < value < float("inf"):
            raise ValueError(
                f"`--loss` must be objective:weight, each of {', '.join(LOSSES)} at most once and with a positive weight, "
                f"got {term!r}."
            )
        weights[name] = value
    return weights


def load_model(role: str, name: str, *, dtype: str, device_map: str | dict[str, Any]) -> Any:
    """Load a model, or say in one line why not.

    Args:
        role (`str`): the argument's name, for the message.
        name (`str`): folder or Hub repository.
        dtype (`str`): as for `from_pretrained`.
        device_map (`str` or `dict`): as for `from_pretrained`.

    Returns:
        `transformers.PreTrainedModel`: in evaluation mode.

    Raises:
        ValueError: if it cannot be loaded.
    """
    with _one_line(role, name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()


def load_tokenizer(role: str, name: str) -> Any:
    """Load a tokenizer that pads on the left; arguments and errors as `load_model`."""
    with _one_line(role, name):
        return AutoTokenizer.from_pretrained(name, padding_side="left")


@contextmanager
def _one_line(role: str, name: str) -> Iterator[None]:
    """Turn what loading may raise into one line that names the argument."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"`{role}` must be a model folder or a Hub repository, got {name!r}: {first_line}") from error


def print_statistics(all_stats: list[SpeculationStats]) -> None:
    """Print one line on what speculation did over several calls."""
    rounds = [count + 1 for stats in all_stats for row in stats.num_accepted for count in row]
    num_tokens = sum(rounds) + len(all_stats)
    seconds = {
        name: sum(getattr(stats, f"{name}_seconds") for stats in all_stats)
        for name in ("total", "drafter", "target", "prefill")
    }
    rest = seconds["total"] - seconds["drafter"] - seconds["target"] - seconds["prefill"]
    Console(stderr=True).print(
        f"{num_tokens} tokens in {seconds['total']:.2f} s ({num_tokens / seconds['total']:.1f} tokens/s), "
        f"{len(rounds)} rounds, {sum(rounds) / max(len(rounds), 1):.2f} tokens per round; "
        f"drafter {seconds['drafter']:.2f} s, target "
        f"{seconds['target']:.2f} s, prefill {seconds['prefill']:.2f} s, the rest {rest:.2f} s",
        highlight=False,
    )


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line and exit code 2."""
    logging.set_verbosity_error()
    try:
        app()
    except (ValueError, TypeError, ConnectionError) as error:
        Console(stderr=True).print(f"hf-specdiff: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()

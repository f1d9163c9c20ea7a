"""The command line: `hf-specdiff demo | generate | regenerate | train | bench | doctor | import | export | publish`.

Turns words into calls and errors into one line; everything else lives in the modules it calls.
"""

import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from transformers import TextStreamer
from transformers import logging

from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import prompt_sets
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import terminal_table
from hf_specdiff.commands import doctor
from hf_specdiff.commands.convert import export_command
from hf_specdiff.commands.convert import import_command
from hf_specdiff.commands.demo import run_demo
from hf_specdiff.commands.loading import load_drafter
from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.commands.misreadings import readings_that_fit_better
from hf_specdiff.core.generate import generate
from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.demo.bundle import BUNDLED_TARGET
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.hub import publish as hub
from hf_specdiff.hub.repository import full_name
from hf_specdiff.training.disk import is_full
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import as_turns
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import read_prompts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, no_args_is_help=True)


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
    raw: Annotated[
        bool, typer.Option("--raw", help="go on from the text, also where the tokenizer has a chat template")
    ] = False,
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
    network = load_drafter(drafter, model, dtype=dtype, device_map=device_map)
    tokenizer = load_tokenizer("target", target)
    torch.manual_seed(seed)
    sampling = {} if temperature is None else {"temperature": temperature}
    all_stats = []
    for text in as_turns(prompts, tokenizer, raw=raw):
        typer.echo(text if isinstance(text, str) else f"{text[-1]['content']}\n", nl=False)
        inputs = {"input_ids": torch.tensor([encode(tokenizer, text)], device=model.device)}
        result = generate(
            model,
            **inputs,
            assistant_model=network,
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


def missing_command(name: str, extra: str, needed: list[str]) -> Callable[[], None]:
    """Return what stands in for a command whose packages are not there: it says what to install."""

    def command() -> None:
        raise ValueError(f"`{name}` must find {' and '.join(needed)}, got not all. Run pip install 'hf_specdiff[{extra}]'.")

    command.__doc__ = f"Needs the package's extra `{extra}`."
    return command


# Training and benchmarks draw pictures, and training reads data sets; the other commands do without what that takes.
for name, extra, needed in (
    ("regenerate", "train", ["datasets"]),
    ("train", "train", ["datasets", "matplotlib"]),
    ("bench", "bench", ["datasets", "matplotlib"]),
):
    if all(map(find_spec, needed)):
        app.command(name)(getattr(import_module(f"hf_specdiff.commands.{name}"), f"{name}_command"))
    else:
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        app.command(name, context_settings=anything)(missing_command(name, extra, needed))


app.command("import")(import_command)
app.command("export")(export_command)


@app.command("doctor")
def doctor_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    drafter: Annotated[str, typer.Argument(help="its drafter: a folder or a Hub repository")],
    prompts_file: Annotated[Path | None, typer.Option(help="a text file or JSON lines; by default the bundled prompts")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="leave texts as they are, also where there is a chat template")] = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="of each set")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 24,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures: publish puts them on the card")] = None,
) -> None:
    """Check that a drafter is loaded right and fits its target, and measure what it brings here."""
    prompts = prompt_sets(prompts_file, num_prompts)
    model = load_model("target", target, dtype=dtype, device_map=device_map)
    network = load_drafter(drafter, model, dtype=dtype, device_map=device_map)
    tokenizer = load_tokenizer("target", target)
    prompts = {task: as_turns(texts, tokenizer, raw=raw) for task, texts in prompts.items()}
    console = Console()
    findings = doctor.compare(model, network, tokenizer)
    console.print(terminal_table(["", "target", "drafter", ""], [[f.name, f.target, f.drafter, f.warning] for f in findings]))
    profile = doctor.costs(model, network)
    console.print("\n".join(doctor.cost_lines(profile, network.config.max_gamma)), highlight=False)
    models = Models(model, tokenizer, {"drafter": network})
    rows = doctor.try_prompts(models, prompts, max_new_tokens)
    misread = readings_that_fit_better(models, prompts)
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
    console.print(terminal_table(["task", "method", "tokens per round", "speed against plain", "identical"], cells))
    console.print(f"{doctor.auto_line(rows)}\n{doctor.tie_line(rows, models)}", highlight=False)
    if output is not None:
        command = shlex.join(["hf-specdiff", *sys.argv[1:]])
        conditions = {**conditions_of(models, command), "device": str(model.device), "max_new_tokens": max_new_tokens}
        write_record(output, {"conditions": conditions, "rows": rows})
        console.print(f"The figures are in {output}.", highlight=False)
    warnings = [f"{f.name}: {f.warning}" for f in findings if f.warning] + misread + doctor.verdict(rows, profile, models)
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
    with hub.staged(path, repo, **settings, bundled={BUNDLED_TARGET: PAIR / "target"}) as repository:
        sizes = [[name, f"{size:,}"] for name, size in repository.files]
        total = sum(size for _, size in repository.files)
        console.print(
            terminal_table([f"{repo} ({'private' if private else 'public'})", "bytes"], [*sizes, ["all", f"{total:,}"]])
        )
        rate = repository.tokens_per_round
        console.print(f"Self-check passed: greedy tokens as plain generate's, {rate:.2f} tokens per round.", highlight=False)
        if dry_run:
            console.print("Dry run: nothing was uploaded.")
            return
        done = hub.publish(repository, repo, private=private, token=token, report=lambda text: typer.echo(text, err=True))
    console.print(f"Published {done.repo_id} {done.tag} (commit {done.commit[:8]}).", highlight=False)


def number_or_word(value: str | None) -> int | str | None:
    """Return an option that is an integer or a word such as "auto"; the entry refuses other words."""
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value


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
        Console(stderr=True).print(f"hf-specdiff: {error}", soft_wrap=True, style="red", highlight=False, markup=False)
        sys.exit(2)
    except OSError as error:
        if not is_full(error):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        Console(stderr=True).print(
            f"hf-specdiff: {place}{error.strerror}.", soft_wrap=True, style="red", highlight=False, markup=False
        )
        sys.exit(2)


if __name__ == "__main__":
    main()

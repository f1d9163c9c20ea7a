"""`hf-specdiff train`: from words to a drafter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.commands.plan_options import read_settings
from hf_specdiff.commands.plan_options import with_plan_options
from hf_specdiff.commands.regenerate import INTERRUPTED
from hf_specdiff.commands.regenerate import read_sources
from hf_specdiff.commands.regenerate import share_lines
from hf_specdiff.commands.train_plan import Start
from hf_specdiff.commands.train_plan import check_fits_language_model
from hf_specdiff.commands.train_plan import load_language_model
from hf_specdiff.commands.train_plan import plan_of
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.plan import DRAFTER
from hf_specdiff.training.plan import LEARNING
from hf_specdiff.training.plan import TEXT
from hf_specdiff.training.processes import processes
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.regeneration import load_sequences
from hf_specdiff.training.regeneration import num_missing

Target = Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")]
Output = Annotated[Path, typer.Option(help="folder of the drafter; the same command resumes an interrupted run")]
Dtype = Annotated[str, typer.Option(help="of the target: float32, bfloat16, float16 or auto")]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="several times: a text file, one a line; JSON lines with 'prompt', 'text' or 'messages'; a data set's folder, "
        "or its org/name or org/name:split on the Hub; self:N lets an instruct model write N prompts itself",
        rich_help_panel=TEXT,
    ),
]
Folders = Annotated[
    list[Path] | None,
    typer.Option(help="several times: a folder of hf-specdiff regenerate, in place of --prompts", rich_help_panel=TEXT),
]
PromptField = Annotated[str | None, typer.Option(help="the field or column to read, question for one", rich_help_panel=TEXT)]
Chat = Annotated[
    bool, typer.Option("--chat", help="each text is a user's turn: put it into the chat template", rich_help_panel=TEXT)
]
RegenerateBatchSize = Annotated[int, typer.Option(min=1, help="texts that the target writes together", rich_help_panel=TEXT)]
Init = Annotated[
    Path | None,
    typer.Option(
        help="a drafter to go on from; shape and mask are its own where no option names them. Or a diffusion language "
        "model, a folder or a Hub repository, to be aligned",
        rich_help_panel=DRAFTER,
    ),
]
Conditioning = Annotated[str | None, typer.Option(help="features or tokens; by default features", rich_help_panel=DRAFTER)]
NumTargetLayers = Annotated[
    int | None, typer.Option(help="target layers to read, for features; by default 5", rich_help_panel=DRAFTER)
]
MaskTokenId = Annotated[int | None, typer.Option(help="by default an id that is never written", rich_help_panel=DRAFTER)]
CacheFeatures = Annotated[
    Path | None,
    typer.Option(
        help="folder for the target's states: it runs once, later epochs and runs cost the drafter alone",
        rich_help_panel=LEARNING,
    ),
]


@with_plan_options
def train_command(
    target: Target,
    output: Output,
    prompts: Prompts = None,
    sequences: Folders = None,
    prompt_field: PromptField = None,
    chat: Chat = False,
    regenerate_batch_size: RegenerateBatchSize = 32,
    init: Init = None,
    conditioning: Conditioning = None,
    num_target_layers: NumTargetLayers = None,
    mask_token_id: MaskTokenId = None,
    cache_features: CacheFeatures = None,
    dtype: Dtype = "float32",
    **settings: Any,
) -> None:
    """Train a drafter for a target on the text that the target writes; Ctrl-C saves, the same command resumes."""
    named = read_settings(settings)
    check_words(named, prompts, sequences, conditioning)
    start = Start.of(init)
    if start.is_language_model:
        check_fits_language_model(named, conditioning, num_target_layers, cache_features)
    as_is = named.get("as_is", False)
    documents = [text for name in prompts or [] for text in read_corpus(name, as_is=True, field=prompt_field)] if as_is else []
    # With several processes (accelerate launch) each has a target of its own beside its share of the drafter's work.
    device_map = "auto" if processes().num_processes == 1 else {"": processes().device}
    model = load_model("target", target, dtype=dtype, device_map=device_map).eval()
    tokenizer = load_tokenizer("target", target)
    language_model = load_language_model(start, model, named, mask_token_id) if start.is_language_model else None
    plan = plan_of(named, start, model, conditioning, num_target_layers)
    with ending_in_a_line():
        corpus: Sequences | list[Prompt] = documents
        if sequences:
            corpus = written_text(sequences, model)
        elif not as_is:
            reading = (prompt_field, chat, regenerate_batch_size, plan.seed)
            sources = read_sources(prompts or [], model, tokenizer, output / "work", *reading)
            corpus = [prompt for texts in sources.values() for prompt in texts]
        arguments: dict[str, Any] = {"start_from": start.drafter, "language_model": language_model}
        arguments |= {"mask_token_id": start.mask_token_id(mask_token_id), "cache_features": cache_features}
        arguments |= {"regenerate_batch_size": regenerate_batch_size}
        is_finished = train_drafter(model, tokenizer, corpus, output, plan, **arguments)
    tell_the_end(output, is_finished)


def check_words(
    named: dict[str, Any], prompts: list[str] | None, sequences: list[Path] | None, conditioning: str | None
) -> None:
    """Refuse options that do not go together.

    Args:
        named (`dict`): fields that options name.
        prompts (`list[str]`, *optional*): `--prompts`.
        sequences (`list[pathlib.Path]`, *optional*): `--sequences`.
        conditioning (`str`, *optional*): `--conditioning`.

    Raises:
        ValueError: if so.
    """
    if conditioning not in (None, "features", "tokens"):
        raise ValueError(f"`--conditioning` must be features or tokens, got {conditioning!r}.")
    if "head_rank" in named and "head" not in named:
        raise ValueError(f"`--head-rank` must be left out without `--head`, got {named['head_rank']}.")
    as_is, temperature = named.get("as_is", False), named.get("temperature")
    if as_is and temperature is not None:
        raise ValueError(f"`--regenerate-at` must be left out with `--as-is`, got {temperature:g}. Nothing is continued then.")
    if (prompts is None) == (sequences is None):
        got = "none" if prompts is None else "both"
        raise ValueError(f"`--prompts` or `--sequences` must be given, one of them, got {got}.")
    if sequences and (as_is or temperature is not None):
        raise ValueError(
            "`--as-is` and `--regenerate-at` must be left out with `--sequences`, got one of them: that text is written."
        )


def written_text(folders: list[Path], target: Any) -> Sequences:
    """Return what the target wrote already, and tell what it is."""
    text = Sequences.concatenate([load_sequences(folder, target) for folder in folders])
    if processes().is_main_process:
        typer.echo("\n".join(line for folder in folders for line in told(folder)), err=True)
    return text


def told(folder: Path) -> list[str]:
    """Return what a folder of text holds, and whether some of it is still to be written."""
    missing = num_missing(folder)
    note = f" ({missing:,} texts are still to be written)" if missing else ""
    return [f"{folder}{note}:", share_lines(folder)]


@contextmanager
def ending_in_a_line() -> Iterator[None]:
    """Let Ctrl-C before the first step end in one line."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("Interrupted before training began; what was written is kept. The same command goes on from it.", err=True)
        raise typer.Exit(INTERRUPTED) from error


def tell_the_end(output: Path, is_finished: bool) -> None:
    """Say where the drafter is, or its checkpoint after Ctrl-C."""
    if not is_finished:
        typer.echo(
            f"Interrupted; a checkpoint is in {output / 'work' / 'checkpoints'}. The same command goes on from it.", err=True
        )
        raise typer.Exit(INTERRUPTED)
    if processes().is_main_process:
        typer.echo(f"The drafter is in {output}, with pictures of the run.")

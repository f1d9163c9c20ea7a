"""`hf-specdiff regenerate`: let a target write what drafters will be trained on."""

from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.processes import processes
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import as_chat
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.regeneration import shares_of
from hf_specdiff.training.self_prompts import self_prompts

INTERRUPTED = 130
SELF = "self:"


def regenerate_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    prompts: Annotated[
        list[str],
        typer.Option(
            help="several times: a text file, one a line; JSON lines with 'prompt', 'text' or 'messages'; a data set's folder, "
            "or its org/name or org/name:split on the Hub; self:N lets an instruct model write N prompts itself"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder of the text, for train --sequences; the same command resumes")],
    prompt_field: Annotated[str | None, typer.Option(help="the field or column to read, question for one")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="each text is a user's turn: put it into the chat template")] = False,
    max_length: Annotated[int, typer.Option(min=4, help="tokens of prompt and answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="of the target's sampling; 0: greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    regenerate_batch_size: Annotated[int, typer.Option(min=1, help="texts that are written together")] = 32,
    dtype: Annotated[str, typer.Option(help="of the target: float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
) -> None:
    """Let a target continue prompts and keep the text, to train any number of drafters on; Ctrl-C loses one batch at most."""
    state = processes()
    model = load_model("target", target, dtype=dtype, device_map=device_map if state.num_processes == 1 else {"": state.device})
    tokenizer = load_tokenizer("target", target)
    try:
        sources = read_sources(prompts, model, tokenizer, output, prompt_field, chat, regenerate_batch_size, seed)
        regenerate(
            model,
            tokenizer,
            [prompt for texts in sources.values() for prompt in texts],
            output,
            max_length=max_length,
            batch_size=regenerate_batch_size,
            temperature=temperature,
            seed=seed,
            sources={name: len(texts) for name, texts in sources.items()},
        )
    except KeyboardInterrupt as error:
        typer.echo(f"Interrupted; finished texts are in {output}. The same command goes on from them.", err=True)
        raise typer.Exit(INTERRUPTED) from error
    if state.is_main_process:
        typer.echo(f"The text is in {output}: train --sequences {output} learns from it.\n" + share_lines(output))


def read_sources(
    names: list[str],
    target: Any,
    tokenizer: Any,
    output: Path,
    field: str | None = None,
    is_chat: bool = False,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, list[Prompt]]:
    """Read prompts, or let the target write them.

    Args:
        names (`list[str]`): sources, see `read_corpus`; `self:N` for N turns that the target writes.
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        output (`pathlib.Path`): what the target writes is kept in its subfolder `self`.
        field (`str`, *optional*): see `prompt_of`.
        is_chat (`bool`): whether texts are users' turns.
        batch_size (`int`): turns that are written together.
        seed (`int`): of sampling.

    Returns:
        `dict[str, list]`: prompts by source.

    Raises:
        ValueError: if a source cannot be read, or is named twice.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"`--prompts` must name each source once, got {', '.join(names)}.")
    sources: dict[str, list[Prompt]] = {}
    for name in names:
        if name.startswith(SELF):
            count = name.removeprefix(SELF)
            if not count.isdecimal() or int(count) < 1:
                raise ValueError(f"`--prompts` must be self:N with a number of prompts, got {name!r}.")
            sources[name] = self_prompts(target, tokenizer, int(count), output / "self", batch_size=batch_size, seed=seed)
        else:
            texts = read_corpus(name, field=field)
            sources[name] = [as_chat(text) for text in texts] if is_chat else texts
    return sources


def share_lines(folder: Path) -> str:
    """Return a line for each source of a folder of text: texts, tokens and the share of all tokens."""
    return "\n".join(
        f"  {row['source']}: {row['num_texts']:,} texts, {row['num_tokens']:,} tokens written, {row['share']:.0%}"
        for row in shares_of(folder)
    )

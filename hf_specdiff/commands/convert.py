"""`hf-specdiff import` and `hf-specdiff export`: drafters between our layout and others', each checked at the end."""

from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console

from hf_specdiff.commands.loading import load_drafter
from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.core.generate import generate
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.formats.exporting import export_drafter

CHECK_TOKENS = 64
# The target adds one token a round by itself; less than this above it, and nothing of the draft is ever right.
MISREAD = 1.05


def import_command(
    source: Annotated[str, typer.Argument(help="the drafter: a folder or a Hub repository, of any format")],
    output: Annotated[Path, typer.Argument(help="folder for the drafter in our layout")],
    target: Annotated[str, typer.Option(help="the model it drafts for: a folder or a Hub repository")],
    prompt: Annotated[str | None, typer.Option(help="of the self-check; by default a bundled one")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
) -> None:
    """Turn a drafter of another format into ours: weights, configuration, code and card."""
    _check_empty(output)
    model = load_model("target", target, dtype=dtype, device_map=device_map)
    drafter = load_drafter(source, model, dtype=dtype, device_map=device_map)
    drafter.save_pretrained(output)
    _report(model, str(output), load_tokenizer("target", target), prompt, dtype, device_map)


def export_command(
    drafter: Annotated[str, typer.Argument(help="the drafter: a folder or a Hub repository")],
    output: Annotated[Path, typer.Argument(help="folder for it in the other layout")],
    to: Annotated[str, typer.Option(help="dflash (vLLM, SGLang, z-lab's loop), speculators (vLLM) or deepspec")],
    target: Annotated[str | None, typer.Option(help="the target; by default the one that the drafter's config names")] = None,
    without_head: Annotated[
        bool, typer.Option("--without-head", help="leave out Markov and confidence head, which only deepspec can say")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="of the self-check; by default a bundled one")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "float32",
    device_map: Annotated[str, typer.Option(help="as for from_pretrained")] = "auto",
) -> None:
    """Write a drafter in another layout, and say what engines must be told."""
    _check_empty(output)
    loaded = load_drafter(drafter, None, dtype=dtype, device_map=device_map)
    name = target or loaded.config.target_model
    if name is None:
        raise ValueError("`--target` must be given for a drafter whose config names none, got none.")
    model = load_model("target", name, dtype=dtype, device_map=device_map)
    lines = export_drafter(loaded, output, to, target=model, without_head=without_head)
    _report(model, str(output), load_tokenizer("target", name), prompt, dtype, device_map)
    typer.echo("\n".join(lines))


def self_check(target: Any, drafter: Any, tokenizer: Any, prompt: str) -> float:
    """Draft with a drafter and compare with plain `generate`.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        prompt (`str`): a text to continue.

    Returns:
        `float`: tokens per round of single chains.

    Raises:
        ValueError: if other greedy tokens come out than plain `generate`'s, in float32, or next to nothing of what the drafter
            proposes is right: then a part of it is misread.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(target.device)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": CHECK_TOKENS, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **settings)
    # Whatever size would pay on this machine, and nothing that the drafter has not drafted.
    whole = {"draft_shape": "chain", "gamma": drafter.config.max_gamma, "prompt_lookup_num_tokens": 0}
    ours = generate(target, **inputs, assistant_model=drafter, **whole, **settings)
    if target.dtype == torch.float32 and not torch.equal(plain.sequences, ours.sequences):
        raise ValueError(
            f"`drafter` must leave greedy tokens as they are, got others on {prompt!r}. Please report this target."
        )
    rate = float(ours.speculation.tokens_per_round)
    if rate < MISREAD:
        raise ValueError(
            f"`drafter` must bring more than {MISREAD} tokens per round on {prompt!r}, got {rate:.2f}: it is untrained, made "
            "for another target, or a part of it is misread. hf-specdiff doctor tries what that may be."
        )
    return rate


def _check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` must be an empty folder or a new one, got {str(output)!r}. Choose another one.")


def _report(target: Any, folder: str, tokenizer: Any, prompt: str | None, dtype: str, device_map: Any) -> None:
    """Load what was written, check it and say what came out."""
    written = load_drafter(folder, target, dtype=dtype, device_map=device_map)
    rate = self_check(target, written, tokenizer, prompt or str(load_prompts("math")[0]["prompt"]))
    Console().print(
        f"Written to {folder}. Self-check passed: greedy tokens as plain generate's, {rate:.2f} tokens per round.",
        highlight=False,
        soft_wrap=True,
    )

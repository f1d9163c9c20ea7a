"""`hf-specdiff train`: from words to a `TrainingPlan`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.data import processes
from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.pipeline import TrainingPlan
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.trainer import spread_layers

INTERRUPTED = 130


def train_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    prompts: Annotated[
        str,
        typer.Option(
            help="a text file, one a line; JSON lines with 'prompt', 'text' or 'messages'; a data set's folder, or its "
            "org/name or org/name:split on the Hub"
        ),
    ],
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
    regenerate_at: Annotated[
        float | None, typer.Option(min=0, help="temperature of the target's continuations; by default 0: greedy")
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="learn from the texts as they stand; the target continues none")
    ] = False,
    regenerate_batch_size: Annotated[int, typer.Option(min=1, help="texts that the target writes together")] = 32,
    patience: Annotated[int, typer.Option(min=0, help="evaluations without a better one before stopping; 0: never stop")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16/--float32")] = True,
) -> None:
    """Train a drafter for a target on the target's own continuations of the prompts; Ctrl-C saves, the same command resumes."""
    if conditioning not in ("features", "tokens"):
        raise ValueError(f"`--conditioning` must be features or tokens, got {conditioning!r}.")
    if as_is and regenerate_at is not None:
        raise ValueError(
            f"`--regenerate-at` must be left out with `--as-is`, got {regenerate_at:g}. Nothing is continued then."
        )
    texts = read_corpus(prompts, as_is=as_is)
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
        temperature=regenerate_at or 0.0,
        as_is=as_is,
    )
    if not train_drafter(
        model, tokenizer, texts, output, plan, mask_token_id=mask, regenerate_batch_size=regenerate_batch_size
    ):
        typer.echo(
            f"Interrupted; a checkpoint is in {output / 'work' / 'checkpoints'}. The same command goes on from it.", err=True
        )
        raise typer.Exit(INTERRUPTED)
    if state.is_main_process:
        typer.echo(f"The drafter is in {output}, with pictures of the run.")


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

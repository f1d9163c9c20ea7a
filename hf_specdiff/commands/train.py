"""`hf-specdiff train`: from words to a `TrainingPlan`."""

from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer

from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.commands.regenerate import INTERRUPTED
from hf_specdiff.commands.regenerate import read_sources
from hf_specdiff.commands.regenerate import share_lines
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.formats.loading import is_language_model
from hf_specdiff.formats.loading import load_drafter
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import processes
from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.pipeline import TrainingPlan
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.regeneration import load_sequences
from hf_specdiff.training.regeneration import num_missing
from hf_specdiff.training.trainer import spread_layers


def train_command(
    target: Annotated[str, typer.Argument(help="the target: a folder or a Hub repository")],
    output: Annotated[Path, typer.Option(help="folder of the drafter; the same command resumes an interrupted run")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="several times: a text file, one a line; JSON lines with 'prompt', 'text' or 'messages'; a data set's folder, "
            "or its org/name or org/name:split on the Hub; self:N lets an instruct model write N prompts itself"
        ),
    ] = None,
    sequences: Annotated[
        list[Path] | None, typer.Option(help="several times: a folder of hf-specdiff regenerate, in place of --prompts")
    ] = None,
    prompt_field: Annotated[str | None, typer.Option(help="the field or column to read, question for one")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="each text is a user's turn: put it into the chat template")] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="a drafter to go on from; shape and mask are its own where no option names them. Or a diffusion language "
            "model, a folder or a Hub repository, to be aligned"
        ),
    ] = None,
    train: Annotated[str, typer.Option(help="all weights, or head: those of --init stay, but for its head's")] = "all",
    head: Annotated[
        str | None, typer.Option(help="for features: markov or gated, a head that makes each law one given the token before")
    ] = None,
    head_rank: Annotated[int | None, typer.Option(min=1, help="of --head; by default 64")] = None,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="of a diffusion language model: train an adapter of this rank, the weights stay; needs peft"),
    ] = None,
    lora_layers: Annotated[
        list[str] | None, typer.Option(help="several times: a linear layer that gets one, q_proj for one; by default all")
    ] = None,
    cache_features: Annotated[
        Path | None,
        typer.Option(help="folder for the target's states: it runs once, later epochs and runs cost the drafter alone"),
    ] = None,
    conditioning: Annotated[str | None, typer.Option(help="features or tokens; by default features")] = None,
    num_target_layers: Annotated[int | None, typer.Option(help="target layers to read, for features; by default 5")] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="by default an id that is never written")] = None,
    mask_embedding: Annotated[
        bool | None,
        typer.Option(
            "--mask-embedding/--no-mask-embedding",
            help="for features: the mask is a vector of its own; by default where the target's embedding is its head. Without "
            "it the drafter can be exported to other engines",
        ),
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            help="for features: draft the N commonest tokens of the text alone, and read the head's rows of these alone"
        ),
    ] = None,
    from_target: Annotated[
        bool,
        typer.Option("--from-target", help="for features: begin with the target's last layers; saves steps"),
    ] = False,
    predicts_from_anchor: Annotated[
        bool | None,
        typer.Option(
            "--predicts-from-anchor/--predicts-from-masks",
            help="for features: the last token's slot predicts too: a block drafts one more; DeepSpec's layout asks for it",
        ),
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="by default 3")] = None,
    block_size: Annotated[int | None, typer.Option(min=2, help="by default 16")] = None,
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
    eval_prompts: Annotated[int, typer.Option(min=0, help="prompts kept out and decoded; a tenth of all at most")] = 16,
    eval_tokens: Annotated[int, typer.Option(min=2, help="tokens to write after each of them")] = 64,
    warmup: Annotated[float, typer.Option(min=0, max=0.99, help="share of the steps until the peak learning rate")] = 0.05,
    regenerate_at: Annotated[
        float | None, typer.Option(min=0, help="temperature of the target's continuations; by default 0: greedy")
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="learn from the texts as they stand; the target continues none")
    ] = False,
    regenerate_batch_size: Annotated[int, typer.Option(min=1, help="texts that the target writes together")] = 32,
    patience: Annotated[int, typer.Option(min=0, help="evaluations without a better one before stopping; 0: never stop")] = 0,
    dtype: Annotated[str, typer.Option(help="of the target: float32, bfloat16, float16 or auto")] = "float32",
    bf16: Annotated[bool, typer.Option("--bf16/--float32")] = True,
) -> None:
    """Train a drafter for a target on the text that the target writes; Ctrl-C saves, the same command resumes."""
    if conditioning not in (None, "features", "tokens"):
        raise ValueError(f"`--conditioning` must be features or tokens, got {conditioning!r}.")
    if head_rank is not None and head is None:
        raise ValueError(f"`--head-rank` must be left out without `--head`, got {head_rank}.")
    if train not in ("all", "head"):
        raise ValueError(f"`--train` must be all or head, got {train!r}.")
    is_aligned = init is not None and is_language_model(init)
    own = None if init is None or is_aligned else SpecDiffConfig.from_pretrained(init)
    if as_is and regenerate_at is not None:
        raise ValueError(
            f"`--regenerate-at` must be left out with `--as-is`, got {regenerate_at:g}. Nothing is continued then."
        )
    if (prompts is None) == (sequences is None):
        got = "none" if prompts is None else "both"
        raise ValueError(f"`--prompts` or `--sequences` must be given, one of them, got {got}.")
    if sequences and (as_is or regenerate_at is not None):
        raise ValueError(
            "`--as-is` and `--regenerate-at` must be left out with `--sequences`, got one of them: that text is written."
        )
    documents = [read_corpus(name, as_is=True, field=prompt_field) for name in prompts or []] if as_is else []
    state = processes()
    # With several processes (accelerate launch) each has a target of its own beside its share of the drafter's work.
    device_map = "auto" if state.num_processes == 1 else {"": state.device}
    model = load_model("target", target, dtype=dtype, device_map=device_map).eval()
    tokenizer = load_tokenizer("target", target)
    if predicts_from_anchor is None:
        predicts_from_anchor = own is not None and own.predicts_from_anchor
    language_model = None
    if is_aligned:
        shaping = {"--conditioning features": conditioning == "features", "--num-layers": num_layers}
        shaping |= {"--num-target-layers": num_target_layers, "--mask-embedding": mask_embedding}
        check_fits_language_model({**shaping, "--cache-features": cache_features})
        conditioning = "tokens"
        language_model = load_language_model(init, model, block_size or 16, mask_token_id, lora)
    shape = drafter_shape(model, own, conditioning, num_target_layers, mask_embedding)
    plan = TrainingPlan(
        **shape,
        lora_rank=lora,
        lora_layers=lora_layers,
        num_layers=num_layers or (3 if own is None else own.num_hidden_layers),
        block_size=block_size or (16 if own is None else own.block_size),
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
        eval_tokens=eval_tokens,
        warmup=warmup,
        draft_vocab_size=draft_vocab,
        predicts_from_anchor=predicts_from_anchor,
        head=head,
        head_rank=head_rank or 64,
        trained=train,
        from_target=from_target,
        patience=patience,
        temperature=regenerate_at or 0.0,
        as_is=as_is,
    )
    corpus: Sequences | list[Prompt] = [text for texts in documents for text in texts]
    try:
        if sequences:
            corpus = Sequences.concatenate([load_sequences(folder, model) for folder in sequences])
            if state.is_main_process:
                typer.echo("\n".join(line for folder in sequences for line in told(folder)), err=True)
        elif not as_is:
            sources = read_sources(
                prompts or [], model, tokenizer, output / "work", prompt_field, chat, regenerate_batch_size, seed
            )
            corpus = [prompt for texts in sources.values() for prompt in texts]
        is_finished = train_drafter(
            model,
            tokenizer,
            corpus,
            output,
            plan,
            mask_token_id=own.mask_token_id if own is not None and mask_token_id is None else mask_token_id,
            regenerate_batch_size=regenerate_batch_size,
            start_from=None if is_aligned else init,
            language_model=language_model,
            cache_features=cache_features,
        )
    except KeyboardInterrupt as error:
        typer.echo("Interrupted before training began; what was written is kept. The same command goes on from it.", err=True)
        raise typer.Exit(INTERRUPTED) from error
    if not is_finished:
        typer.echo(
            f"Interrupted; a checkpoint is in {output / 'work' / 'checkpoints'}. The same command goes on from it.", err=True
        )
        raise typer.Exit(INTERRUPTED)
    if state.is_main_process:
        typer.echo(f"The drafter is in {output}, with pictures of the run.")


def check_fits_language_model(options: dict[str, Any]) -> None:
    """Refuse options that shape a drafter of ours.

    Args:
        options (`dict`): their values by name; false and `None` are fine.

    Raises:
        ValueError: if one is set.
    """
    named = [name for name, value in options.items() if value is not None and value is not False]
    if named:
        raise ValueError(
            f"`{named[0]}` must be left out where `--init` is a diffusion language model, got it: that has a shape of its own "
            "and reads the text alone."
        )


def load_language_model(name: Any, target: Any, block_size: int, mask_token_id: int | None, lora: int | None) -> Any:
    """Return the diffusion language model to align.

    Args:
        name (`str` or path): its folder or Hub repository.
        target (`transformers.PreTrainedModel`): the model it is to draft for.
        block_size (`int`): slots of its window.
        mask_token_id (`int`, *optional*): where its files name none.
        lora (`int`, *optional*): rank of an adapter; frozen weights take the target's precision, others float32.

    Returns:
        `DiffusionDrafter`: on the target's device.
    """
    settings: dict[str, Any] = {} if mask_token_id is None else {"mask_token_id": mask_token_id}
    # What "auto" picks hangs on the machine, and checkpoints are compared by what is accepted.
    settings |= {"context_cache": "exact", "block_size": block_size, "dtype": torch.float32 if lora is None else target.dtype}
    return load_drafter(name, target=target, **settings).to(target.device)


def drafter_shape(
    target: Any,
    own: SpecDiffConfig | None,
    conditioning: str | None,
    num_target_layers: int | None,
    mask_embedding: bool | None,
) -> dict[str, Any]:
    """Return what a drafter reads: what the options say, else what the one to go on from does, else what fits the target.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        own (`SpecDiffConfig`, *optional*): of the drafter to go on from.
        conditioning (`str`, *optional*): `--conditioning`.
        num_target_layers (`int`, *optional*): `--num-target-layers`.
        mask_embedding (`bool`, *optional*): `--mask-embedding`.

    Returns:
        `dict`: `target_layer_ids` and `has_mask_embedding` of a `TrainingPlan`.
    """
    if conditioning is None:
        conditioning = "features" if own is None or own.is_feature_conditioned else "tokens"
    if conditioning == "tokens":
        return {"target_layer_ids": None, "has_mask_embedding": False}
    layer_ids = own.target_layer_ids if own is not None and num_target_layers is None else None
    if layer_ids is None:
        layer_ids = spread_layers(target.config.get_text_config().num_hidden_layers, num_target_layers or 5)
    if mask_embedding is None:
        mask_embedding = has_tied_head(target) if own is None else own.has_mask_embedding
    return {"target_layer_ids": layer_ids, "has_mask_embedding": mask_embedding}


def has_tied_head(target: Any) -> bool:
    """Return whether a target's embedding is its head."""
    head = target.get_output_embeddings()
    return head is not None and head.weight is target.get_input_embeddings().weight


def told(folder: Path) -> list[str]:
    """Return what a folder of text holds, and whether some of it is still to be written."""
    missing = num_missing(folder)
    note = f" ({missing:,} texts are still to be written)" if missing else ""
    return [f"{folder}{note}:", share_lines(folder)]


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

"""Loading a recognised diffusion language model: its weights into the native body, its words held against the target's.

Knows files and the readings that a family leaves open.
"""

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.utils import logging

from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.files import check_finite
from hf_specdiff.core.files import check_weight_files
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from hf_specdiff.diffusion.saving import ADAPTER_CONFIG
from hf_specdiff.diffusion.saving import ADAPTER_WEIGHTS
from hf_specdiff.diffusion.saving import OWN_IDS
from hf_specdiff.diffusion.saving import SECTION
from hf_specdiff.diffusion.trials import Reading
from hf_specdiff.diffusion.trials import best_reading
from hf_specdiff.diffusion.trials import text_of
from hf_specdiff.formats.language_models import LanguageModel
from hf_specdiff.formats.record import match_tensors
from hf_specdiff.formats.source import Source
from hf_specdiff.formats.vocabulary import Vocabulary
from hf_specdiff.formats.vocabulary import own_ids
from hf_specdiff.formats.vocabulary import read_vocabulary

logger = logging.get_logger(__name__)

# Of `DiffusionDrafter`: what a user may settle instead of the family.
SETTINGS = ("mask_token_id", "block_size", "logit_offset", "attention", "block_length", "context_cache", "own_ids")
# Of the arguments of `from_pretrained`, those that hold for a target's repository too.
SHARED_ARGUMENTS = ("token", "cache_dir", "local_files_only", "proxies")


def load_language_model(
    source: Source, model: LanguageModel, target: Any, settings: dict[str, Any], arguments: dict[str, Any]
) -> DiffusionDrafter:
    """Load a diffusion language model as a drafter.

    Args:
        source (`Source`): its folder or repository.
        model (`LanguageModel`): as its family's reader understood it.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for.
        settings (`dict`): those of `SETTINGS` that the user settled.
        arguments (`dict`): of `from_pretrained`.

    Returns:
        `DiffusionDrafter`: in evaluation mode.

    Raises:
        ValueError: if the weights are not those of the configuration, there is no mask id, the tokenizer is another one, or the
            files leave a reading open and nothing settles it.
    """
    own = read_vocabulary(source)
    known = None if own is None else own.mask_token_id
    named = (settings.pop("mask_token_id", None), model.mask_token_id, known)
    mask_token_id = next((token_id for token_id in named if token_id is not None), None)
    if mask_token_id is None:
        raise ValueError(
            f"`mask_token_id` must be given for {source.name!r}, got none: neither its config.json nor its tokenizer names a "
            "mask. Pass mask_token_id=."
        )
    if settings.get("own_ids") is None:
        settings["own_ids"] = _own_ids(source, own, target, arguments, model.config.vocab_size)
    body = _load_body(source, model, arguments)
    reading = _reading(source, model, body, mask_token_id, target, settings)
    if model.block_size is not None:
        settings.setdefault("block_size", model.block_size)
    drafter = DiffusionDrafter(
        body,
        mask_token_id=mask_token_id,
        logit_offset=reading.logit_offset,
        attention=reading.attention,
        block_length=reading.block_length,
        target=target,
        foreign_ids=model.foreign_ids,
        **settings,
    )
    _take_over(drafter, source, model.notes)
    if target is not None:
        check_pair(target, drafter)
    return drafter


def load_adapter(source: Source, load: Callable[..., Any], target: Any, arguments: dict[str, Any]) -> DiffusionDrafter:
    """Load an adapter that was trained here: the model that it belongs to, with the adapter merged into its weights.

    Args:
        source (`Source`): the adapter's folder or repository.
        load (`Callable`): `load_drafter`, for that model.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for.
        arguments (`dict`): of `from_pretrained`, and of `SETTINGS`.

    Returns:
        `DiffusionDrafter`: in evaluation mode.

    Raises:
        ValueError: if peft is not installed, or the adapter is not one for that model.
    """
    peft = import_peft(f"load the adapter {source.name!r}")
    section, path = source.config[SECTION], source.file(ADAPTER_CONFIG)
    adapter = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path")
    if not base or source.file(ADAPTER_WEIGHTS) is None:
        raise ValueError(
            f"{source.name!r} must hold an adapter in {ADAPTER_WEIGHTS}, and {ADAPTER_CONFIG} name the model that it was "
            f"trained on, got {base!r}. Is the folder whole?"
        )
    named = {name: section[name] for name in SETTINGS if name in section}
    if section.get("is_translated"):
        named["own_ids"] = _own_ids(source, read_vocabulary(source), target, arguments, 0)
    of_base = {name: value for name, value in arguments.items() if name != "revision"}
    of_base |= {"revision": adapter["revision"]} if adapter.get("revision") else {}
    drafter = load(base, target=target, **{**named, **of_base})
    hub = {name: value for name, value in arguments.items() if name in (*SHARED_ARGUMENTS, "revision")}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's business with transformers
        try:
            adapted = peft.PeftModel.from_pretrained(drafter.body, source.name, **hub)
        except (ValueError, RuntimeError, UserWarning, SafetensorError) as error:
            raise ValueError(
                f"{source.name!r} must be an adapter for {base!r}, got one that does not fit: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
    drafter.body = adapted.merge_and_unload().eval().requires_grad_(True)
    check_finite(drafter.body, source.name)
    drafter.own_ids[section["foreign_ids"]] = -1
    _take_over(drafter, source, section)
    return drafter


def import_peft(purpose: str) -> Any:
    """Return the package peft, which adapters alone need; it takes a second to import.

    Args:
        purpose (`str`): for the message.

    Returns:
        module: peft.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"peft must be installed to {purpose}, got none. Run pip install 'hf_specdiff[train]', or do without an adapter."
        ) from error


def _take_over(drafter: DiffusionDrafter, source: Source, notes: dict[str, Any]) -> None:
    """Give a drafter what its folder says of its making, and its own arguments of speculation."""
    if not notes:
        return
    config = drafter.config
    config.training = notes["training"]
    if config.target_model in (None, notes["target_model"]):
        config.target_model, config.target_revision = notes["target_model"], notes["target_revision"]
    if source.file("generation_config.json") is not None:
        hub = {name: value for name, value in source.arguments.items() if name in (*SHARED_ARGUMENTS, "revision")}
        drafter.generation_config = GenerationConfig.from_pretrained(source.name, **hub)
        drafter.generation_config._from_model_config = False


def _load_body(source: Source, model: LanguageModel, arguments: dict[str, Any]) -> Any:
    """Return the native body with the folder's weights, all of which have found their place."""
    shapes = source.shapes()
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model.body(model.config).state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        expected.pop("lm_head.weight", None)
    match_tensors(expected, model.record, shapes, source.name)
    check_weight_files(source.name, arguments)
    renames = model.record.renames or None
    body, found = model.body.from_pretrained(
        source.name, config=model.config, key_mapping=renames, use_safetensors=True, output_loading_info=True, **arguments
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{source.name!r} must hold all weights of its body, got none for {sorted(found['missing_keys'])[:3]}, which "
            "transformers would fill with random numbers."
        )
    check_finite(body, source.name)
    # The host would save it, checkpoints too, under the names that it was loaded from, and resume from those that it has here.
    body._weight_conversions = None
    return body


def _own_ids(source: Source, own: Vocabulary | None, target: Any, arguments: dict[str, Any], num_rows: int) -> list[int] | None:
    """Return the drafter's id for each of the target's tokens, -1 for none; `None` where nothing says that they differ."""
    saved = _saved_ids(source)
    if saved is not None:
        num_rows = len(saved)  # its tokenizer is that of the target it was saved with
    found = None if target is None else _compared_ids(source, own, target, arguments, num_rows)
    if saved is None or found is None:
        return saved if found is None else found
    return [-1 if i < 0 else saved[i] for i in found]


def _saved_ids(source: Source) -> list[int] | None:
    """Return what `DiffusionDrafter.save_pretrained` wrote of other ids for the same words."""
    if not source.config.get(SECTION, {}).get("is_translated"):
        return None
    path = source.file(OWN_IDS)
    try:
        saved: list[int] | None = None if path is None else load_file(path)["own_ids"].tolist()
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{OWN_IDS} of {source.name!r} must hold the tensor `own_ids`, got {error}. Save it anew.") from error
    if saved is None:
        raise ValueError(f"{source.name!r} must hold {OWN_IDS}, got none: its ids are not its target's. Is the folder whole?")
    return saved


def _compared_ids(
    source: Source, own: Vocabulary | None, target: Any, arguments: dict[str, Any], num_rows: int
) -> list[int] | None:
    """Return which ids stand for the target's words by the tokenizers' files, where there are any; refuse few common words."""
    name = target.config.name_or_path
    hub = {key: value for key, value in arguments.items() if key in SHARED_ARGUMENTS}
    theirs = None
    if name:
        try:
            theirs = read_vocabulary(Source(name, hub))
        except ValueError as error:
            logger.warning(f"The tokenizer of {name!r} could not be read: {error}")
    if own is None or theirs is None:
        lacking = source.name if own is None else name or "the target"
        logger.warning(
            f"Whether ids mean the same to {source.name!r} and to the target could not be checked: {lacking!r} has no "
            "tokenizer files. With another tokenizer next to nothing would be accepted; the text stays right."
        )
        return None
    return own_ids(own, theirs, num_rows, target.config.get_text_config().vocab_size, source.name)


def _reading(
    source: Source, model: LanguageModel, body: Any, mask_token_id: int, target: Any, settings: dict[str, Any]
) -> Reading:
    """Return how the body is to be read: as the user says, as the family is known, or what predicts masked words best."""
    given = settings.pop("logit_offset", None)
    offsets = [0, -1] if model.is_offset_open and target is not None else [model.logit_offset]
    attention, length = settings.pop("attention", None), settings.pop("block_length", None)
    is_given = attention is not None or length is not None
    ways = [(attention or "block_causal", length)] if is_given else model.attentions
    readings = [Reading(offset, *way) for offset in (offsets if given is None else [given]) for way in ways]
    if len(readings) == 1:
        return readings[0]
    if target is None:
        choices = " or ".join(f"attention={way!r}, block_length={length}" for way, length in ways)
        raise ValueError(
            f"`target` or `attention` must be given for {source.name!r}, got neither: its files do not say who sees whom. Pass "
            f"the target, on whose text that is found out, or {choices}."
        )
    return best_reading(body, _own_text(body, target, settings["own_ids"]), mask_token_id, readings)


def _own_text(body: Any, target: Any, own: list[int] | None) -> torch.Tensor:
    """Return a text of the target in the body's ids, `(1, L)`, without what it has no word for."""
    text = text_of(target)[0].cpu()
    text = text if own is None else torch.tensor(own)[text]
    return text[(text >= 0) & (text < body.config.vocab_size)][None]

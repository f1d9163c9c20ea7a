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
from transformers import GenerationConfig
from transformers.utils import logging

from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.files import check_finite
from hf_specdiff.core.files import check_weight_files
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from hf_specdiff.diffusion.saving import ADAPTER_CONFIG
from hf_specdiff.diffusion.saving import ADAPTER_WEIGHTS
from hf_specdiff.diffusion.saving import SECTION
from hf_specdiff.diffusion.trials import Reading
from hf_specdiff.diffusion.trials import best_reading
from hf_specdiff.diffusion.trials import text_of
from hf_specdiff.formats.language_models import LanguageModel
from hf_specdiff.formats.record import match_tensors
from hf_specdiff.formats.source import Source
from hf_specdiff.formats.vocabulary import Vocabulary
from hf_specdiff.formats.vocabulary import foreign_ids
from hf_specdiff.formats.vocabulary import read_vocabulary

logger = logging.get_logger(__name__)

# Of `DiffusionDrafter`: what a user may settle instead of the family.
SETTINGS = ("mask_token_id", "block_size", "logit_offset", "attention", "block_length", "context_cache")
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
    foreign = model.foreign_ids + _foreign_ids(source, own, target, arguments)
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
        foreign_ids=foreign,
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
    drafter.is_foreign[section["foreign_ids"]] = True
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


def _foreign_ids(source: Source, own: Vocabulary | None, target: Any, arguments: dict[str, Any]) -> list[int]:
    """Return the ids that mean something else to the target; refuse another tokenizer."""
    if target is None:
        return []
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
        return []
    size = target.config.get_text_config().vocab_size
    return foreign_ids(own, theirs, size, source.name)


def _reading(
    source: Source, model: LanguageModel, body: Any, mask_token_id: int, target: Any, settings: dict[str, Any]
) -> Reading:
    """Return how the body is to be read: as the user says, as the family is known, or what predicts masked words best."""
    offset = settings.pop("logit_offset", model.logit_offset)
    attention, length = settings.pop("attention", None), settings.pop("block_length", None)
    if attention is not None or length is not None:
        return Reading(offset, attention or "block_causal", length)
    readings = [Reading(offset, *way) for way in model.attentions]
    if len(readings) == 1:
        return readings[0]
    if target is None:
        ways = " or ".join(f"attention={way!r}, block_length={length}" for way, length in model.attentions)
        raise ValueError(
            f"`target` or `attention` must be given for {source.name!r}, got neither: its files do not say who sees whom. Pass "
            f"the target, on whose text that is found out, or {ways}."
        )
    return best_reading(body, text_of(target), mask_token_id, readings)

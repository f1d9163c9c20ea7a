"""`load_drafter`: anybody's drafter as ours, or a refusal that names what is not understood.

Knows how a format is recognised, and how a record meets a target and a weights file.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch

from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.diffusion.saving import ADAPTER_CONFIG
from hf_specdiff.diffusion.saving import SECTION
from hf_specdiff.formats import deepspec
from hf_specdiff.formats import dflash
from hf_specdiff.formats import muse
from hf_specdiff.formats import speculators
from hf_specdiff.formats.language_models import READERS as LANGUAGE_MODELS
from hf_specdiff.formats.language_models import WRAPPED
from hf_specdiff.formats.language_models import family_of
from hf_specdiff.formats.loading_language_models import SETTINGS
from hf_specdiff.formats.loading_language_models import load_adapter
from hf_specdiff.formats.loading_language_models import load_language_model
from hf_specdiff.formats.record import Record
from hf_specdiff.formats.record import match_tensors
from hf_specdiff.formats.source import Source

# From an architecture's name to who reads it.
READERS = {
    **dict.fromkeys(dflash.ARCHITECTURES, dflash.read),
    **dict.fromkeys(deepspec.ARCHITECTURES, deepspec.read),
    **dict.fromkeys(muse.ARCHITECTURES, muse.read),
}
# Formats that are known and not read: a word of their architecture's name, and what is missing here.
UNREAD = {
    "gemma4dspark": ("DeepSpec's Gemma 4 drafter", "its layers have four norms and share keys and values"),
    "eagle": ("EAGLE", "it drafts token by token"),
    "peagle": ("P-EAGLE", "it drafts with a decoder of its own"),
    "mtp": ("multi-token prediction", "it is a part of its target"),
    "domino": ("Domino", "its recurrent head `prefix_gru` is not read"),
    "treeflash": ("TreeFlash", "its tree heads need their own code"),
    "flashmap": ("FlashMap", "it starts from noise instead of a mask"),
    "xpress": ("xPress", "its heads are not read"),
    "lilicorr": ("LiLiCorr", "its correction heads are not read"),
    "mimo": ("MiMo", "its sinks and value scale are not read"),
    "laguna": ("Laguna", "its gated attention `g_proj` is not read"),
    "nemotron": ("Nemotron", "its sinks are not read"),
    "ornith": ("Ornith", "its layers are not read"),
    "bonsai": ("Bonsai", "its layers are not read"),
}
# Vocabularies that differ by less are the same, padded to different multiples.
PADDING = 1024


def load_drafter(source: str | os.PathLike, target: Any = None, *, ignored_fields: Iterable[str] = (), **arguments: Any) -> Any:
    """Load a drafter of any format, or a diffusion language model as one.

    Reads data, never code or pickles, and refuses what it does not understand before memory is taken.

    Args:
        source (`str` or path): a folder or a Hub repository.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for. The drafter is checked against it, and
            takes over its special ids, which pipelines compare.
        ignored_fields (`Iterable[str]`): fields of config.json that the reader does not know and that you know change nothing.
        **arguments: of `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, `local_files_only` and so on; and for a
            diffusion language model those of `DiffusionDrafter`, where its family's known values are not to be used.

    Returns:
        `SpecDiffDrafter` or `DiffusionDrafter`: in evaluation mode.

    Raises:
        ValueError: if a file is missing or broken, the format or a field or tensor of it is not understood, or the drafter does
            not fit the target.
    """
    opened = Source.open(source, arguments)
    if opened.config.get("model_type") == SpecDiffConfig.model_type and "speculators_model_type" not in opened.config:
        drafter = SpecDiffDrafter.from_pretrained(source, **arguments).eval()
        if target is not None:
            check_pair(target, drafter)
        return drafter
    if SECTION in opened.config and opened.file(ADAPTER_CONFIG) is not None:
        return load_adapter(opened, load_drafter, target, arguments)
    read_model = family_of(opened.config, opened.shapes)
    if read_model is not None:
        settings = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
        model = read_model(opened.config, opened.shapes(), ignored_fields)
        return load_language_model(opened, model, target, settings, arguments)
    read = recognise(opened)
    shapes = opened.shapes()
    record = read(opened.config, shapes, ignored_fields)
    _meet_target(record, target)
    config = SpecDiffConfig(**record.fields)
    check_tensors(config, record, shapes, opened)
    drafter = SpecDiffDrafter.from_pretrained(source, config=config, key_mapping=record.renames or None, **arguments).eval()
    if target is not None:
        check_pair(target, drafter)
    return drafter


def is_language_model(source: str | os.PathLike, **arguments: Any) -> bool:
    """Return whether a folder or repository holds a diffusion language model; reads its configuration alone, and names.

    Args:
        source (`str` or path): a folder or a Hub repository.
        **arguments: of `from_pretrained`, those about the Hub.

    Returns:
        `bool`: true for what `load_drafter` makes a `DiffusionDrafter` of.

    Raises:
        ValueError: if there is no configuration.
    """
    opened = Source.open(source, arguments)
    return family_of(opened.config, opened.shapes) is not None


def recognise(source: Source) -> Any:
    """Return the reader of a drafter's format.

    Args:
        source (`Source`): with its configuration.

    Returns:
        `Callable`: from configuration, shapes and ignored fields to a `Record`.

    Raises:
        ValueError: if the format is not read, not known, or two formats are named at once.
    """
    config = source.config
    architectures = config.get("architectures") or []
    if "speculators_model_type" in config:
        other = ["model_type"] if config.get("model_type") == SpecDiffConfig.model_type else []
        other += ["dflash_config"] if "dflash_config" in config else []
        if other:
            raise ValueError(
                f"{source.name!r} must hold one format, got fields of two: `speculators_model_type` and `{other[0]}`. Remove "
                "those that do not belong to these weights."
            )
        return speculators.read
    found = [name for name in architectures if name in READERS]
    if len(architectures) == 1 and found:
        return READERS[found[0]]
    if len(architectures) > 1 and found:
        raise ValueError(f"`architectures` of {source.name!r} must name one format, got {architectures}.")
    words = " ".join(map(str, [*architectures, config.get("model_type", "")])).lower()
    for word, (name, reason) in UNREAD.items():
        if word in words:
            raise ValueError(f"{source.name!r} must be of a format that is read here, got {name}: {reason}.")
    raise ValueError(
        f"{source.name!r} must hold a drafter of a known format, got `architectures` {architectures} and `model_type` "
        f"{config.get('model_type')!r}. Read are hf_specdiff's own, {', '.join(READERS)}, speculators' "
        f"{', '.join(speculators.KINDS)}, and diffusion language models of the types {', '.join(LANGUAGE_MODELS)} and, "
        f"wrapped, {', '.join(WRAPPED)}."
    )


def check_tensors(config: SpecDiffConfig, record: Record, shapes: dict[str, tuple[int, ...]], source: Source) -> None:
    """Refuse a weights file that is not the one its configuration describes.

    Args:
        config (`SpecDiffConfig`): made of the record.
        record (`Record`): says how tensors are renamed.
        shapes (`dict`): of the file's tensors.
        source (`Source`): for `d2t`, and for messages.

    Raises:
        ValueError: if a tensor is missing, not understood or of another shape, or `d2t` leaves the vocabulary.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SpecDiffDrafter(config).state_dict().items()}
    match_tensors(expected, record, shapes, source.name)
    if config.draft_vocab_size is not None:
        _check_vocabulary(config, source, shapes)


def _check_vocabulary(config: SpecDiffConfig, source: Source, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a reduced vocabulary that leaves the target's, names a token twice, or contradicts its own inverse."""
    token_ids = source.tensor("d2t").long() + torch.arange(config.draft_vocab_size or 0)
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= config.vocab_size or len(token_ids.unique()) < len(token_ids):
        raise ValueError(
            f"the tensor `d2t` of {source.name!r} must lead to different ids from 0 to {config.vocab_size - 1}, got "
            f"{int(token_ids.min())} to {int(token_ids.max())}, {len(token_ids.unique())} of {len(token_ids)} different. Is "
            "the drafter made for another vocabulary?"
        )
    if "t2d" in shapes:
        is_drafted = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, token_ids, True)
        if not torch.equal(is_drafted, source.tensor("t2d").bool()):
            raise ValueError(f"the tensors `d2t` and `t2d` of {source.name!r} must name the same tokens, got different ones.")


def _meet_target(record: Record, target: Any) -> None:
    """Fill in what the target knows, and refuse a drafter of another target's size."""
    fields = record.fields
    if target is None:
        if "vocab_size" not in fields:
            raise ValueError(
                f"`target` must be given for the format {record.format}, got none: its files name no vocabulary. Pass the "
                "model."
            )
        return
    theirs = target.config.get_text_config()
    borrows = not (fields.get("has_own_embedding") or fields.get("has_own_head"))
    own = fields.setdefault("vocab_size", theirs.vocab_size)
    if borrows and own != theirs.vocab_size and abs(own - theirs.vocab_size) < PADDING:
        fields["vocab_size"] = theirs.vocab_size
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields |= {name: getattr(theirs, name, None) for name in names}
    fields["target_model"] = target.config.name_or_path or None
    own_layers = fields.get("num_target_layers")
    if own_layers is not None and own_layers != theirs.num_hidden_layers:
        raise ValueError(
            f"`target` must have the {own_layers} layers of the one that the drafter was made for, got "
            f"{theirs.num_hidden_layers}. Load that target."
        )
    fields["num_target_layers"] = theirs.num_hidden_layers
    expected = [fields.get("target_hidden_size") or fields["hidden_size"], fields["vocab_size"]]
    for name, size in zip(("hidden_size", "vocab_size"), expected, strict=True):
        if getattr(theirs, name) != size:
            raise ValueError(
                f"`target` must have the `{name}` {size} of the one that the drafter was made for, got "
                f"{getattr(theirs, name)}. Load that target."
            )

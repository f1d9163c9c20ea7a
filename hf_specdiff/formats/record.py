"""The record that every reader fills: what a foreign drafter is, in the fields of our own configuration.

Knows how to take fields out of a foreign configuration so that none is overlooked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig
from transformers import Qwen3Config

# Of the network's body; the same name and meaning in Qwen3's configuration, in ours and in all formats.
BODY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "attention_bias",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "initializer_range",
)
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
# They never change a drafter's logits: bookkeeping of the host, and special ids, which a drafter does not read.
BOOKKEEPING = {
    *PreTrainedConfig().to_dict(),
    "auto_map",
    "name_or_path",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "model_type",
    "is_decoder",
    "cross_attention_hidden_size",
    "add_cross_attention",
    "tie_encoder_decoder",
    "pruned_heads",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
}
# Copied from a target's configuration, they change nothing with these values.
NEUTRAL = {"mlp_bias": False, "pretraining_tp": 1, "embedding_multiplier": 1.0, "head_dim_v": None}


@dataclass
class Record:
    """A foreign drafter.

    Attributes:
        format (`str`): its format's name, for messages.
        fields (`dict`): of `SpecDiffConfig`.
        renames (`dict`): regular expressions over the file's tensor names and what they become here, as `key_mapping` of
            `from_pretrained`.
        unused (`list[str]`): regular expressions of tensors that belong to the format and that drafting does not need.
    """

    format: str
    fields: dict[str, Any]
    renames: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def renamed(self, name: str) -> str:
        """Return a tensor's name in our network."""
        for pattern, replacement in self.renames.items():
            name = re.sub(pattern, replacement, name)
        return name

    def is_unused(self, name: str) -> bool:
        """Return whether drafting does not need a tensor."""
        return any(re.search(pattern, name) for pattern in self.unused)


class Fields:
    """A part of a foreign configuration, from which fields are taken; what is left at the end was not understood.

    Args:
        values (`dict`): names and values.
        format_name (`str`): for messages.
        place (`str`): where in config.json they stand, for messages.
    """

    def __init__(self, values: dict[str, Any], format_name: str, place: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{place} of the format {format_name} must be a JSON object, got {values!r}.")
        self.values = values
        self.format = format_name
        self.place = place
        self.taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field's value, or the default where it is absent or null."""
        self.taken.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Return a field's value; a `ValueError` where there is none."""
        value = self.take(name)
        if value is None:
            raise ValueError(
                f"`{name}` must be in {self.place} of the format {self.format}, got none. Is the file whole, and its format "
                "this one?"
            )
        return value

    def body(self) -> dict[str, Any]:
        """Return the fields of the network's body that are there."""
        for name in NEEDED:
            self.need(name)
        found = {name: self.take(name) for name in BODY if self.values.get(name) is not None}
        self.taken.update(BODY)
        return found

    def finish(self, ignored: Iterable[str] = (), *, is_strict: bool = False) -> None:
        """Refuse fields that were not understood.

        Args:
            ignored (`Iterable[str]`): names that the user vouches for.
            is_strict (`bool`): whether every name counts: in a format's own section each of them has changed the logits so far.
        """
        known = self.taken | set(ignored)
        if not is_strict:
            known |= BOOKKEEPING
        for name, value in self.values.items():
            if name in known or (not is_strict and (value is None or NEUTRAL.get(name, ...) == value)):
                continue
            raise ValueError(
                f"`{name}` in {self.place} must be a field that the reader of the format {self.format} understands, got "
                f"{value!r}. It may change the logits: update hf_specdiff, or pass ignored_fields=[{name!r}] if you know that "
                "it does not."
            )


def agreed(format_name: str, name: str, *places: Fields) -> Any:
    """Return a field that may stand in several places, the first that has it; a `ValueError` where they differ."""
    found = [(fields.place, value) for fields in places if (value := fields.take(name)) is not None]
    for place, value in found[1:]:
        if value != found[0][1]:
            raise ValueError(
                f"`{name}` of the format {format_name} must be the same wherever it stands, got {found[0][1]} in {found[0][0]} "
                f"and {value} in {place}. Which of them was the drafter trained with?"
            )
    return found[0][1] if found else None


def sliding_layers(body: dict[str, Any], format_name: str) -> list[bool]:
    """Return which layers slide, and refuse windows that are named and not used, or used and not named."""
    config = Qwen3Config(**body)
    is_sliding = [layer_type == "sliding_attention" for layer_type in config.layer_types or []]
    if any(is_sliding) and config.sliding_window is None:
        raise ValueError(
            "`sliding_window` and `use_sliding_window` must be set where `layer_types` has sliding layers (format "
            f"{format_name}), "
            f"got {body.get('sliding_window')} and {body.get('use_sliding_window')}. Set what the drafter was trained with."
        )
    body["layer_types"] = config.layer_types
    return is_sliding


def match_tensors(expected: dict[str, tuple[int, ...]], record: Record, shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """Refuse a weights file that is not the one its configuration describes.

    Args:
        expected (`dict`): shapes of the network's tensors.
        record (`Record`): says how tensors are renamed.
        shapes (`dict`): of the file's tensors.
        name (`str`): of the folder or repository, for messages.

    Raises:
        ValueError: if a tensor is missing, not understood or of another shape.
    """
    found = {record.renamed(theirs): (theirs, shape) for theirs, shape in shapes.items() if not record.is_unused(theirs)}
    for ours, (theirs, shape) in found.items():
        if ours not in expected:
            raise ValueError(
                f"the tensor `{theirs}` of {name!r} must be one that the format {record.format} has, got one of shape "
                f"{shape} that is not understood. The drafter would not be itself without it: it needs another version of "
                "hf_specdiff, or is of another format."
            )
        if expected[ours] != shape:
            raise ValueError(
                f"the tensor `{theirs}` of {name!r} must have the shape {expected[ours]} that config.json asks for, got "
                f"{shape}. Which of the two files belongs to this drafter?"
            )
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{name!r} must hold all weights of the format {record.format}, got none for {', '.join(missing[:3])}. Is "
            "the file whole, and config.json its own?"
        )

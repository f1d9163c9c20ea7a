"""Drafters of the package speculators: a nested configuration, layer ids counted from the embedding, maybe fewer tokens.

Source: the package speculators 0.9.0.
"""

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig

from hf_specdiff.formats.deepspec import heads
from hf_specdiff.formats.dflash import selector
from hf_specdiff.formats.record import BODY
from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record
from hf_specdiff.formats.record import sliding_layers

KINDS = ("dflash", "dspark", "dflash2")
# The last version whose files were read.
NEWEST = (0, 9)


def read(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ignored: Iterable[str]) -> Record:
    """Read a configuration in this layout; arguments, result and errors as `dflash.read`."""
    kind = config["speculators_model_type"]
    name = f"speculators {kind}"
    if kind not in KINDS:
        raise ValueError(
            f"`speculators_model_type` must be one of {', '.join(KINDS)}, got {kind!r}: this format is not read. Use a "
            "drafter of another one."
        )
    top = Fields(config, name)
    top.take("speculators_model_type")
    _check_version(top)
    body = _body(top, name, ignored)
    is_sliding = sliding_layers(body, name)
    non_causal = top.take("sliding_window_non_causal", kind == "dflash2")
    is_causal = any(is_sliding) and not non_causal
    block_size = top.need("block_size")
    draft_vocab_size = top.take("draft_vocab_size", body["vocab_size"])
    is_reduced = draft_vocab_size != body["vocab_size"]
    if is_reduced and "lm_head.weight" not in shapes:
        raise ValueError(
            f"`lm_head.weight` of the format {name} must be there for a `draft_vocab_size` of {draft_vocab_size}, got none. Is "
            "the file whole?"
        )
    proposals = Fields(top.take("speculators_config", {}), name, "`speculators_config`")
    fields = {
        **body,
        "block_size": block_size,
        "mask_token_id": top.need("mask_token_id"),
        # Theirs count the embedding's output as 0.
        "target_layer_ids": [layer_id - 1 for layer_id in top.need("aux_hidden_state_layer_ids")],
        "causal_layers": [is_causal and slides for slides in is_sliding],
        "predicts_from_anchor": _predicts_from_anchor(top, proposals, block_size),
        "has_own_embedding": "embed_tokens.weight" in shapes,
        "has_own_head": "lm_head.weight" in shapes,
        "draft_vocab_size": draft_vocab_size if is_reduced else None,
        "target_hidden_size": top.take("target_hidden_size"),
    }
    if any(is_sliding):
        # A window's slots all see as far back as its anchor, and that at a distance of the window's size too.
        fields |= {"sliding_window": fields["sliding_window"] + 1, "window_from_anchor": True}
    if kind == "dspark":
        fields |= heads(shapes, body["hidden_size"], top, has_defaults=True)
    elif kind == "dflash2":
        fields |= selector(top)
    top.finish(ignored)
    unused = [r"^t2d$", r"^verifier_lm_head\.", r"^verifier_norm\."]
    return Record(name, fields, unused=unused if is_reduced else [*unused, r"^d2t$"])


def _check_version(top: Fields) -> None:
    version = str(top.take("speculators_version", "0.9"))
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if tuple(numbers) > NEWEST:
        raise ValueError(
            f"`speculators_version` must be at most {NEWEST[0]}.{NEWEST[1]} for this version of hf_specdiff, got {version}. "
            "Run pip install -U hf_specdiff, or save the drafter with that version of speculators."
        )


def _body(top: Fields, name: str, ignored: Iterable[str]) -> dict[str, Any]:
    """Return the fields of the network's body; what the file leaves out are defaults of the class that it names."""
    nested = top.need("transformer_layer_config")
    place = "`transformer_layer_config`"
    model_type = Fields(nested, name, place).take("model_type", "qwen3")
    try:
        whole = AutoConfig.for_model(model_type, **{key: value for key, value in nested.items() if key != "model_type"})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place} of the format {name} must be a configuration of transformers, got: {error}") from error
    known = AutoConfig.for_model(model_type).to_dict()
    left = Fields({key: value for key, value in nested.items() if key not in known}, name, place)
    for field in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        left.take(field)
    left.finish(ignored)
    body = {field: getattr(whole, field) for field in BODY if getattr(whole, field, None) is not None}
    rope = body.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        body["rope_parameters"] = rope["sliding_attention"]
    return Fields(body, name, place).body()


def _predicts_from_anchor(top: Fields, proposals: Fields, block_size: int) -> bool:
    """Return whether the anchor's slot predicts: told by a field, and by how many tokens a pass proposes."""
    told = top.take("sample_from_anchor")
    methods = proposals.take("proposal_methods", [])
    num_tokens = methods[0].get("speculative_tokens") if methods else None
    if told is None:
        return num_tokens == block_size
    if not told and num_tokens is not None and num_tokens >= block_size:
        raise ValueError(
            f"`speculative_tokens` must be below `block_size` {block_size} where `sample_from_anchor` is false, got "
            f"{num_tokens}. Which of them was the drafter trained with?"
        )
    return bool(told)

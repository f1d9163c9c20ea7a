"""DSpark drafters, whose every slot predicts: DeepSpec's files, SpecForge's and LiquidAI's.

They differ in where a field stands: at top level (DeepSpec), in `dflash_config` (SpecForge, LiquidAI), or in both.

Source: the public repositories deepseek-ai/DeepSpec and sgl-project/SpecForge; LiquidAI's files as mlx-vlm reads them.
"""

from collections.abc import Iterable
from typing import Any

from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record
from hf_specdiff.formats.record import agreed
from hf_specdiff.formats.record import sliding_layers

SPECFORGE = "SpecForge DSpark"
ARCHITECTURES = {"Qwen3DSparkModel": "DeepSpec", "Lfm2DSparkDraftModel": "LiquidAI DSpark", "DSparkDraftModel": SPECFORGE}
# SpecForge's early files.
RENAMES = {r"^logit_head\.": ""}
CONFIDENCE = "confidence_head.proj.weight"


def read(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ignored: Iterable[str]) -> Record:
    """Read a configuration in this layout; arguments, result and errors as `dflash.read`."""
    name = ARCHITECTURES.get(config["architectures"][0], SPECFORGE)
    top, section = Fields(config, name), Fields(config.get("dflash_config") or {}, name, "`dflash_config`")
    top.take("dflash_config")
    body = top.body()
    _check_projector(section)
    is_sliding = sliding_layers(body, name)
    if any(is_sliding) and name != SPECFORGE:
        raise ValueError(f"`layer_types` of the format {name} must have full attention only, got {body['layer_types']}.")
    for place in (top, section):
        for field in ("num_anchors", "attention_mode", "confidence_head_alpha"):  # of training, or told by other fields
            place.take(field)
    needed = {field: agreed(name, field, section, top) for field in ("block_size", "mask_token_id", "target_layer_ids")}
    for field, value in needed.items():
        if value is None:
            top.need(field)
    fields = {
        **body,
        **needed,
        "num_target_layers": agreed(name, "num_target_layers", section, top),
        "causal_layers": is_sliding if any(is_sliding) else None,
        "predicts_from_anchor": True,
        "has_own_embedding": "embed_tokens.weight" in shapes,
        "has_own_head": "lm_head.weight" in shapes,
        "rope_interleaved": not top.take("rope_is_neox_style", True),
        **heads(shapes, body["hidden_size"], section, top),
    }
    section.finish(is_strict=True)
    top.finish(ignored)
    return Record(name, fields, renames=dict(RENAMES))


def heads(shapes: dict[str, tuple[int, ...]], hidden_size: int, *places: Fields, has_defaults: bool = False) -> dict[str, Any]:
    """Return the fields of Markov and confidence heads.

    Args:
        shapes (`dict`): of the tensors, by name; they say what no field does of a confidence head.
        hidden_size (`int`): of the body.
        *places (`Fields`): where they may stand.
        has_defaults (`bool`): whether what the file leaves out is there, of rank 256, as in speculators.

    Returns:
        `dict`: of `SpecDiffConfig`.
    """
    names = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    rank, kind, is_confident, reads_token = (agreed(places[0].format, name, *places) for name in names)
    found = shapes.get(CONFIDENCE) or shapes.get(f"logit_head.{CONFIDENCE}")
    if rank is None:
        rank = 256 if has_defaults else 0
    if is_confident is None:
        is_confident = has_defaults or found is not None
    if reads_token is None:
        reads_token = has_defaults if found is None else found[-1] > hidden_size
    return {
        "markov_rank": rank,
        "markov_head_type": str(kind or "vanilla").lower(),
        "enable_confidence_head": bool(is_confident),
        "confidence_head_with_markov": bool(is_confident and reads_token),
    }


def _check_projector(section: Fields) -> None:
    kind = section.take("projector_type", "dspark")
    if kind != "dspark":
        raise ValueError(
            f"`projector_type` in `dflash_config` of the format {section.format} must be 'dspark', got {kind!r}. Which of them "
            "was the drafter trained as?"
        )

"""DeepSpec's flat layout: DSpark drafters and its DFlash files, which have an embedding and a head of their own.

Source: the public repository deepseek-ai/DeepSpec. Every slot predicts, the anchor's included.
"""

from collections.abc import Iterable
from typing import Any

from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record
from hf_specdiff.formats.record import sliding_layers

ARCHITECTURES = {"Qwen3DSparkModel": "DeepSpec", "Lfm2DSparkDraftModel": "LiquidAI DSpark"}


def read(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ignored: Iterable[str]) -> Record:
    """Read a configuration in this layout; arguments, result and errors as `dflash.read`."""
    name = ARCHITECTURES[config["architectures"][0]]
    top = Fields(config, name)
    body = top.body()
    if any(sliding_layers(body, name)):
        raise ValueError(f"`layer_types` of the format {name} must have full attention only, got {body['layer_types']}.")
    top.take("num_anchors")  # of a training step
    fields = {
        **body,
        "block_size": top.need("block_size"),
        "mask_token_id": top.need("mask_token_id"),
        "target_layer_ids": top.need("target_layer_ids"),
        "num_target_layers": top.take("num_target_layers"),
        "predicts_from_anchor": True,
        "has_own_embedding": "embed_tokens.weight" in shapes,
        "has_own_head": "lm_head.weight" in shapes,
        "rope_interleaved": not top.take("rope_is_neox_style", True),
        **heads(top),
    }
    top.finish(ignored)
    return Record(name, fields)


def heads(top: Fields, *, has_defaults: bool = False) -> dict[str, Any]:
    """Return the fields of Markov and confidence heads.

    Args:
        top (`Fields`): where they stand.
        has_defaults (`bool`): whether what the file leaves out is there, of rank 256, as in speculators.

    Returns:
        `dict`: of `SpecDiffConfig`.
    """
    rank = top.take("markov_rank", 256 if has_defaults else 0)
    kind = top.take("markov_head_type", "vanilla")
    is_confident = bool(top.take("enable_confidence_head", has_defaults))
    reads_token = bool(top.take("confidence_head_with_markov", has_defaults))
    return {
        "markov_rank": rank,
        "markov_head_type": kind,
        "enable_confidence_head": is_confident,
        "confidence_head_with_markov": is_confident and reads_token,
    }

"""z-lab's layout of DFlash, which JetSpec and SpecForge share.

Source: the package dflash 0.1.0; JetSpec and SpecForge read in their public repositories.
"""

from collections.abc import Iterable
from typing import Any

from hf_specdiff.formats import deepspec
from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record
from hf_specdiff.formats.record import agreed
from hf_specdiff.formats.record import sliding_layers

ARCHITECTURES = {"DFlashDraftModel": "z-lab DFlash", "DFlash2DraftModel": "z-lab DFlash 2"}
DEFAULT_BLOCK_SIZE = 16


def read(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ignored: Iterable[str]) -> Record:
    """Read a configuration in this layout.

    Args:
        config (`dict`): config.json.
        shapes (`dict`): of the tensors, by name.
        ignored (`Iterable[str]`): fields that the user vouches for.

    Returns:
        `Record`: the drafter.

    Raises:
        ValueError: if a field is missing, contradicts another or is not understood.
    """
    if (config.get("dflash_config") or {}).get("projector_type") == "dspark":
        return deepspec.read(config, shapes, ignored)
    architecture = config["architectures"][0]
    name = "JetSpec" if "causal_head" in (config.get("dflash_config") or {}) else ARCHITECTURES[architecture]
    top, section = Fields(config, name), Fields(config.get("dflash_config") or {}, name, "`dflash_config`")
    top.take("dflash_config")
    body = top.body()
    is_sliding = sliding_layers(body, name)
    _check_projector(section)
    num_target_layers = top.take("num_target_layers")
    layer_ids = agreed(name, "target_layer_ids", section, top)
    if layer_ids is None:
        layer_ids = default_layer_ids(top.need("num_target_layers"), body["num_hidden_layers"])
    mask_token_id = agreed(name, "mask_token_id", section, top)
    if mask_token_id is None:
        section.need("mask_token_id")
    softcap = agreed(name, "final_logit_softcapping", section, top)
    fields = {
        **body,
        "block_size": _or_default(agreed(name, "block_size", section, top), DEFAULT_BLOCK_SIZE),
        "mask_token_id": mask_token_id,
        "target_layer_ids": layer_ids,
        "num_target_layers": num_target_layers,
        "causal_layers": _causal_layers(top, section, is_sliding),
        "input_embedding_scale": float(_or_default(agreed(name, "input_embedding_scale", section, top), 1.0)),
        "output_multiplier": float(_or_default(agreed(name, "output_multiplier", section, top), 1.0)),
        "final_logit_softcapping": float(softcap) if softcap and softcap > 0 else None,
        "has_mask_embedding": "mask_embedding" in shapes,
    }
    width = section.take("target_hidden_size", body["hidden_size"])
    if width != body["hidden_size"]:
        raise ValueError(
            f"`target_hidden_size` in `dflash_config` of the format {name} must be `hidden_size` {body['hidden_size']}, got "
            f"{width}. Such drafters have an adapter of random weights: train one for this target."
        )
    if architecture == "DFlash2DraftModel":
        fields |= selector(section, top)
    section.finish(is_strict=True)
    top.finish(ignored)
    return Record(name, fields)


def selector(*places: Fields) -> dict[str, Any]:
    """Return the fields of DFlash 2's convolutions and of its candidate selector.

    Args:
        *places (`Fields`): where they may stand.

    Returns:
        `dict`: of `SpecDiffConfig`; what the files leave out as speculators fills it.
    """
    defaults = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16}
    return {name: _or_default(agreed(places[0].format, name, *places), value) for name, value in defaults.items()}


def default_layer_ids(num_target_layers: int, num_draft_layers: int) -> list[int]:
    """Return the target layers that a drafter reads whose configuration does not say.

    Args:
        num_target_layers (`int`): the target's.
        num_draft_layers (`int`): the drafter's.

    Returns:
        `list[int]`: evenly spread from 1 to the third from the end; of a single one, the middle.
    """
    if num_draft_layers == 1:
        return [num_target_layers // 2]
    first, last = 1, num_target_layers - 3
    return [round(first + i * (last - first) / (num_draft_layers - 1)) for i in range(num_draft_layers)]


def _or_default(value: Any, default: Any) -> Any:
    """Return what a file says, 0 included, or what its silence means."""
    return default if value is None else value


def _check_projector(section: Fields) -> None:
    kind = section.take("projector_type", "dflash")
    if kind != "dflash":
        raise ValueError(
            f"`projector_type` in `dflash_config` must be 'dflash', got {kind!r}: SpecForge's {kind} heads are not read. Use a "
            "drafter of another format."
        )


def _causal_layers(top: Fields, section: Fields, is_sliding: list[bool]) -> list[bool]:
    """Return which layers are causal inside the window: those that slide, unless one of three fields says otherwise."""
    told = {
        "is_causal": top.take("is_causal"),
        "dflash_config.causal": section.take("causal"),
        "dflash_config.causal_head": section.take("causal_head"),
    }
    values = {name: bool(value) for name, value in told.items() if value is not None}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"`is_causal`, `causal` and `causal_head` must agree, got {values}. Which of them was the drafter trained with?"
        )
    return [next(iter(values.values()))] * len(is_sliding) if values else is_sliding

"""`export_drafter`: a drafter of ours in the layout of others, for vLLM, SGLang, speculators and z-lab's loop.

Knows which tensors a layout holds, and what of them a drafter borrows of its target.
"""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.files import write_whole
from hf_specdiff.formats.layouts import HEADS
from hf_specdiff.formats.layouts import NEUTRAL
from hf_specdiff.formats.layouts import WRITERS
from hf_specdiff.formats.layouts import check_sayable
from hf_specdiff.formats.source import CONFIG
from hf_specdiff.formats.source import INDEX
from hf_specdiff.formats.source import WEIGHTS

HEAD_WEIGHTS = ("markov_head.", "confidence_head.")


def export_drafter(
    drafter: Any, folder: str | os.PathLike, to: str = "dflash", target: Any = None, *, without_head: bool = False
) -> list[str]:
    """Write a drafter in another layout.

    Args:
        drafter (`SpecDiffDrafter`): feature-conditioned.
        folder (`str` or path): where to; made if it is not there.
        to (`str`): `"dflash"`: z-lab's, which vLLM and SGLang read; `"speculators"`: vLLM's package;
            `"deepspec"`: DeepSpec's, of drafters whose every slot predicts, with Markov and confidence heads.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for; its name and size are written down.
            DeepSpec's layout holds embedding and head, and speculators' the head of a reduced vocabulary, so it is needed
            where the drafter borrows them.
        without_head (`bool`): whether to leave out the Markov and the confidence head, which only DeepSpec's layout can say:
            the rest drafts as it does alone, less than with them.

    Returns:
        `list[str]`: what to tell the engines, a line each.

    Raises:
        ValueError: if the layout is not known, cannot say what the drafter is, the target that lends to it is missing or
            does not fit, the folder holds other weights, or a head is to be left out that is not there.
    """
    if to not in WRITERS:
        raise ValueError(f"`to` must be one of {', '.join(WRITERS)}, got {to!r}.")
    config = drafter.config
    if getattr(config, "model_type", None) != SpecDiffConfig.model_type or config.target_layer_ids is None:
        raise ValueError(
            f"`drafter` must be a feature-conditioned SpecDiffDrafter, got {type(drafter).__name__}. No layout of others knows "
            "drafters that read tokens alone: publish it with hf-specdiff publish."
        )
    config = _without_head(config) if without_head else config
    check_sayable(config, to)
    place = Path(folder)
    _check_folder(place)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in drafter.state_dict().items()
        if not (without_head and name.startswith(HEAD_WEIGHTS))
    }
    if to == "deepspec":
        tensors = _borrowed(drafter, target) | tensors
    if to == "speculators" and config.draft_vocab_size is not None:
        token_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, token_ids, True)
        if not config.has_own_head:
            tensors["lm_head.weight"] = _lent(drafter, target, "lm_head", to)[token_ids].contiguous()
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    write_text_whole(place / CONFIG, json.dumps(WRITERS[to](config, target), indent=2) + "\n")
    return engine_lines(config, to, str(folder))


def engine_lines(config: SpecDiffConfig, to: str, folder: str) -> list[str]:
    """Return what vLLM and SGLang must be told about an exported drafter.

    Args:
        config (`SpecDiffConfig`): the drafter's.
        to (`str`): the layout.
        folder (`str`): where it lies.

    Returns:
        `list[str]`: a line each.
    """
    method = "dspark" if to == "deepspec" else "dflash"
    told = json.dumps({"method": method, "model": folder, "num_speculative_tokens": config.max_gamma})
    lines = [f"vLLM:   vllm serve TARGET --speculative-config '{told}'"]
    if to == "dflash":
        lines.append(
            f"SGLang: --speculative-algorithm DFLASH --speculative-draft-model-path {folder} "
            f"--speculative-num-draft-tokens {config.block_size}"
        )
    return lines


def _without_head(config: SpecDiffConfig) -> SpecDiffConfig:
    """Return the configuration of the same drafter without its heads."""
    if not config.markov_rank and not config.enable_confidence_head:
        raise ValueError("`without_head` must be False for a drafter that has no head, got True. Leave it out.")
    config = deepcopy(config)
    for name in HEADS:
        setattr(config, name, NEUTRAL[name])
    return config


def _check_folder(place: Path) -> None:
    """Refuse a folder whose weights would be taken for the new ones'."""
    if place.exists() and not place.is_dir():
        raise ValueError(f"`folder` must be a folder, got the file {str(place)!r}.")
    if (place / INDEX).exists() or (place / WEIGHTS).exists() or (place / CONFIG).exists():
        raise ValueError(f"`folder` must hold no model, got {str(place)!r}, which does. Choose another one.")


def _borrowed(drafter: Any, target: Any) -> dict[str, torch.Tensor]:
    """Return what a drafter borrows of its target, under the names of DeepSpec's layout: embedding and head."""
    config = drafter.config
    lent = [
        name for name, has_own in (("embed_tokens", config.has_own_embedding), ("lm_head", config.has_own_head)) if not has_own
    ]
    return {f"{name}.weight": _lent(drafter, target, name, "deepspec") for name in lent}


def _lent(drafter: Any, target: Any, name: str, to: str) -> torch.Tensor:
    """Return the target's embedding or head `(V, D)` for a layout that holds it."""
    config = drafter.config
    if target is None:
        raise ValueError(
            f"`target` must be given for a drafter that borrows embedding or head to be written in the layout {to!r}, got "
            "none: the layout holds them. Pass the model."
        )
    check_pair(target, drafter)
    module = getattr(target, "get_input_embeddings" if name == "embed_tokens" else "get_output_embeddings")()
    weight, shape = module.weight, (config.vocab_size, config.hidden_size)
    if tuple(weight.shape) != shape or weight.device.type == "meta" or getattr(module, "bias", None) is not None:
        raise ValueError(
            f"`target` must lend a matrix {shape} in memory, without a bias, for `{name}` of the layout {to!r}, got "
            f"{tuple(weight.shape)} on {weight.device}. Load a target that fits, whole, or choose another layout."
        )
    return weight.detach().to("cpu", drafter.dtype, copy=True).contiguous()

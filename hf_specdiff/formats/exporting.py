"""`export_drafter`: a drafter of ours in the layout of others, for vLLM, SGLang, speculators and z-lab's loop.

Knows which of our switches each layout can say; what it cannot say is refused, since it would be read as something else.
"""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.files import write_whole
from hf_specdiff.formats.source import CONFIG
from hf_specdiff.formats.source import INDEX
from hf_specdiff.formats.source import WEIGHTS

SPECULATORS_VERSION = "0.9.0"
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
    "attention_bias",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "initializer_range",
)
HEAD_WEIGHTS = ("markov_head.", "confidence_head.")
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
# Our switches and the values that change nothing.
NEUTRAL = {
    "predicts_from_anchor": False,
    "window_from_anchor": False,
    "input_embedding_scale": 1.0,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "has_own_embedding": False,
    "has_own_head": False,
    "has_mask_embedding": False,
    "draft_vocab_size": None,
    "target_hidden_size": None,
    "rope_interleaved": False,
    "markov_rank": 0,
    "markov_head_type": "vanilla",
    "markov_reads_drafted": False,
    "selector_rank": 0,
    "conv_kernel_size": 0,
    "enable_confidence_head": False,
    "confidence_head_with_markov": False,
}
# Which of them a layout can say, causality apart.
SAYS = {
    "dflash": {"input_embedding_scale", "output_multiplier", "final_logit_softcapping"},
    "speculators": {"predicts_from_anchor", "window_from_anchor", "has_own_embedding", "has_own_head", "draft_vocab_size"},
    "deepspec": {"predicts_from_anchor", "has_own_embedding", "has_own_head", *HEADS},
}
# Which layers may be causal in each.
CAUSALITY = {"dflash": "all, none, or those that slide", "speculators": "none, or those that slide", "deepspec": "none"}
# DeepSpec's class asks for this size of its training steps; drafting does not read it.
NUM_ANCHORS = 512


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
    writers: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
        "dflash": _dflash,
        "speculators": _speculators,
        "deepspec": _deepspec,
    }
    if to not in writers:
        raise ValueError(f"`to` must be one of {', '.join(writers)}, got {to!r}.")
    config = drafter.config
    if getattr(config, "model_type", None) != SpecDiffConfig.model_type or config.target_layer_ids is None:
        raise ValueError(
            f"`drafter` must be a feature-conditioned SpecDiffDrafter, got {type(drafter).__name__}. No layout of others knows "
            "drafters that read tokens alone: publish it with hf-specdiff publish."
        )
    config = _without_head(config) if without_head else config
    _check_sayable(config, to)
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
    write_text_whole(place / CONFIG, json.dumps(writers[to](config, target), indent=2) + "\n")
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


def _check_sayable(config: SpecDiffConfig, to: str) -> None:
    """Refuse switches that the layout has no word for."""
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name)
        says_nothing = {"target_hidden_size": value == config.hidden_size, "markov_head_type": not config.markov_rank}
        if says_nothing.get(name):
            continue
        if value != neutral and name not in SAYS[to]:
            others = " or ".join(repr(layout) for layout, names in SAYS.items() if name in names)
            remedy = f"Choose the layout {others}." if others else "No layout has one: publish it with hf-specdiff publish."
            if name in HEADS:
                remedy += " Or leave the heads out: without_head=True, --without-head."
            raise ValueError(
                f"`{name}` must be {neutral} to be written in the layout {to!r}, got {value}: it has no word for it, and the "
                f"drafter would be read as another one. {remedy}"
            )
    is_sliding = "sliding_attention" in (config.layer_types or [])
    if to == "deepspec" and not config.predicts_from_anchor:
        raise ValueError(
            "`predicts_from_anchor` must be True to be written in the layout 'deepspec', got False: there every slot predicts. "
            "Choose the layout 'dflash' or 'speculators'."
        )
    if to == "deepspec" and is_sliding:
        raise ValueError(
            "`layer_types` must be full attention only to be written in the layout 'deepspec', got sliding layers. Choose "
            "another layout."
        )
    if to == "speculators" and is_sliding != config.window_from_anchor:
        raise ValueError(
            "`window_from_anchor` must be True for sliding layers to be written in the layout 'speculators', got False: its "
            "windows count from the anchor. Choose the layout 'dflash'."
        )
    if -1 in (config.target_layer_ids or []) and to == "dflash":
        raise ValueError("`target_layer_ids` must not read the embedding's output (-1) in the layout 'dflash', got -1.")
    if (
        _causality(config) == -2
        or (to == "speculators" and _causality(config) == 1)
        or (to == "deepspec" and _causality(config) != 0)
    ):
        raise ValueError(
            f"`causal_layers` must be {CAUSALITY[to]} to be written in the layout {to!r}, got "
            f"{config.causal_layers}: it has no word for it. Choose another layout."
        )


def _causality(config: SpecDiffConfig) -> int:
    """Return 0: no layer is causal, 1: all are, -1: those that slide, -2: others."""
    is_causal = [config.is_causal_layer(layer) for layer in range(config.num_hidden_layers)]
    is_sliding = [config.layer_window(layer) is not None for layer in range(config.num_hidden_layers)]
    if not any(is_causal):
        return 0
    if is_causal == is_sliding:
        return -1
    return 1 if all(is_causal) else -2


def _check_folder(place: Path) -> None:
    """Refuse a folder whose weights would be taken for the new ones'."""
    if place.exists() and not place.is_dir():
        raise ValueError(f"`folder` must be a folder, got the file {str(place)!r}.")
    if (place / INDEX).exists() or (place / WEIGHTS).exists() or (place / CONFIG).exists():
        raise ValueError(f"`folder` must hold no model, got {str(place)!r}, which does. Choose another one.")


def _body(config: SpecDiffConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in BODY}
    return {name: value for name, value in values.items() if value is not None}


def _rope_theta(config: SpecDiffConfig) -> dict[str, Any]:
    """Return the field that readers of before transformers 5 look for."""
    theta = (config.rope_parameters or {}).get("rope_theta")
    return {} if theta is None else {"rope_theta": theta}


def _num_target_layers(config: SpecDiffConfig, target: Any) -> int | None:
    return config.num_target_layers if target is None else target.config.get_text_config().num_hidden_layers


def _dflash(config: SpecDiffConfig, target: Any) -> dict[str, Any]:
    """Return config.json in z-lab's layout; causality and block size stand in both places, since engines look in one each."""
    causality = _causality(config)
    section: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids or []),
        "block_size": config.block_size,
    }
    if causality >= 0:
        section["causal"] = causality == 1
    for name in sorted(SAYS["dflash"]):
        if getattr(config, name) != NEUTRAL[name]:
            section[name] = getattr(config, name)
    fields = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **_body(config),
        **_rope_theta(config),
        "block_size": config.block_size,
        "dflash_config": section,
        "tie_word_embeddings": False,
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
    }
    if causality >= 0:
        fields["is_causal"] = causality == 1
    num_target_layers = _num_target_layers(config, target)
    return fields if num_target_layers is None else {**fields, "num_target_layers": num_target_layers}


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


def _deepspec(config: SpecDiffConfig, target: Any) -> dict[str, Any]:
    """Return config.json in DeepSpec's flat layout, where every slot predicts."""
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        **_body(config),
        **_rope_theta(config),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids or []),
        "num_target_layers": _num_target_layers(config, target),
        "num_anchors": NUM_ANCHORS,
        **{name: getattr(config, name) for name in HEADS},
        "tie_word_embeddings": False,
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
    }


def _speculators(config: SpecDiffConfig, target: Any) -> dict[str, Any]:
    """Return config.json in the layout of speculators 0.9; its layer ids count the embedding's output as 0."""
    is_sliding = "sliding_attention" in (config.layer_types or [])
    body = _body(config)
    if is_sliding:
        body["sliding_window"] -= 1
    name = config.target_model if target is None else target.config.name_or_path or None
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": SPECULATORS_VERSION,
        "transformer_layer_config": {"model_type": "qwen3", **body, "tie_word_embeddings": False},
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.target_layer_ids or []],
        "sample_from_anchor": config.predicts_from_anchor,
        "sliding_window_non_causal": not any(config.causal_layers or []),
        "tie_word_embeddings": False,
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": config.max_gamma,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": name,
                "architectures": [] if target is None else [type(target).__name__],
            },
        },
    }

"""The layouts of others as we write them: which of our switches each can say, and its config.json.

What a layout cannot say is refused, since it would be read as something else.
"""

from typing import Any

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig

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


def check_sayable(config: SpecDiffConfig, to: str) -> None:
    """Refuse switches that the layout has no word for.

    Args:
        config (`SpecDiffConfig`): the drafter's.
        to (`str`): the layout.

    Raises:
        ValueError: naming the first of them and what to do.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name)
        has_no_head = not config.markov_rank and name in ("markov_head_type", "markov_reads_drafted")
        if has_no_head or (name == "target_hidden_size" and value == config.hidden_size):
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


# From a layout's name to what makes its config.json, of a configuration and the target.
WRITERS = {"dflash": _dflash, "speculators": _speculators, "deepspec": _deepspec}

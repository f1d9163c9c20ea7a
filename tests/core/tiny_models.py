"""Tiny random models of every causal language model type that transformers registers.

A config class is made with its defaults and then shrunk: whatever it calls its sizes, they are set to small ones. What a class
demands beside that stands in `FIXES`. Windows, chunks and thresholds are longer than what targets are tried with and shorter
than the texts of the tests. Weights are drawn wide enough that greedy text does not settle into one token.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB_SIZE, WINDOW, HIDDEN, NUM_LAYERS = 128, 16, 32, 4
MOST_PARAMETERS = 12_000_000

# By value, since configs have many names for one thing.
SIZES: dict[Any, str] = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
    HIDDEN: "hidden_size d_model n_embd dim embedding_dim emb_dim hidden_dim embedding_size lru_width attention_hidden_size "
    "backbone_hidden_size word_embed_proj_dim input_embedding_size output_embedding_size hidden_size_global out_hidden_size "
    "vision_output_dim projector_input_dim projector_output_dim adapter_out_dim adapter_in_dim adapter_input_size "
    "pronunciation_embed_dim shape_embed_dim moe_intermediate_size shared_expert_intermediate_size base_channels "
    "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
    "ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels codebook_size shape_vocab_size audio_vocab_size",
    NUM_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts linear_num_value_heads linear_num_heads mamba_dt_rank time_step_rank compress_ratio "
    "rotary_dim patch_size image_seq_length conf_num_attention_heads num_filters upsample_groups prompt_length",
    2: "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads n_kv_heads kv_n_heads swa_num_key_value_heads "
    "num_query_groups num_experts_per_tok moe_topk moe_k moe_top_k zero_expert_num num_experts_per_token top_k_experts "
    "o_groups index_topk_blocks type_vocab_size linear_num_key_heads num_kv_shared_layers crossattention_k depth "
    "num_layers_per_stack make_ngram_vocab_size_divisible_by split_ngram_parts num_global_layers "
    "max_num_tiles max_window_layers scale_emb",
    1: "topk_group n_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
    "num_dense_layers mamba_n_groups n_groups conf_num_hidden_layers num_lstm_layers num_mem_blocks index_local_blocks",
    8: "head_dim dim_head attention_head_size d_kv d_head kv_channels swa_head_dim global_head_dim attention_head_dim "
    "qk_rope_head_dim v_head_dim qk_nope_head_dim o_lora_rank index_block_size linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size state_size chunk_size ssm_state_size "
    "mamba_num_heads mamba_head_dim mamba_headdim n_mamba_heads hidden_size_per_layer_input laurel_rank codebook_dim "
    "vector_quantization_hidden_dimension adapter_rank query_pre_attn_scalar",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff dff dim_ff ffn_hidden_size d_inner "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size mamba_d_ssm encoder_hash_byte_group_vocab mlp_dim "
    "conv_output_size max_source_positions",
    16: "router_hidden_size kv_lora_rank q_lora_rank qk_head_dim index_head_dim index_n_heads ple_embed_dim hc_lowrank "
    "image_size num_position_embeddings output_channels crop_size downsample_hidden_size pronunciation_vocab_size "
    "block_multiple_of dim_model_base",
    512: "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len context_length model_max_length",
    200: "ngram_vocab_size_base",
    0: "num_nextn_predict_layers encoder_no_repeat_ngram_size",
}
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}
WINDOWS = {
    "sliding_window",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "sliding_window_size",
    "attention_window_size",
    "keep_window_size",
    "local_attention_window_len",
    "index_topk",
    "log_scaling_n_floor",
    "floor_scale",
    "rel_extent",
}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# What is no weight matrix and must stay as the model initializes it.
KEPT = ("A_log", "dt_bias", "time_", "rnn_param")

DOTS3_NOTE = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "head_dim": 16, "sliding_window": WINDOW, "swa_qk_rope_head_dim": 8, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8, "layer_types": ["indexed_attention"] * 2 + ["sliding_attention"] * 2,
}  # fmt: skip
FIXES: dict[str, Callable[[Any, Any], None]] = {}


def make_model(model_type: str, seed: int = 0, mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING, **overrides: Any) -> Any:
    """Return a tiny random model in float32.

    Args:
        model_type (`str`): as registered.
        seed (`int`): of the weights.
        mapping (`Mapping`): from a config's class to the model's.
        **overrides: set on the text config at the end; `window` sets all windows.

    Raises:
        Exception: whatever the model's class raises, if there is no tiny one; `ValueError` for one that is not tiny.
    """
    config = make_config(model_type, **overrides)
    config._attn_implementation = None
    model_class = mapping[type(config)]
    wanted = model_class.config_class
    if wanted is not None and not isinstance(config, wanted) and isinstance(config.get_text_config(), wanted):
        config = config.get_text_config()
    with torch.device("meta"):
        num_parameters = sum(weight.numel() for weight in model_class(copy.deepcopy(config)).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"too big: {num_parameters} parameters")
    torch.manual_seed(seed)
    model = model_class(config).eval().float()
    widen(model, seed)
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(model.generation_config, name, None)
    model.generation_config.no_repeat_ngram_size = None
    return model


def make_config(model_type: str, **overrides: Any) -> Any:
    """Return the config of `make_model`."""
    window = overrides.pop("window", WINDOW)
    config: Any = CONFIG_MAPPING[model_type](**(DOTS3_NOTE if model_type == "dots3_note_text" else {}))
    shrink(config, window)
    if not getattr(config, "is_encoder_decoder", False) and (
        hasattr(config, "is_decoder") or model_type in ("bert", "electra")
    ):
        put(config, is_decoder=True)
    text = config.get_text_config()
    put(text, **SPECIAL_IDS)
    if hasattr(text, "tie_word_embeddings") and model_type not in ("zamba", "zamba2"):
        put(text, tie_word_embeddings=False)
        put(config, tie_word_embeddings=False)
    if model_type in FIXES:
        FIXES[model_type](config, text)
    put(text, **overrides)
    return config


def put(config: Any, **values: Any) -> None:
    """Set attributes past the class's own checks."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def shrink(config: Any, window: int) -> None:
    """Make all sizes of a config, and of the configs in it, small."""
    num_layers = next((vars(config)[name] for name in LAYER_COUNTS if isinstance(vars(config).get(name), int)), None)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == "dtype":
            continue
        if hasattr(value, "to_dict"):
            shrink(value, window)
            continue
        is_size = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, list | tuple) and num_layers and len(value) == num_layers > NUM_LAYERS:
            put(config, **{name: shortened(list(value))})
        elif is_size and name in WINDOWS:
            put(config, **{name: window})
        elif is_size and name in SMALL:
            put(config, **{name: SMALL[name]})
        elif is_size and name in SPECIAL_IDS:
            put(config, **{name: SPECIAL_IDS[name]})
        elif is_size and name.endswith(("_token_id", "_token_index")) and value >= VOCAB_SIZE:
            put(config, **{name: 100 + sum(map(ord, name)) % 20})
        elif name.endswith("eos_token_id") and isinstance(value, list | tuple):
            put(config, **{name: SPECIAL_IDS["eos_token_id"]})
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]


def shortened(values: list[Any]) -> list[Any]:
    """Return as many values as there are layers, of every kind at least one where that is possible."""
    head = values[:NUM_LAYERS]
    missing = [value for value in dict.fromkeys(map(repr, values)) if value not in list(map(repr, head))]
    if len(missing) < NUM_LAYERS:
        for place, kind in enumerate(missing):
            head[-1 - place] = next(value for value in values if repr(value) == kind)
    return head


@torch.no_grad()
def widen(model: Any, seed: int = 0, gain: float = 1.6) -> None:
    """Draw weights anew, wide enough that every token matters."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or name.endswith(".D") or any(kept in name for kept in KEPT):
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2 and any(part in name for part in ("embed", "wte", "wpe", "shared.weight")):
            weight.copy_(noise * 0.7)
        elif weight.dim() < 2:
            weight.add_(noise * 0.1)
        else:
            is_expert = weight.dim() == 3 and "expert" in name
            width = weight.shape[1] if is_expert else math.prod(weight.shape[1:])
            weight.copy_(noise * gain * (2.0 if "lm_head" in name else 1.0) / math.sqrt(max(width, 1)))


def fix(*model_types: str) -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    """Register what some types demand; the function gets the config and its text config."""

    def register(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        FIXES.update(dict.fromkeys(model_types, function))
        return function

    return register


@fix("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
     "kimi_linear", "longcat_flash", "minicpm3", "youtu")  # fmt: skip
def _latent(config: Any, text: Any) -> None:
    put(text, num_key_value_heads=4)
    if config.model_type == "deepseek_v2":
        put(text, num_experts_per_tok=2, topk_method="greedy")


@fix("dots3_note_text")
def _dots3_note(config: Any, text: Any) -> None:
    put(text, head_dim=16, num_key_value_heads=4)


@fix("qwen2_vl", "qwen2_5_vl", "glm4v")
def _vision(config: Any, text: Any) -> None:
    text.rope_parameters["mrope_section"] = [1, 1, 2]
    put(config.vision_config, embed_dim=32, hidden_size=32, num_heads=4, depth=2, out_hidden_size=32, intermediate_size=64)
    put(config.vision_config, mlp_ratio=2)


@fix("gemma3")
def _image_tokens(config: Any, text: Any) -> None:
    put(config, mm_tokens_per_image=4)


@fix("lfm2", "lfm2_moe", "lfm2_vl")
def _lfm2(config: Any, text: Any) -> None:
    put(text, layer_types=["conv", "full_attention"] * 2, full_attn_idxs=[1, 3], num_dense_layers=1)


@fix("llama4", "llama4_text")
def _llama4(config: Any, text: Any) -> None:
    put(text, moe_layers=[1, 3], no_rope_layers=[1, 1, 1, 0], layer_types=["chunked_attention"] * 3 + ["full_attention"])


@fix("bamba")
def _bamba(config: Any, text: Any) -> None:
    put(text, attn_layer_indices=[1, 3])


@fix("granitemoehybrid")
def _granite(config: Any, text: Any) -> None:
    put(text, layer_types=["linear_attention", "full_attention"] * 2)


@fix("jamba")
def _jamba(config: Any, text: Any) -> None:
    put(text, attn_layer_period=2, attn_layer_offset=1)


@fix("zamba", "zamba2")
def _zamba(config: Any, text: Any) -> None:
    kinds = ["linear_attention", "linear_attention", "hybrid"] * 2
    heads = 8 if config.model_type == "zamba2" else 2
    put(text, num_hidden_layers=6, layers_block_type=kinds, hybrid_layer_ids=[2, 5], attention_hidden_size=64, kv_channels=8)
    put(text, attention_head_dim=16, num_key_value_heads=4, num_query_groups=4, mamba_headdim=8, n_mamba_heads=heads)


@fix("mamba2")
def _mamba2(config: Any, text: Any) -> None:
    put(text, num_heads=8, head_dim=8)


@fix("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper",
     "prophetnet")  # fmt: skip
def _bart(config: Any, text: Any) -> None:
    is_prophet = config.model_type == "prophetnet"
    put(config, **({"num_encoder_layers": 4} if is_prophet else {"encoder_layers": 4, "num_hidden_layers": 4}))


@fix("dbrx")
def _dbrx(config: Any, text: Any) -> None:
    put(config.attn_config, rope_theta=10000.0, clip_qkv=8.0)


@fix("cohere_compass_text")
def _compass(config: Any, text: Any) -> None:
    sliding = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    put(text, layer_types=["sliding_attention", "full_attention"] * 2)
    put(text, rope_parameters={"sliding_attention": sliding, "full_attention": None})


@fix("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")
def _head_dim(config: Any, text: Any) -> None:
    put(text, head_dim=8, num_key_value_heads=2)


@fix("dots1")
def _dots1(config: Any, text: Any) -> None:
    put(text, n_routed_experts=4, num_local_experts=4, n_shared_experts=1, num_experts_per_tok=2, head_dim=8)


@fix("gemma3n_text", "gemma4_text", "gemma4", "gemma4_unified", "gemma4_unified_text")
def _gemma4(config: Any, text: Any) -> None:
    put(text, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)


@fix("hrm_text")
def _hrm(config: Any, text: Any) -> None:
    put(text, num_layers_per_stack=2, H_cycles=2, L_cycles=3, num_hidden_layers=16)


@fix("qwen4_exp_text", "qwen4_exp")
def _qwen4(config: Any, text: Any) -> None:
    put(text, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16, indexer_compress_ratio=4)


@fix("reformer")
def _reformer(config: Any, text: Any) -> None:
    put(text, axial_pos_embds_dim=(16, 16), axial_pos_shape=(16, 32))


@fix("xlstm")
def _xlstm(config: Any, text: Any) -> None:
    put(text, chunk_size=64, num_heads=4, qk_dim_factor=0.5, v_dim_factor=1.0)


@fix("xmod")
def _xmod(config: Any, text: Any) -> None:
    put(text, default_language="en_XX")


@fix("emu3", "dots3_note")
def _padded(config: Any, text: Any) -> None:
    put(config, pad_token_id=0)

"""Tiny random checkpoints in the families' own layouts: their config.json and the names in their weights files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.diffusion import references

WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 2, 4, 2, 4
VOCAB = 40
QWEN = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "max_window_layers": LAYERS,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
}


@dataclass
class Family:
    """What a family's files look like, and its rule."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    logits: Callable[[references.Tensors, list[int], torch.Tensor], torch.Tensor]
    mask_token_id: int
    logit_offset: int
    attention: str = "full"
    block_length: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, seed: int = 0, **changes: Any) -> references.Tensors:
        """Write the checkpoint; fields of config.json may be changed, `None` takes one out."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            tensor = torch.randn(shape, generator=generator) * (0.03 if shape[-1] >= 256 else 0.3)
            tensors[name] = 1 + tensor if ("norm" in name and name.endswith("weight")) or ".ln_" in name else tensor
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        fields = {name: value for name, value in {**self.config, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))
        return tensors


def llama_shapes(name: Callable[[str], str], *, biases: str = "", qk_norm: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a body of Llama's kind under a family's names."""
    widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: dict[str, tuple[int, ...]] = {name("embed"): (VOCAB, WIDTH), name("norm"): (WIDTH,), name("head"): (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        for part, width in widths.items():
            shapes[name(f"{layer}.{part}.weight")] = (width, WIDTH)
            if part in biases:
                shapes[name(f"{layer}.{part}.bias")] = (width,)
            if qk_norm and part != "v":
                shapes[name(f"{layer}.{part}_norm.weight")] = (HEAD_DIM,)
        shapes[name(f"{layer}.o.weight")] = (WIDTH, HEADS * HEAD_DIM)
        shapes |= {name(f"{layer}.{part}.weight"): (INNER, WIDTH) for part in ("gate", "up")}
        shapes[name(f"{layer}.down.weight")] = (WIDTH, INNER)
        shapes |= {name(f"{layer}.{part}.weight"): (WIDTH,) for part in ("norm1", "norm2")}
    return shapes


def names(top: dict[str, str], layer: str, parts: dict[str, str]) -> Callable[[str], str]:
    """Return a function from a part's plain name to the name in a file."""

    def name(part: str) -> str:
        if part in top:
            return top[part]
        number, kind, end = part.split(".")
        return f"{layer}.{number}.{parts[kind]}.{end}"

    return name


HF_PARTS = {
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"{part}_norm": f"self_attn.{part}_norm" for part in "qkv"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
HF = names(
    {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}, "model.layers", HF_PARTS
)
WRAPPER = names(
    {"embed": "embed_tokens.weight", "norm": "denoise_model.norm.weight", "head": "lm_head.weight"},
    "denoise_model.layers",
    HF_PARTS,
)
LLADA = names(
    {
        "embed": "model.transformer.wte.weight",
        "norm": "model.transformer.ln_f.weight",
        "head": "model.transformer.ff_out.weight",
    },
    "model.transformer.blocks",
    {
        **{part: f"{part}_proj" for part in "qkv"},
        **{f"{part}_norm": f"{part}_norm" for part in "qkv"},
        "o": "attn_out",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
        "norm1": "attn_norm",
        "norm2": "ff_norm",
    },
)


def llama(name: Callable[[str], str], theta: float = 5000.0, eps: float = 1e-6) -> Any:
    """Return the reference of a body of Llama's kind."""
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "theta": theta, "eps": eps}
    return lambda tensors, ids, seen: references.llama_logits(tensors, name, ids, seen, **sizes)


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    at = "denoise_model"
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCAB, WIDTH),
        f"{at}.wpe.weight": (64, WIDTH),
        f"{at}.ln_f.weight": (WIDTH,),
        f"{at}.ln_f.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        for part, (rows, columns) in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
        }.items():
            shapes[f"{at}.h.{layer}.{part}.weight"] = (rows, columns)
            shapes[f"{at}.h.{layer}.{part}.bias"] = (columns,)
        shapes |= {f"{at}.h.{layer}.{norm}.{end}": (WIDTH,) for norm in ("ln_1", "ln_2") for end in ("weight", "bias")}
        shapes[f"{at}.h.{layer}.attn.bias"] = (1, 1, 64, 64)  # the mask of old versions, saved with the weights
    return shapes


def mdlm_shapes() -> dict[str, tuple[int, ...]]:
    condition = 8
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (VOCAB, WIDTH),
        "sigma_map.mlp.0.weight": (condition, 256),
        "sigma_map.mlp.0.bias": (condition,),
        "sigma_map.mlp.2.weight": (condition, condition),
        "sigma_map.mlp.2.bias": (condition,),
        "rotary_emb.inv_freq": (WIDTH // HEADS // 2,),
        "output_layer.norm_final.weight": (WIDTH,),
        "output_layer.linear.weight": (VOCAB, WIDTH),
        "output_layer.linear.bias": (VOCAB,),
        "output_layer.adaLN_modulation.weight": (2 * WIDTH, condition),
        "output_layer.adaLN_modulation.bias": (2 * WIDTH,),
    }
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.norm1.weight": (WIDTH,), f"{at}.norm2.weight": (WIDTH,)}
        shapes |= {f"{at}.attn_qkv.weight": (3 * WIDTH, WIDTH), f"{at}.attn_out.weight": (WIDTH, WIDTH)}
        shapes |= {f"{at}.mlp.0.weight": (4 * WIDTH, WIDTH), f"{at}.mlp.0.bias": (4 * WIDTH,)}
        shapes |= {f"{at}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{at}.mlp.2.bias": (WIDTH,)}
        shapes |= {f"{at}.adaLN_modulation.weight": (6 * WIDTH, condition), f"{at}.adaLN_modulation.bias": (6 * WIDTH,)}
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def qwen(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {**QWEN, "model_type": model_type, "architectures": [architecture], "auto_map": {"AutoModel": "x.Y"}, **more}


LLADA_CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_dropout": 0.0,
    "embedding_size": VOCAB,
    "eos_token_id": 2,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 36,
    "max_sequence_length": 128,
    "mlp_hidden_size": INNER,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 2,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
GPT2_CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "mask_token_id": 37,
    "n_ctx": 64,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": 64,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": VOCAB - 1,
}
MDLM_CONFIG = {
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "cond_dim": 8,
    "dropout": 0.1,
    "hidden_dim": WIDTH,
    "model_length": 64,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "return_dict": False,
    "time_conditioning": False,
    "vocab_size": VOCAB,
}
A2D = {"settings": {"attention": "full", "logit_offset": 0}}
FAMILIES = {
    "dream": Family(
        qwen("Dream", "DreamModel", mask_token_id=33, use_mrope=False), llama_shapes(HF, biases="qkv"), llama(HF), 33, -1
    ),
    "fast-dllm": Family(
        qwen("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", mask_token_id=35, bd_size=4),
        llama_shapes(HF, biases="qkv"),
        llama(HF),
        35,
        -1,
        "block_causal",
        4,
    ),
    "sdar": Family(
        qwen("sdar", "SDARForCausalLM", mask_token_id=34, head_dim=HEAD_DIM, attention_bias=False, fuse_cross_entropy=True),
        llama_shapes(HF, qk_norm=True),
        llama(HF),
        34,
        0,
        "block_causal",
        4,
    ),
    "a2d-qwen2": Family(
        qwen("a2d-qwen2", "A2DQwen2LMHeadModel", mask_token_id=39, tie_word_embeddings=True),
        llama_shapes(HF, biases="qkv"),
        llama(HF),
        39,
        0,
        **A2D,
    ),
    "a2d-qwen3": Family(
        qwen("a2d-qwen3", "A2DQwen3LMHeadModel", mask_token_id=39, head_dim=HEAD_DIM),
        llama_shapes(HF, qk_norm=True),
        llama(HF),
        39,
        0,
        **A2D,
    ),
    "diffullama": Family(
        qwen(
            "llama", "LlamaForCausalLM", mask_token_id=38, use_sliding_window=None, sliding_window=None, max_window_layers=None
        ),
        llama_shapes(WRAPPER),
        llama(WRAPPER),
        38,
        -1,
    ),
    "llada": Family(LLADA_CONFIG, llama_shapes(LLADA), llama(LLADA, eps=1e-5), 36, 0),
    "diffugpt": Family(
        GPT2_CONFIG,
        gpt2_shapes(),
        lambda tensors, ids, seen: references.diffugpt_logits(tensors, ids, seen, num_layers=LAYERS, num_heads=HEADS),
        37,
        -1,
    ),
    "mdlm": Family(
        MDLM_CONFIG,
        mdlm_shapes(),
        lambda tensors, ids, seen: references.mdlm_logits(tensors, ids, seen, num_layers=LAYERS, num_heads=HEADS),
        39,
        0,
    ),
}

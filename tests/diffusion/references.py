"""The families' networks written out once more, in float64 and without any library's layers: what native bodies are held to.

They read tensors by the names in the families' own files, and take for granted nothing but each family's rule: who sees whom,
and which row speaks of which word.
"""

import math
from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]


def seen_by(size: int, attention: str, block_length: int | None) -> torch.Tensor:
    """Return who sees whom in a text, `(size, size)`."""
    seen = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            seen[query, key] = attention == "full" or key // block_length <= query // block_length
    return seen


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attend, all `(H, L, width)`."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def rotated(states: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn the pairs `(i, i + width / 2)` of `(H, L, width)` by their positions' angles, as complex numbers."""
    half = states.shape[-1] // 2
    angles = torch.arange(states.shape[1]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    centred = states - states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def llama_logits(
    tensors: Tensors,
    name: Callable[[str], str],
    ids: list[int],
    seen: torch.Tensor,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    theta: float,
    eps: float,
) -> torch.Tensor:
    """Return the logits `(L, V)` of a body of Llama's kind, with the biases and norms that its tensors have."""
    of = {key: tensor.double() for key, tensor in tensors.items()}
    states = of[name("embed")][ids]

    def project(part: str, states: torch.Tensor) -> torch.Tensor:
        result = states @ of[name(f"{part}.weight")].T
        return result + of[name(f"{part}.bias")] if name(f"{part}.bias") in of else result

    for layer in range(num_layers):
        normed = rms_norm(states, of[name(f"{layer}.norm1.weight")], eps)
        heads = {}
        for part, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
            heads[part] = project(f"{layer}.{part}", normed).unflatten(-1, (count, -1)).transpose(0, 1)
            if name(f"{layer}.{part}_norm.weight") in of:
                heads[part] = rms_norm(heads[part], of[name(f"{layer}.{part}_norm.weight")], eps)
        groups = num_heads // num_kv_heads
        query, key = rotated(heads["q"], theta), rotated(heads["k"], theta).repeat_interleave(groups, 0)
        mixed = softmax_attention(query, key, heads["v"].repeat_interleave(groups, 0), seen)
        states = states + project(f"{layer}.o", mixed.transpose(0, 1).flatten(1))
        normed = rms_norm(states, of[name(f"{layer}.norm2.weight")], eps)
        gate = project(f"{layer}.gate", normed)
        states = states + project(f"{layer}.down", gate * gate.sigmoid() * project(f"{layer}.up", normed))
    head = name("head") if name("head") in of else name("embed")
    return rms_norm(states, of[name("norm")], eps) @ of[head].T


def gelu(states: torch.Tensor) -> torch.Tensor:
    return 0.5 * states * (1 + torch.tanh(math.sqrt(2 / math.pi) * (states + 0.044715 * states**3)))


def diffugpt_logits(tensors: Tensors, ids: list[int], seen: torch.Tensor, *, num_layers: int, num_heads: int) -> torch.Tensor:
    """Return the logits `(L, V)` of DiffuGPT, whose linear layers are stored the other way round."""
    of = {key: tensor.double() for key, tensor in tensors.items()}
    embedding = of["embed_tokens.weight"]
    states = embedding[ids] + of["denoise_model.wpe.weight"][: len(ids)]
    for layer in range(num_layers):
        at = f"denoise_model.h.{layer}"
        normed = layer_norm(states, of[f"{at}.ln_1.weight"], of[f"{at}.ln_1.bias"])
        joined = normed @ of[f"{at}.attn.c_attn.weight"] + of[f"{at}.attn.c_attn.bias"]
        query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in joined.chunk(3, -1))
        mixed = softmax_attention(query, key, value, seen).transpose(0, 1).flatten(1)
        states = states + mixed @ of[f"{at}.attn.c_proj.weight"] + of[f"{at}.attn.c_proj.bias"]
        normed = layer_norm(states, of[f"{at}.ln_2.weight"], of[f"{at}.ln_2.bias"])
        inner = gelu(normed @ of[f"{at}.mlp.c_fc.weight"] + of[f"{at}.mlp.c_fc.bias"])
        states = states + inner @ of[f"{at}.mlp.c_proj.weight"] + of[f"{at}.mlp.c_proj.bias"]
    return layer_norm(states, of["denoise_model.ln_f.weight"], of["denoise_model.ln_f.bias"]) @ embedding.T


def mdlm_logits(tensors: Tensors, ids: list[int], seen: torch.Tensor, *, num_layers: int, num_heads: int) -> torch.Tensor:
    """Return the logits `(L, V)` of MDLM at noise level 0."""
    of = {key.removeprefix("backbone."): tensor.double() for key, tensor in tensors.items()}

    def linear(part: str, states: torch.Tensor) -> torch.Tensor:
        result = states @ of[f"{part}.weight"].T
        return result + of[f"{part}.bias"] if f"{part}.bias" in of else result

    def silu(states: torch.Tensor) -> torch.Tensor:
        return states * states.sigmoid()

    times = 0.0 * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    level = torch.cat([times.cos(), times.sin()])
    condition = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", level))))
    states = of["vocab_embed.embedding"][ids]
    for layer in range(num_layers):
        at = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{at}.adaLN_modulation", condition).chunk(6)
        normed = layer_norm(states, of[f"{at}.norm1.weight"]) * (1 + scale1) + shift1
        query, key, value = (
            part.unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in linear(f"{at}.attn_qkv", normed).chunk(3, -1)
        )
        mixed = softmax_attention(rotated(query, 1e4), rotated(key, 1e4), value, seen).transpose(0, 1).flatten(1)
        states = states + gate1 * linear(f"{at}.attn_out", mixed)
        normed = layer_norm(states, of[f"{at}.norm2.weight"]) * (1 + scale2) + shift2
        states = states + gate2 * linear(f"{at}.mlp.2", gelu(linear(f"{at}.mlp.0", normed)))
    shift, scale = linear("output_layer.adaLN_modulation", condition).chunk(2)
    return linear("output_layer.linear", layer_norm(states, of["output_layer.norm_final.weight"]) * (1 + scale) + shift)

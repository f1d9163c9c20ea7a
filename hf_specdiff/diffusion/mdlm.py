"""MDLM's network in plain torch: a diffusion transformer over a whole text, with none of its hand-written kernels.

Letters: B batch, Q queries, S keys, V vocabulary, D hidden size, H heads. Knows the network and the names of its published
weights; it is called as the host's language models are.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers import PreTrainedConfig
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import rotate_half

ROPE_BASE = 10_000.0
# Of the sinusoids by which the noise level is read.
NUM_FREQUENCIES = 256


class MDLMConfig(PreTrainedConfig):
    """Describe an MDLM network.

    Args:
        vocab_size (`int`): V, the mask among them.
        hidden_size (`int`): D.
        num_hidden_layers (`int`): blocks.
        num_attention_heads (`int`): H.
        cond_dim (`int`): width of the noise level's embedding.
        max_position_embeddings (`int`): tokens of the texts it was trained on.
    """

    model_type = "hf_specdiff_mdlm"

    vocab_size: int = 50258
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    cond_dim: int = 128
    max_position_embeddings: int = 1024


class _Norm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return normed states of the same shape and dtype."""
        return nn.functional.layer_norm(states.float(), states.shape[-1:]).to(states.dtype) * self.weight


class _Block(nn.Module):
    """One layer, its two halves scaled and shifted by the noise level."""

    def __init__(self, config: MDLMConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.norm1 = _Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = _Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * width)

    def forward(
        self,
        states: torch.Tensor,
        condition: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Run the block over states `(B, Q, D)`; `attention_mask` `(B or 1, 1, Q, S)` is added to the scores."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        mixed = self._attend(self.norm1(states) * (1 + scale1) + shift1, rotation, attention_mask, past_key_values)
        states = states + gate1 * self.attn_out(mixed)
        return states + gate2 * self.mlp(self.norm2(states) * (1 + scale2) + shift2)

    def _attend(
        self,
        states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        heads = self.attn_qkv(states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = rotation
        query, key = (part * cos + rotate_half(part) * sin for part in heads[:2])
        value = heads[2]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
        return mixed.transpose(1, 2).flatten(2)


class _Output(nn.Module):
    """The head."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.norm_final = _Norm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_size)

    def forward(self, states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, Q, V)`."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(states) * (1 + scale) + shift)


class MDLMForMaskedLM(PreTrainedModel):
    """MDLM without time conditioning: the noise level is always read as 0, as in the published checkpoints.

    Args:
        config (`MDLMConfig`): its shape.

    Source: arXiv:2406.07524.
    """

    config_class = MDLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["_Block"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sigma_map = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, config.cond_dim), nn.SiLU(), nn.Linear(config.cond_dim, config.cond_dim)
        )
        self.blocks = nn.ModuleList([_Block(config, i) for i in range(config.num_hidden_layers)])
        self.output_layer = _Output(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run one pass.

        Args:
            input_ids (`torch.Tensor` of shape `(B, Q)`, int64): tokens and masks.
            attention_mask (`torch.Tensor` of shape `(B or 1, 1, Q, S)`, *optional*): added to the scores; `None`: everybody
                sees everybody.
            position_ids (`torch.Tensor` of shape `(B or 1, Q)`, int64, *optional*): by default they go on from the cache.
            past_key_values (`transformers.Cache`, *optional*): keys and values are appended to it.
            logits_to_keep (`int`): logits of the last positions only; 0: of all.
            **kwargs: what hosts pass to every model; ignored.

        Returns:
            `CausalLMOutputWithPast`: `logits` `(B, Q or fewer, V)`.
        """
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        states = self.embed_tokens(input_ids)
        # The sinusoids of noise level 0: cosines first.
        level = torch.zeros(NUM_FREQUENCIES, dtype=states.dtype, device=states.device)
        level[: NUM_FREQUENCIES // 2] = 1
        condition = nn.functional.silu(self.sigma_map(level))
        rotation = self._rotation(position_ids, states.dtype)
        for block in self.blocks:
            states = block(states, condition, rotation, attention_mask, past_key_values)
        return CausalLMOutputWithPast(
            logits=self.output_layer(states[:, -logits_to_keep:], condition), past_key_values=past_key_values
        )

    def _rotation(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of every position, each `(B or 1, 1, Q, D / H)`."""
        width = self.config.hidden_size // self.config.num_attention_heads
        exponents = torch.arange(0, width, 2, device=position_ids.device).float() / width
        angles = position_ids[:, None, :, None].float() / ROPE_BASE**exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

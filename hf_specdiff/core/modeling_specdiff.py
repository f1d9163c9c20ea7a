"""The drafter network: a masked-diffusion transformer over one window, conditioned on tokens or on the target's features.

Letters: B batch, C new context tokens, Q window slots, S all keys, V vocabulary, D hidden size, K target layers read. Knows one
forward pass and how the host's stock loop calls a drafter; knows nothing of acceptance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Cache
from transformers import GenerationConfig
from transformers import GenerationMixin
from transformers import LogitsProcessorList
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward
from transformers.utils import ModelOutput

from .candidate_generator import SpecDiffCandidateGenerator
from .candidate_generator import check_stock_call
from .configuration_specdiff import SpecDiffConfig
from .files import check_drafted_ids
from .files import check_finite
from .files import check_weight_files
from .heads import CandidateSelector
from .heads import ConfidenceHead
from .heads import MarkovHead
from .heads import WindowConvolution
from .repository import RepositoryMixin
from .text import check_prompt


@dataclass
class SpecDiffDrafterOutput(ModelOutput):
    """What one pass of the network returns.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, C + Q, D)` or `(B, Q, D)`): after the final norm; token-conditioned
            drafters return the context's states too.
        logits (`torch.Tensor` of shape `(B, R, V)`, *optional*): token-conditioned only, for the last R positions.
        past_key_values (`transformers.Cache`, *optional*): the cache that was passed, context and window appended.
    """

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None


class Rotations:
    """Rotary position embeddings of one pass.

    Args:
        cos (`torch.Tensor` of shape `(B or 1, 1, n, head_dim)`): cosines of the keys' positions.
        sin (`torch.Tensor` of shape `(B or 1, 1, n, head_dim)`): sines, those of a head's first half negated.
        num_queries (`int`): the queries are the last of the keys.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, num_queries: int) -> None:
        self.cos, self.sin = cos, sin
        self.query_cos, self.query_sin = cos[:, :, -num_queries:], sin[:, :, -num_queries:]

    def of_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Turn keys `(B, heads, n, head_dim)`."""
        return states * self.cos + states.roll(states.shape[-1] // 2, dims=-1) * self.sin

    def of_queries(self, states: torch.Tensor) -> torch.Tensor:
        """Turn queries `(B, heads, num_queries, head_dim)`."""
        return states * self.query_cos + states.roll(states.shape[-1] // 2, dims=-1) * self.query_sin


class SpecDiffAttention(nn.Module):
    """Attention of the window over cached context, new context and itself.

    New context enters either as extra keys and values only (`context_states`, feature-conditioned), or as ordinary queries
    in front of the window (token-conditioned).
    """

    def __init__(self, config: SpecDiffConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # who sees whom is the mask's business
        self.window = config.layer_window(layer_idx)
        self.is_causal_window = config.is_causal_layer(layer_idx)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context_states: torch.Tensor | None,
        rotations: Rotations,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, Q, D)`): the queries.
            context_states (`torch.Tensor` of shape `(B, C, D)`, *optional*): keys and values in front of the queries' own.
            rotations (`Rotations`): of the `C + Q` keys.
            attention_mask (`torch.Tensor`, *optional*): broadcastable to `(B, 1, Q, S)`; `None`: everyone sees everything.
            past_key_values (`transformers.Cache`, *optional*): keys and values are appended to it.

        Returns:
            `torch.Tensor` of shape `(B, Q, D)`.
        """
        batch_size, num_queries, _ = hidden_states.shape
        sources = hidden_states if context_states is None else torch.cat([context_states, hidden_states], dim=1)
        heads = (batch_size, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(batch_size, num_queries, *heads[1:])).transpose(1, 2)
        key = self.k_norm(self.k_proj(sources).view(batch_size, sources.shape[1], *heads[1:])).transpose(1, 2)
        value = self.v_proj(sources).view(batch_size, sources.shape[1], *heads[1:]).transpose(1, 2)
        if self.config.rope_interleaved:
            query, key = _pairs_apart(query), _pairs_apart(key)
        query, key = rotations.of_queries(query), rotations.of_keys(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if attention_mask is not None:
            attention_mask = attention_mask[..., -key.shape[2] :]  # the cache of a windowed layer keeps no more than it sees
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(mixed.reshape(batch_size, num_queries, -1))


def _pairs_apart(states: torch.Tensor) -> torch.Tensor:
    """Move the first of each pair of neighbours to a head's first half: the rotation then finds its pairs as usual.

    Queries and keys are moved alike, so their products stay what they are.
    """
    return states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class SpecDiffLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: SpecDiffConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SpecDiffAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_convolutions = config.conv_kernel_size > 0
        if self.has_convolutions:
            self.attention_conv = WindowConvolution(config.hidden_size, config.conv_kernel_size, config.conv_group_size)
            self.mlp_conv = WindowConvolution(config.hidden_size, config.conv_kernel_size, config.conv_group_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context_states: torch.Tensor | None,
        rotations: Rotations,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Run the layer; arguments and result as `SpecDiffAttention.forward`."""
        seen = (context_states, rotations, attention_mask, past_key_values)
        if not self.has_convolutions:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), *seen)
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        read, taps = self.attention_conv.before(self.input_layernorm(hidden_states))
        hidden_states = hidden_states + self.attention_conv.after(self.self_attn(read, *seen), taps)
        read, taps = self.mlp_conv.before(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.mlp_conv.after(self.mlp(read), taps)


class SpecDiffDrafter(RepositoryMixin, PreTrainedModel, GenerationMixin):
    """A discrete-diffusion drafter.

    Give it to `generate` as `assistant_model`. One network, two conditionings (`SpecDiffConfig.target_layer_ids`): on tokens,
    with an embedding and a head of its own; or on the target's hidden states, with the target's embedding and head and weight
    names as in published DFlash checkpoints.

    Args:
        config (`SpecDiffConfig`): the drafter's shape.

    Source: arXiv:2408.05636; feature conditioning arXiv:2602.06036.
    """

    config_class = SpecDiffConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _no_split_modules = ["SpecDiffLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    # Of speculators' files: the inverse of `d2t`, and what only training needs.
    _keys_to_ignore_on_load_unexpected = [r"^t2d$", r"^d2t$", r"^verifier_"]

    def __init__(self, config: SpecDiffConfig) -> None:
        super().__init__(config)
        if config.is_feature_conditioned:
            num_features = len(config.target_layer_ids or []) * (config.target_hidden_size or config.hidden_size)
            self.fc = nn.Linear(num_features, config.hidden_size, bias=False)
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if config.has_own_embedding:
                self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            if config.has_own_head:
                self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size or config.vocab_size, bias=False)
            if config.has_mask_embedding:
                self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
            if config.draft_vocab_size is not None:
                self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        else:
            num_embeddings = max(config.vocab_size, (config.mask_token_id or 0) + 1)
            self.embed_tokens = nn.Embedding(num_embeddings, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, num_embeddings, bias=False)
        self.layers = nn.ModuleList([SpecDiffLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = _rotary(config)
        size, num_tokens = config.hidden_size, config.draft_vocab_size or config.vocab_size
        if config.markov_rank:
            num_before = num_tokens + 1 if config.markov_reads_drafted else config.vocab_size
            self.markov_head = MarkovHead(num_before, num_tokens, config.markov_rank, size, config.markov_head_type)
        if config.selector_rank:
            self.candidate_selector = CandidateSelector(config.vocab_size, size, config.selector_rank, config.selector_top_k)
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(size + config.markov_rank * config.confidence_head_with_markov)
        self.post_init()
        self._set_assistant_defaults()

    def _set_assistant_defaults(self) -> None:
        """Tell the host's stock loop to ask for one whole window per round, always."""
        config = self.generation_config
        # The host drops what it does not know, `gamma` and the like, from a file that says it was made from a model's config.
        config._from_model_config = False
        if config.num_assistant_tokens is None:
            config.num_assistant_tokens = self.config.max_gamma
        if config.num_assistant_tokens_schedule is None:
            config.num_assistant_tokens_schedule = "constant"
        if config.assistant_confidence_threshold is None:
            config.assistant_confidence_threshold = 0.0

    def window_embeddings(self, window: torch.Tensor, lent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return what a feature-conditioned drafter reads at the slots of a window; `forward` scales it.

        Args:
            window (`torch.Tensor` of shape `(B, Q)`, int64): anchor, revealed tokens and masks.
            lent (`Callable`): the target's embedding, from ids to its raw rows.

        Returns:
            `torch.Tensor` of shape `(B, Q, D)`.
        """
        embeddings = self.embed_tokens(window) if self.config.has_own_embedding else lent(window)
        embeddings = embeddings.to(device=self.norm.weight.device, dtype=self.norm.weight.dtype)
        if self.config.has_mask_embedding:
            is_mask = (window == self.config.mask_token_id).to(embeddings.device)
            embeddings = torch.where(is_mask[..., None], self.mask_embedding, embeddings)
        return embeddings

    @property
    def drafted_ids(self) -> torch.Tensor | None:
        """Ids of the tokens that a reduced vocabulary has, `(draft_vocab_size,)` int64; `None`: every token is drafted."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def window_logits(self, states: torch.Tensor, lent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the logits of a feature-conditioned drafter over the target's vocabulary.

        Args:
            states (`torch.Tensor` of shape `(..., D)`): `last_hidden_state` at the slots that predict.
            lent (`Callable`): the target's head, from states to logits of the tokens that are drafted.

        Returns:
            `torch.Tensor` of shape `(..., V)`: minus infinity for tokens that a reduced vocabulary does not have.
        """
        return self._over_the_vocabulary(self.drafted_logits(states, lent), -torch.inf)

    def drafted_logits(self, states: torch.Tensor, lent: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the logits of the tokens that are drafted alone, in the order of `drafted_ids`.

        Args:
            states (`torch.Tensor` of shape `(..., D)`): as for `window_logits`.
            lent (`Callable`): as for `window_logits`.

        Returns:
            `torch.Tensor` of shape `(..., draft_vocab_size or V)`.
        """
        config = self.config
        logits = self.lm_head(states) if config.has_own_head else lent(states)
        if config.output_multiplier != 1:
            logits = logits * config.output_multiplier
        if config.final_logit_softcapping:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def step_logits(
        self, logits: torch.Tensor, states: torch.Tensor, previous: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of one slot given the token before it, for drafters whose heads know that token.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): of the slot by itself, from `window_logits`; or their columns of the
                `drafted_ids` alone.
            states (`torch.Tensor` of shape `(n, D)`): `last_hidden_state` at the slot.
            previous (`torch.Tensor` of shape `(n,)`, int64): the token before the one that the slot predicts.
            memory (`torch.Tensor` of shape `(n, R)`, *optional*): what this returned for the slot before.

        Returns:
            `tuple`: logits as wide as those given, minus infinity for tokens that are not drafted; and the memory, if the head
                has one.
        """
        if self.config.selector_rank:
            return self.candidate_selector(logits, states, previous), None
        bias, memory = self.markov_head(states, self.rows_before(previous), memory)
        bias = bias if bias.shape[-1] == logits.shape[-1] else self._over_the_vocabulary(bias, 0.0)
        return logits + bias.to(logits.dtype), memory

    def rows_before(self, previous: torch.Tensor) -> torch.Tensor:
        """Return the rows of the Markov head's table that belong to tokens.

        Args:
            previous (`torch.Tensor`, int64): the tokens before.

        Returns:
            `torch.Tensor` of the same shape, int64: the ids themselves, or places in `drafted_ids` and, for tokens that are not
                drafted, the last row.
        """
        if not self.config.markov_reads_drafted:
            return previous
        drafted = self.drafted_ids
        assert drafted is not None  # else nothing would be reduced
        places = torch.searchsorted(drafted, previous.contiguous()).clamp(max=len(drafted) - 1)
        return torch.where(drafted[places] == previous, places, len(drafted))

    def confidence(self, states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return how likely the target is to accept a token that is drawn from a slot's law, by the confidence head.

        Args:
            states (`torch.Tensor` of shape `(n, D)`): `last_hidden_state` at the slot.
            previous (`torch.Tensor` of shape `(n,)`, int64): the token before the one that the slot predicts.

        Returns:
            `torch.Tensor` of shape `(n,)`, float32: from 0 to 1.
        """
        features = states
        if self.config.confidence_head_with_markov:
            features = torch.cat([states, self.markov_head.markov_w1(self.rows_before(previous))], dim=-1)
        return torch.sigmoid(self.confidence_head(features).float())

    def _over_the_vocabulary(self, logits: torch.Tensor, other: float) -> torch.Tensor:
        """Put what a reduced vocabulary's rows say at their tokens' places, `(..., V)`; the other tokens get one value."""
        token_ids = self.drafted_ids
        if token_ids is None:
            return logits
        everything = logits.new_full((*logits.shape[:-1], self.config.vocab_size), other)
        return everything.index_copy_(-1, token_ids.to(logits.device), logits)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a drafter; arguments and result as `transformers.PreTrainedModel.from_pretrained`.

        Weights are read from safetensors files of the folder itself, never unpickled.

        Raises:
            ValueError: if a file is missing or broken, an index names other files, weights are not finite or not those of the
                configuration, or the defaults are not those of its block size. The host would fill missing weights with random
                ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True, got False: pickled weights can run code while they are read.")
        kwargs["use_safetensors"] = True
        try:
            check_weight_files(pretrained_model_name_or_path, kwargs)
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "mismatch" not in str(error):
                raise  # out of memory, for one, says nothing about the files
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a whole drafter, got {str(pretrained_model_name_or_path)!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold all of the drafter's weights, got "
                f"{str(pretrained_model_name_or_path)!r} without {sorted(info['missing_keys'])[:3]}. Is the file cut short, or "
                "the configuration another drafter's?"
            )
        check_finite(model, pretrained_model_name_or_path)
        check_drafted_ids(model, pretrained_model_name_or_path)
        # A repository's `custom_generate` would replace our own `generate`, which takes its arguments by position too.
        vars(model).pop("generate", None)
        model._set_assistant_defaults()  # where the file leaves them open
        model._check_window_defaults()
        return (model, info) if wants_info else model

    def _check_window_defaults(self) -> None:
        """Refuse defaults that ask for more tokens than a window holds: they were written for another block size."""
        most, value = self.config.max_gamma, getattr(self.generation_config, "gamma", None)
        if isinstance(value, int) and value > most:
            raise ValueError(
                f"`gamma` in the drafter's generation_config.json must be at most {most} (`max_gamma`), got {value}. "
                "Which of the two files belongs to these weights?"
            )

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the drafter's own embedding; `None` if it uses the target's."""
        return getattr(self, "embed_tokens", None)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the drafter's own head; `None` if it uses the target's."""
        return getattr(self, "lm_head", None)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        noise_embeds: torch.Tensor | None = None,
        context_hidden_states: torch.Tensor | None = None,
        cached_position_ids: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        window_size: int | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> SpecDiffDrafterOutput:
        """Run one pass over new context and a window.

        Args:
            input_ids (`torch.Tensor` of shape `(B, C + Q)`, int64, *optional*): token-conditioned: new context, then the
                window [anchor, masks].
            attention_mask (`torch.Tensor`, *optional*): `(B, S)`, 0 on padding, over all keys, cached ones included; or
                `(B, 1, queries, S)`, bool, true where a query sees a key, which then is the whole truth (training: many windows
                under one mask). `None`: no padding.
            position_ids (`torch.Tensor` of shape `(B or 1, C + Q)`, int64, *optional*): of new context and window; by default
                they go on from the cache.
            past_key_values (`transformers.Cache`, *optional*): context seen before. Context and window are appended; the caller
                rolls the window back.
            noise_embeds (`torch.Tensor` of shape `(B, Q, D)`, *optional*): feature-conditioned: the target's embeddings of the
                window, its raw rows; the host's own DFlash loop calls with this and the next argument.
            context_hidden_states (`torch.Tensor` of shape `(B, C, K * D)`, *optional*): feature-conditioned: hidden states of
                the new context, joined over the target's layers.
            cached_position_ids (`torch.Tensor` of shape `(B or 1, cached)`, int64, *optional*): positions of what is cached,
                for windowed and causal layers; by default those right before the new ones.
            position_embeddings (`tuple`, *optional*): `position_tables` of `position_ids`, where they are known already.
            window_size (`int`, *optional*): Q, for token-conditioned drafters; by default `block_size`. Context tokens see
                the tokens before them, window slots see everything.
            logits_to_keep (`int`): logits of the last so many positions only; 0 for all.
            **kwargs: what hosts pass to every model (`use_cache` and the like); ignored.

        Returns:
            `SpecDiffDrafterOutput`: the states, and the logits of a token-conditioned drafter.

        Raises:
            ValueError: if the arguments are those of the other conditioning.
        """
        if self.config.is_feature_conditioned:
            if noise_embeds is None:
                raise ValueError(
                    "`noise_embeds` must be given to a feature-conditioned drafter, got `input_ids` alone. It has no embedding "
                    "of its own: use hf_specdiff.generate(target, ..., assistant_model=drafter)."
                )
            hidden_states, window_size = noise_embeds, noise_embeds.shape[1]
            if self.config.input_embedding_scale != 1:
                hidden_states = hidden_states * self.config.input_embedding_scale
            context_states = None
            if context_hidden_states is not None:
                context_states = self.hidden_norm(self.fc(context_hidden_states))
        else:
            if input_ids is None:
                raise ValueError("`input_ids` must be given to a token-conditioned drafter, got none.")
            hidden_states, context_states = self.embed_tokens(input_ids), None
            window_size = min(window_size or self.config.block_size, input_ids.shape[1])

        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        num_new = hidden_states.shape[1] + (0 if context_states is None else context_states.shape[1])
        if position_ids is None:
            position_ids = torch.arange(num_cached, num_cached + num_new, device=hidden_states.device)[None]
        allowed = self._who_sees_whom(attention_mask, hidden_states, num_cached + num_new, window_size)
        masks: dict[tuple[bool, int | None], torch.Tensor | None] = {}
        tables = self.position_tables(hidden_states, position_ids) if position_embeddings is None else position_embeddings
        rotations = Rotations(*tables, hidden_states.shape[1])
        for layer in self.layers:
            kind = (layer.self_attn.is_causal_window, layer.self_attn.window)
            if kind not in masks:
                seen = allowed
                if kind != (False, None):
                    key_positions = _of_keys(position_ids, cached_position_ids, num_cached)
                    seen = self._narrowed(allowed, key_positions, hidden_states.shape[1], *kind)
                masks[kind] = self._prepare_mask(seen, hidden_states)
            hidden_states = layer(hidden_states, context_states, rotations, masks[kind], past_key_values)
        hidden_states = self.norm(hidden_states)
        logits = None
        if not self.config.is_feature_conditioned:
            logits = self.lm_head(hidden_states[:, -logits_to_keep:])[..., : self.config.vocab_size]
        return SpecDiffDrafterOutput(hidden_states, logits, past_key_values)

    def position_tables(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables that `Rotations` is made of.

        Args:
            states (`torch.Tensor`): of the device and dtype that they shall have.
            position_ids (`torch.Tensor` of shape `(B or 1, n)`, int64): positions.

        Returns:
            `tuple`: cosines and sines, `(B or 1, 1, n, head_dim)` each.
        """
        cos, sin = self.rotary_emb(states, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)

    @property
    def has_fixed_rotations(self) -> bool:
        """Whether a position is embedded alike however long the text is."""
        return "dynamic" not in self.rotary_emb.rope_type and self.rotary_emb.rope_type != "longrope"

    def _who_sees_whom(
        self, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor, num_keys: int, window_size: int
    ) -> torch.Tensor | None:
        """Return which queries see which keys where a layer has no limits of its own, `(B or 1, 1, Q, S)` bool; `None`: all.

        Queries: context tokens (if any), then window slots. Keys: cached context, new context, window. A context query sees
        the keys up to itself; a window query sees all; nobody sees padding; everybody sees itself.
        """
        num_queries = hidden_states.shape[1]
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        if attention_mask is None and num_queries == window_size:
            return None
        own_key = torch.arange(num_keys - num_queries, num_keys, device=hidden_states.device)[:, None]
        keys = torch.arange(num_keys, device=hidden_states.device)[None]
        allowed = (keys <= own_key) | (own_key >= num_keys - window_size)
        if attention_mask is not None:
            # A query on padding would otherwise see nothing at all, and its softmax would be NaN.
            allowed = (allowed & attention_mask[:, None].bool()) | (keys == own_key)
        return allowed.view(-1, 1, num_queries, num_keys)

    def _narrowed(
        self,
        allowed: torch.Tensor | None,
        key_positions: torch.Tensor,
        num_queries: int,
        is_causal: bool,
        window: int | None,
    ) -> torch.Tensor | None:
        """Return who sees whom in a layer that is causal or windowed; `key_positions` `(B or 1, S)`, the queries' the last."""
        keys = key_positions[:, None, None, :]
        queries = key_positions[:, None, -num_queries:, None]
        seen = keys <= queries if is_causal else torch.ones_like(keys <= queries)
        if window is not None and self.config.window_from_anchor:
            if allowed is not None and num_queries > self.config.block_size:
                raise ValueError("`window_from_anchor` must be False where many windows share a pass, got True.")
            seen = seen & (queries[:, :, :1] - keys < window)
        elif window is not None:
            seen = seen & (queries - keys < window) & (keys - queries < window)
        return seen if allowed is None else seen & allowed

    def _prepare_mask(self, allowed: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the mask in the form that the attention implementation reads, `(B or 1, 1, Q, S)`, or `None`."""
        if allowed is None:
            return None
        implementation = self.config._attn_implementation or "eager"
        if "flash" in implementation:
            raise ValueError(
                f"`attn_implementation` {implementation!r} reads no mask, and this pass needs one (padding, causal or windowed "
                "layers, or context tokens of a token-conditioned drafter). Load the drafter with attn_implementation='sdpa'."
            )
        if implementation == "sdpa":
            return allowed
        # Eager and flex attention add the mask to the scores.
        return torch.zeros_like(allowed, dtype=hidden_states.dtype).masked_fill(~allowed, torch.finfo(hidden_states.dtype).min)

    def _window_arguments(self, max_new_tokens: int | None) -> dict[str, Any]:
        """Return the arguments of speculation for a window of at most so many tokens, to be met with the ratio rule."""
        # The host's schedules may ask for more than a window holds.
        most = self.config.max_gamma if max_new_tokens is None else min(max_new_tokens, self.config.max_gamma)
        default = getattr(self.generation_config, "gamma", None)
        # "auto" is a choice per round, which the stock loop leaves to nobody: it gets the whole window.
        gamma = min(most, default) if isinstance(default, int) else most
        steps = getattr(self.generation_config, "num_denoising_steps", None) or 1
        return {"gamma": gamma, "num_denoising_steps": min(steps, gamma), "draft_shape": "chain", "acceptance": "ratio"}

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Draft one window; what the host's stock loop calls when the drafter is its `assistant_model`.

        Args:
            inputs (`torch.Tensor` of shape `(B, L)`, int64, *optional*): committed text; or `input_ids`.
            generation_config (`GenerationConfig`, *optional*): the target's; says whether to sample.
            logits_processor (`list`, *optional*): the target's processors.
            input_ids (`torch.Tensor` of shape `(B, L)`, int64, *optional*): committed text.
            max_new_tokens (`int`, *optional*): most tokens to draft; never more than a window holds.
            attention_mask (`torch.Tensor` of shape `(B, L)`, int64, *optional*): 0 on left padding.
            past_key_values (`transformers.Cache`, *optional*): what the last call returned.
            **kwargs: what else the host passes; the drafter has no use for it.

        Returns:
            `GenerateDecoderOnlyOutput`: `sequences` (text and draft), `scores` (for each drafted token the log-probabilities it
            was really drawn from, a point mass for argmax drafts) and `past_key_values`.

        Raises:
            ValueError: for a feature-conditioned drafter, which this loop never shows the target; for an empty prompt or one
                with a mask that the target cannot read; for settings that would not be lossless, and for processors that carry
                a state, which rejected tokens spoil in the host's loop.

        Lossless when: the host applies the ratio test to `scores`, as it does; settings for which it would not be are refused.
        """
        if self.config.is_feature_conditioned:
            raise ValueError(
                "`assistant_model` must be a token-conditioned drafter in transformers' own loop, got a feature-conditioned "
                "one: that loop never shows it the target's hidden states. Use hf_specdiff.generate(target, ..., "
                "assistant_model=drafter), hf_specdiff.attach(target) or custom_generate=<the drafter's Hub repository>."
            )
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None or input_ids.shape[-1] == 0:
            raise ValueError("`input_ids` must hold at least one token, got none.")
        check_stock_call(max_new_tokens, logits_processor, kwargs.get("inputs_embeds"))
        if past_key_values is None:
            check_prompt(input_ids, self.config.mask_token_id, self.config.vocab_size)
        generator = SpecDiffCandidateGenerator(
            self,
            generation_config or GenerationConfig(),
            logits_processor=LogitsProcessorList(logits_processor or []),
            model_kwargs={"attention_mask": attention_mask},
            speculation=self._window_arguments(max_new_tokens),
            past_key_values=past_key_values,
        )
        sequences, scores = generator.get_candidates(input_ids)
        assert scores is not None  # the ratio rule was asked for, so a draft without a prefix law has been refused
        sequences, scores = generator.without_what_fails(input_ids, sequences, scores)
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(scores.unbind(dim=1)),
            past_key_values=generator.drafter.cache,
        )


def _of_keys(position_ids: torch.Tensor, cached_position_ids: torch.Tensor | None, num_cached: int) -> torch.Tensor:
    """Return the positions of cached and new keys, `(B or 1, S)`; by default the cached ones are right before the new."""
    if cached_position_ids is None:
        cached_position_ids = position_ids[:, :1] + torch.arange(-num_cached, 0, device=position_ids.device)
    return torch.cat([cached_position_ids.expand(len(position_ids), -1), position_ids], dim=1)


def _rotary(config: SpecDiffConfig) -> nn.Module:
    """Return the rotary embedding, or say which parameters the host's formula fails on."""
    try:
        return Qwen3RotaryEmbedding(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"`rope_parameters` must be what their `rope_type` needs, got {str(config.rope_parameters)[:100]} "
            f"({type(error).__name__}: {error})."
        ) from error

"""`DiffusionDrafter`: any masked diffusion language model as a drafter's network.

Letters: B batch, Q queries of a pass, W window slots, S keys, V vocabulary. Knows how a family of such models reads a window:
who sees whom, and which row of the logits speaks of which token.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers import GenerationConfig
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_specdiff.core.checks import MOST_PADDING
from hf_specdiff.core.checks import SPECIAL_IDS
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.masked_target import additive
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafterOutput
from hf_specdiff.diffusion.context import CONTEXT_CACHES
from hf_specdiff.diffusion.context import ContextChoice
from hf_specdiff.diffusion.context import LanguageModelDrafter
from hf_specdiff.diffusion.saving import save_drafter
from hf_specdiff.diffusion.trials import check_sees_later_tokens

logger = logging.get_logger(__name__)

ATTENTIONS = ("full", "block_causal")
LOGIT_OFFSETS = (0, -1)
# From here on a drafter's pass costs about what a pass of the target does, and drafting cannot pay.
LARGE_SHARE = 0.5
# Tokens of a round by which a speed is foretold; the papers report 4 to 7 for aligned drafters.
EXPECTED_TOKENS = 4


class DiffusionConfig(SpecDiffConfig):
    """What the loop asks of any drafter, filled in from a diffusion language model's body."""

    # Its special ids were its own tokenizer's business: the words of the shared ids are compared where it is loaded.
    is_language_model = True


class DiffusionDrafter(nn.Module):
    """A drafter around a masked diffusion language model; give it to `hf_specdiff.generate` as `assistant_model`.

    Everything that token-conditioned drafters do works with it: chains, trees, joint samples with self-selection, several
    denoising steps, batches, sampling. Its settings decide how often it is right, never what is generated.

    Args:
        body (`transformers.PreTrainedModel`): the language model, called as the host's are, with a mask `(B, 1, Q, S)` that is
            added to its attention scores. `Qwen2ForCausalLM` and its like hold such weights: the mask makes them bidirectional.
        mask_token_id (`int`): the row of its embedding that stands for "not yet known". Never drafted.
        block_size (`int`): slots of a window: the anchor and `block_size - 1` masks. At least 2.
        logit_offset (`int`): which row of the logits speaks of a slot: 0, its own; -1, that of the slot before, for models that
            were made from a causal one and kept its head.
        attention (`str`): `"full"`, or `"block_causal"`: a token sees its own block of `block_length` positions and those
            before.
        block_length (`int`, *optional*): positions of such a block, counted from the text's first token.
        context_cache (`str`): `"exact"`: text and window are read together, as the model was trained, every round anew (of
            block-causal models only the last block is). `"prefix"`: the text attends to the text alone and is kept; it is read
            anew now and then. `"auto"`: what brings more tokens per second, found out in the first rounds.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for. Its vocabulary and special ids are taken
            over, which pipelines compare.
        foreign_ids (`list[int]`): ids that mean something else to the target: never drafted, and read as masks.
        own_ids (`list[int]`, *optional*): for each of the target's tokens, in order, the row of the body's embedding that
            stands for the same word; -1 where none does: such a token is never drafted, and read as a mask, which the body has
            learnt to read as "not known". By default ids mean the same to both.

    Raises:
        TypeError: if `body` is no model.
        ValueError: if a setting is out of range, or `body` does not see later tokens or does not obey masks, which is tried.

    Lossless when: always; see `DenoisingDrafter`.
    Source: arXiv:2408.05636 (MDLM), arXiv:2511.00606 (Dream, DiffuCoder, DiffuLLaMA).
    """

    drafter_class = LanguageModelDrafter

    def __init__(
        self,
        body: PreTrainedModel,
        *,
        mask_token_id: int,
        block_size: int = 16,
        logit_offset: int = 0,
        attention: str = "full",
        block_length: int | None = None,
        context_cache: str = "auto",
        target: Any = None,
        foreign_ids: list[int] | None = None,
        own_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(body, mask_token_id, logit_offset, attention, block_length, context_cache)
        self.body = body.eval()
        self.num_rows = body.config.get_text_config().vocab_size
        self.logit_offset = logit_offset
        self.block_length = block_length
        self.context_cache = "exact" if attention == "block_causal" and context_cache == "auto" else context_cache
        self.choice = ContextChoice()
        self.own_mask_token_id = mask_token_id
        self.config = _config_of(body, mask_token_id, block_size, target, own_ids)
        self.generation_config = GenerationConfig()
        # The host drops what it does not know, `gamma` and the like, from a file that says it was made from a model's config.
        self.generation_config._from_model_config = False
        own = torch.arange(min(self.num_rows, self.config.vocab_size)) if own_ids is None else torch.tensor(own_ids)
        own[torch.isin(own, torch.tensor([mask_token_id, *(foreign_ids or [])]))] = -1
        self.register_buffer("own_ids", own.to(self.device), persistent=False)
        self.is_translated = own_ids is not None and bool(((own >= 0) & (own != torch.arange(len(own)))).any())
        if self.is_translated:
            # In the target's ids the body's mask is a word like others: the loop gets one that is none.
            self.config.mask_token_id = self.config.vocab_size
        check_sees_later_tokens(self)
        if target is not None:
            warn_if_large(body, target)

    @property
    def device(self) -> torch.device:
        """Where ids are to be put."""
        return self.body.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.body.dtype

    def num_parameters(self) -> int:
        """Return how many weights it has."""
        return sum(weight.numel() for weight in self.body.parameters())

    @property
    def drafted_ids(self) -> torch.Tensor | None:
        """Ids of the target's tokens that it can write, `(n,)` int64; `None`: all."""
        drafted = (self.own_ids >= 0).nonzero()[:, 0]
        return None if len(drafted) == self.config.vocab_size else drafted

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save it so that `load_drafter` reads it as it is; of a body with an adapter of peft, the adapter alone.

        Args:
            save_directory (`str` or path): the folder.
        """
        save_drafter(self, save_directory)

    @property
    def hf_device_map(self) -> Any:
        """Where accelerate has put the parts of the body, if it has."""
        return getattr(self.body, "hf_device_map", None)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        window_size: int | None = None,
        text_sees_window: bool = True,
        vocab_size: int | None = None,
        body: Callable[..., Any] | None = None,
    ) -> SpecDiffDrafterOutput:
        """Run the body over new text and a window.

        Args:
            input_ids (`torch.Tensor` of shape `(B, Q)`, int64): new text, then the window [anchor, masks].
            attention_mask (`torch.Tensor` of shape `(B, S)`, bool, *optional*): False on padding, over all keys, cached ones
                included; `None`: no padding.
            position_ids (`torch.Tensor` of shape `(B or 1, Q)`, int64, *optional*): by default they go on from the cache.
            past_key_values (`transformers.Cache`, *optional*): text read before. Text and window are appended; the caller rolls
                the window back.
            window_size (`int`, *optional*): W; by default all of `input_ids`.
            text_sees_window (`bool`): whether text in front of the window sees it, where the model's attention lets it.
            vocab_size (`int`, *optional*): V, tokens of the target; by default the configuration's.
            body (`Callable`, *optional*): what to call in place of its own body: the same one as a trainer has wrapped it.

        Returns:
            `SpecDiffDrafterOutput`: logits `(B, W - 1, V)`: row `i` speaks of window slot `i + 1`; minus infinity for tokens
            that the body does not have or that mean something else to it.
        """
        window_size = window_size or input_ids.shape[1]
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(num_cached, num_cached + input_ids.shape[1], device=input_ids.device)[None]
        seen = self._who_sees_whom(attention_mask, position_ids, num_cached, window_size, text_sees_window)
        # A learned position has no row past the last: the draft may be poor there, the text stays right.
        most = getattr(self.body.config, "n_positions", None)
        outputs = (body or self.body)(
            input_ids=self._own(input_ids),
            attention_mask=additive(seen, self.dtype),
            position_ids=position_ids if most is None else position_ids.clamp(max=most - 1),
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            logits_to_keep=window_size if self.logit_offset else window_size - 1,
        )
        logits = outputs.logits[:, : window_size - 1]
        return SpecDiffDrafterOutput(logits=self._over_the_vocabulary(logits, vocab_size or self.config.vocab_size))

    def _own(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the target's ids as the body's: what it has no word for is "not known"."""
        own = self.own_ids[ids.clamp(max=len(self.own_ids) - 1)].masked_fill(ids >= len(self.own_ids), -1)
        return own.masked_fill(own < 0, self.own_mask_token_id)

    def _over_the_vocabulary(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return the body's logits over the target's tokens, `(..., V)`."""
        own = self.own_ids[:vocab_size]
        logits = logits[..., own.clamp(min=0)] if self.is_translated else logits[..., : len(own)]
        return nn.functional.pad(logits.masked_fill(own < 0, -torch.inf), (0, vocab_size - len(own)), value=-torch.inf)

    def _who_sees_whom(
        self,
        key_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        num_cached: int,
        window_size: int,
        text_sees_window: bool,
    ) -> torch.Tensor:
        """Return which queries see which keys, `(B or 1, Q, S)` bool."""
        num_queries, device = position_ids.shape[1], position_ids.device
        num_keys = num_cached + num_queries
        places = torch.arange(num_keys, device=device)
        is_window = places >= num_keys - window_size
        seen = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=device)
        if not text_sees_window:
            seen = (~is_window | is_window[num_cached:, None])[None]
        if self.block_length is not None:
            # Positions do not count padding.
            cached = places[None, :num_cached] if key_mask is None else key_mask[:, :num_cached].cumsum(dim=1) - 1
            keys = torch.cat([cached.expand(len(position_ids), -1), position_ids], dim=1) // self.block_length
            seen = seen & (keys[:, None, :] <= keys[:, num_cached:, None])
        if key_mask is not None:
            # A query on padding would otherwise see nothing at all, and its softmax would be NaN.
            seen = (seen & key_mask[:, None, :].bool()) | (places == places[num_cached:, None])
        return seen


def warn_if_large(body: Any, target: Any) -> None:
    """Say what a drafter costs that is not small beside its target.

    Args:
        body (`transformers.PreTrainedModel`): the drafter's.
        target (`transformers.PreTrainedModel`): the model it drafts for.
    """
    own, theirs = (sum(weight.numel() for weight in model.parameters()) for model in (body, target))
    share = own / max(theirs, 1)
    if share >= LARGE_SHARE:
        logger.warning(
            f"The diffusion language model has {share:.1f} times the target's weights ({own / 1e6:.0f} million to "
            f"{theirs / 1e6:.0f} million). Where passes cost by their weights a round costs {1 + share:.1f} plain steps: with "
            f"{EXPECTED_TOKENS} tokens a round expect {EXPECTED_TOKENS / (1 + share):.1f} times plain `generate`'s speed, and "
            f"less than plain with fewer than {1 + share:.1f}."
        )


def _check_settings(
    body: Any, mask_token_id: Any, logit_offset: Any, attention: Any, block_length: Any, context_cache: Any
) -> None:
    """Refuse settings that cannot be."""
    if not isinstance(body, nn.Module) or not hasattr(body, "config"):
        raise TypeError(f"`body` must be a model of transformers, got {type(body).__name__}. Load one, or use load_drafter.")
    config = body.config.get_text_config()
    if not isinstance(mask_token_id, int) or not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(
            f"`mask_token_id` must be a row of the body's embedding, 0 to {config.vocab_size - 1}, got {mask_token_id!r}. Pass "
            "the id that the model was trained with."
        )
    for name, value, choices in (
        ("logit_offset", logit_offset, LOGIT_OFFSETS),
        ("attention", attention, ATTENTIONS),
        ("context_cache", context_cache, CONTEXT_CACHES),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}.")
    is_length = isinstance(block_length, int) and block_length > 0
    if is_length != (attention == "block_causal") or (block_length is not None and not is_length):
        raise ValueError(
            f"`block_length` must be a positive integer with attention='block_causal' and None otherwise, got {block_length!r} "
            f"with {attention!r}."
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"`body` must attend to the whole text in every layer, got layers of {', '.join(sorted(kinds))}.")
    implementation = getattr(body.config, "_attn_implementation", None) or "eager"
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"`body` must have an attention that reads masks, got {implementation!r}. Load it with attn_implementation='sdpa'."
        )


def _config_of(body: Any, mask_token_id: int, block_size: int, target: Any, own_ids: Sequence[int] | None) -> DiffusionConfig:
    """Return the configuration that the loop reads, with the target's vocabulary and special ids, if it is known."""
    own = body.config.get_text_config()
    ids = own if target is None else target.config.get_text_config()
    if own_ids is not None:
        _check_own_ids(own_ids, own.vocab_size, None if target is None else ids.vocab_size)
    elif abs(ids.vocab_size - own.vocab_size) > MOST_PADDING:
        raise ValueError(
            f"`body` must have the target's vocabulary of {ids.vocab_size} tokens, but for at most {MOST_PADDING} rows, got "
            f"{own.vocab_size}. Use one with the target's tokenizer, or say with `own_ids` which tokens mean the same."
        )
    num_heads = own.num_attention_heads
    return DiffusionConfig(
        vocab_size=ids.vocab_size if own_ids is None else len(own_ids),
        hidden_size=own.hidden_size,
        intermediate_size=getattr(own, "intermediate_size", None) or 4 * own.hidden_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(own, "head_dim", None) or own.hidden_size // num_heads,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_model=None if target is None else target.config.name_or_path or None,
        **{name: getattr(ids, name, None) for name in SPECIAL_IDS},
    )


def _check_own_ids(own_ids: Sequence[int], num_rows: int, vocab_size: int | None) -> None:
    """Refuse a map of words that is not one of the target's tokens, or leaves the body's embedding."""
    if vocab_size is not None and len(own_ids) != vocab_size:
        raise ValueError(
            f"`own_ids` must hold an id for each of the target's {vocab_size} tokens, got {len(own_ids)} ids. Write -1 where "
            "the body has no such word."
        )
    least, most = min(own_ids, default=-1), max(own_ids, default=-1)
    if least < -1 or most >= num_rows or most < 0:
        raise ValueError(
            f"`own_ids` must hold rows of the body's embedding, 0 to {num_rows - 1}, or -1 for none, got {least} to {most}."
        )

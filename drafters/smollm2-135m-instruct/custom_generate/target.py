"""The target as the loop sees it: a prefill, one pass over each draft, and its cache kept to the committed text.

Letters: B batch, G drafted tokens, V vocabulary, D hidden size, K target layers read. Knows how the host prepares a model's
inputs; knows no drafter and no rule.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers import GenerationConfig
from transformers import GenerationMixin

from .cache import CACHE_NAMES
from .cache import cache_of
from .cache import check_takes_back
from .cache import grouped_heads
from .cache import is_on_cpu
from .cache import most_drafted
from .cache import roll_back
from .cache import start_recording
from .draft import Draft
from .draft import DraftTree
from .features import FIRST_LAYER_INDEX
from .features import Features
from .features import check_states
from .features import layer_output_indices
from .features import target_features
from .text import Text

TOKEN_TYPE_NAMES = ("token_type_ids", "mm_token_type_ids")
# What a model reads whose inputs the host's general preparation would only slice.
INPUT_NAMES = {"past_key_values", "use_cache", "attention_mask", "position_ids", "output_hidden_states", "logits_to_keep"}


@dataclass(slots=True)
class PlainPlace:
    """Where the text stands if nothing is padded and positions are counted: then mask and positions follow from two numbers.

    Attributes:
        length (`int`): slots of the cache that hold committed tokens.
        lag (`int`): the slot of a token less its position; 0 unless positions were passed in.
    """

    length: int
    lag: int


class Target:
    """A causal language model in the middle of a generation: one row, one draft a round, the host's own masks and positions.

    Invariant between rounds: the cache holds the committed text without its last token, the anchor.

    Args:
        model (`transformers.PreTrainedModel`): the target, placed as the user likes.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.
    """

    takes_trees_and_batches = False

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layer_ids: list[int] | None,
    ) -> None:
        self.model = model
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.layer_ids = layer_ids
        self.keeps_states = bool(generation_config.return_dict_in_generate and generation_config.output_hidden_states)
        if self.keeps_states:
            self.model_kwargs["output_hidden_states"] = True
        elif layer_ids is not None:
            self.model_kwargs["output_hidden_states"] = layer_output_indices(layer_ids)
        self._is_on_cpu = is_on_cpu(model)
        self._outputs: Any = None
        self._is_prompt = True  # whether the last pass was the prefill
        self._place: PlainPlace | None = None  # else the host's own bookkeeping is kept up

    @property
    def cache(self) -> Any:
        """The key/value cache, by either of the host's names."""
        return cache_of(self.model_kwargs)

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """All hidden states of the last pass, if the call wants them."""
        return self._outputs.hidden_states if self.keeps_states else None

    def _layer_states(self) -> tuple[torch.Tensor, ...]:
        """Return the last pass's hidden states, indexed as if `layer_output_indices` had been asked for."""
        states = self._outputs.hidden_states
        return states[1 - FIRST_LAYER_INDEX :] if self.keeps_states else states

    def has_room(self, text: Text) -> bool:
        """Return whether, in some row, a drafted token and the target's own both fit under the length limit."""
        max_length = self.generation_config.max_length
        return max_length is None or min(text.lengths) + 1 < max_length

    def cut(self, draft: Draft | DraftTree) -> Draft | DraftTree:
        """Return as much of a draft as one pass may read; of a chain over a quantized cache that may be a part."""
        if isinstance(draft, DraftTree):
            return draft
        most = most_drafted(self.cache)
        return draft if most is None or draft.num_tokens <= most else draft.first(most)

    def prefill(self, text: Text) -> torch.Tensor:
        """Run the prompt.

        Args:
            text (`Text`): the prompt.

        Returns:
            `torch.Tensor` of shape `(B, 1, V)`: raw logits of the token that follows.

        Raises:
            ValueError: for more rows than this target keeps apart; for a cache or hidden states that rounds cannot build on.
        """
        if text.num_rows > 1 and not self.takes_trees_and_batches:
            raise ValueError(f"`text` must be one row for a Target, got {text.num_rows}. Use a MaskedTarget.")
        self._outputs = self.model._prefill(text.tokens, self.generation_config, self.model_kwargs)
        logits = self._outputs.logits[:, -1:].to(text.tokens.device)
        if self.layer_ids is not None:
            width = self.model.config.get_text_config().hidden_size
            check_states(self._layer_states(), self.layer_ids, width, type(self.model).__name__)
        self._start_keeping()
        self._place = self._plain_place(text)
        return logits

    def _start_keeping(self) -> None:
        """Let the cache keep what taking tokens back needs. Sliding layers that do so from the start keep the whole prompt."""
        check_takes_back(getattr(self._outputs, "past_key_values", None), type(self.model).__name__)
        start_recording(self.cache)

    def _plain_place(self, text: Text) -> PlainPlace | None:
        """Return where the prompt ends, or `None` if the host has more to prepare for a pass than to slice its inputs."""
        kwargs = self.model_kwargs
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_plain = self.reads_plain_inputs(text.tokens.device) and (
            mask is None or (mask.dim() == 2 and bool((mask == 1).all()))
        )
        if not is_plain or (positions is not None and positions.dim() != 2):
            return None
        length = self.cache.get_seq_length() if mask is None else mask.shape[1]
        return PlainPlace(length, 0 if positions is None else length - 1 - int(positions[0, -1]))

    def reads_plain_inputs(self, device: torch.device) -> bool:
        """Return whether the host's preparation of a pass would only slice and hand on what it is given on some device."""
        return reads_plain_inputs(self.model, self.model_kwargs, device)

    def verify(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Run anchor and draft in one pass; each drafted token is seen once.

        Args:
            text (`Text`): committed; its last token is the anchor.
            draft (`Draft`): a chain of G >= 0 tokens.

        Returns:
            `torch.Tensor` of shape `(B, G + 1, V)`: raw logits; row `i` follows the text and the first `i` drafted tokens.

        Raises:
            ValueError: for a tree, whose branches the host's masks would let see each other.
        """
        if isinstance(draft, DraftTree):
            raise ValueError("`draft` must be a chain for a Target, got a DraftTree. Use a MaskedTarget.")
        tokens, num_new = torch.cat([text.tokens, draft.tokens], dim=1), draft.num_tokens + 1
        return self._run(self._inputs_of_last(tokens, num_new, draft.num_tokens), num_new, tokens.device)

    def _inputs_of_last(self, tokens: torch.Tensor, num_read: int, num_beyond: int) -> dict[str, Any]:
        """Return the model's inputs for the last `num_read` of `tokens` `(1, n)`, which reach `num_beyond` past the text."""
        if self._place is not None:
            start = self._place.length + 1 + num_beyond - num_read
            return self._plain_inputs(tokens[:, -num_read:], start, self._place.lag)
        return self.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=num_read, is_first_iteration=False, **_resized(self.model_kwargs, num_beyond)
        )

    def _plain_inputs(self, tokens: torch.Tensor, start: int, lag: int) -> dict[str, Any]:
        """Return what the host's general preparation would make for tokens `(1, n)` behind the first `start` slots."""
        end, device = start + tokens.shape[1], tokens.device
        inputs = dict(self.model_kwargs, input_ids=tokens)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = torch.ones(1, end, dtype=inputs["attention_mask"].dtype, device=device)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = torch.arange(start - lag, end - lag, device=device)[None]
        return inputs

    def _run(self, inputs: dict[str, Any], num_tokens: int, device: torch.device) -> torch.Tensor:
        """Run the model over the last `num_tokens` tokens; returns their logits on the text's device."""
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_tokens
        with grouped_heads(self._is_on_cpu, num_tokens):
            self._outputs = self.model(**inputs, return_dict=True)
        self._is_prompt = False
        return self._outputs.logits[:, -num_tokens:].to(device)

    def commit(self, nodes: list[list[int]], num_drafted: int) -> Features | None:
        """Keep what was accepted of the last pass and forget the rest; of the prefill all is kept.

        Args:
            nodes (`list[list[int]]`): for each row, the tokens of the pass to keep, the anchor (0) first. The last token that
                the round added is not among them: it is the next anchor, which no pass has seen.
            num_drafted (`int`): tokens that the pass saw after the anchor.

        Returns:
            `Features`, or `None` if the drafter reads none: hidden states of the kept tokens.
        """
        if self._is_prompt:
            return self._features_of_prompt()
        num_kept = len(nodes[0])
        # The pass wrote the anchor and the draft; of a chain the first ones stay.
        roll_back(self.cache, num_drafted + 1 - num_kept)
        return self._advance(num_kept)

    def select_rows(self, rows: list[int]) -> None:
        """Forget all but some rows of the batch: nothing here, where the single row is never taken away."""

    def finish(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Bring the cache to what plain decoding leaves behind: nothing to do here.

        Args:
            tokens (`torch.Tensor` of shape `(B, L)`, int64): the finished text, as it is given back.

        Returns:
            `torch.Tensor` of shape `(B, n, V)`, *optional*: where rows ended before others, raw logits after each row's last
                token and the padding behind it; `None`: no pass was needed for that.
        """
        return None

    def keep_rows(self) -> None:
        """Let `finish` bring rows back that have ended, because the caller gets what they hold: nothing to do for one row."""

    def release(self) -> None:
        """Give back what the next call can use: nothing here. To be called where the caller does not get the cache."""

    def forget(self, num_tokens: int) -> None:
        """Take back the whole last pass of some number of tokens."""
        roll_back(self.cache, num_tokens)

    def _features_of_prompt(self) -> Features | None:
        """Return the prompt's hidden states, and let mask and positions grow by the token that follows it."""
        if self._place is None:
            self._grow(self._outputs, 1)
        return self._prompt_states()

    def _prompt_states(self) -> Features | None:
        if self.layer_ids is None:
            return None
        states = self._layer_states()
        length = states[layer_output_indices(self.layer_ids)[0]].shape[1]
        features = target_features(states, self.layer_ids, length)
        return Features(features, [length] * features.shape[0])

    def _advance(self, num_tokens: int) -> Features | None:
        """Let mask and positions grow with the text, and read the drafter's features off the pass."""
        if self._place is None:
            self._grow(self._outputs, num_tokens)
        else:
            self._place.length += num_tokens
        if self.layer_ids is None:
            return None
        return Features(target_features(self._layer_states(), self.layer_ids, num_tokens), [num_tokens])

    def _grow(self, outputs: Any, num_tokens: int) -> None:
        """Let mask, positions and token types grow with the text, as the host does it."""
        token_types = {
            name: self.model_kwargs[name]
            for name in TOKEN_TYPE_NAMES
            if name in self.model_kwargs and self.model_kwargs[name] is not None
        }
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=False, num_new_tokens=num_tokens
        )
        # For several tokens the host copies the types of as many earlier ones; plain decoding repeats the last one's.
        self.model_kwargs |= {name: _repeat_last(types, num_tokens) for name, types in token_types.items()}


def fresh_kwargs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Return what `generate` would prepare for a prompt `(1, L)` without padding, to try a model with."""
    names = inspect.signature(model.forward).parameters
    cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    kwargs = {cache_name: cache, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    if "position_ids" in names:
        kwargs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
    return kwargs


def reads_plain_inputs(model: Any, model_kwargs: dict[str, Any], device: torch.device) -> bool:
    """Return whether the host's preparation of a pass would only slice and hand on what it is given.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        model_kwargs (`dict[str, Any]`): what `generate` prepared.
        device (`torch.device`): of the call's inputs.
    """
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    is_general = prepare is GenerationMixin.prepare_inputs_for_generation and not model.is_remote_code()
    return is_general and model_kwargs.keys() <= INPUT_NAMES and device == model.device


def _repeat_last(types: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return token types `(B, L)` longer by `num_tokens` times their last column."""
    return torch.cat([types, types[:, -1:].expand(-1, max(0, num_tokens))], dim=1)


def _resized(model_kwargs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return `model_kwargs` with mask, positions and token types longer by `num_tokens`, or shorter if it is negative."""
    kwargs = dict(model_kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, num_tokens), value=1)
    for name in TOKEN_TYPE_NAMES:
        if kwargs.get(name) is not None:
            kwargs[name] = _repeat_last(kwargs[name], num_tokens)[:, : kwargs[name].shape[1] + num_tokens]
    if positions is not None:
        steps = torch.arange(1, max(0, num_tokens) + 1, device=positions.device)
        positions = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        kwargs["position_ids"] = positions[..., : kwargs["position_ids"].shape[-1] + num_tokens]
    return kwargs

"""The target as the loop sees it: a prefill, one pass over each draft, and its cache kept to the committed text.

Letters: B batch, L committed length, G drafted tokens, V vocabulary, D hidden size, K target layers read. Knows how the host
prepares a model's inputs; knows no drafter and no rule. Imported by the loop.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from .cache import check_can_roll_back
from .cache import roll_back
from .cache import start_recording
from .conditioning import layer_output_indices
from .conditioning import target_features

TOKEN_TYPE_NAMES = ("token_type_ids", "mm_token_type_ids")


class Target:
    """A causal language model in the middle of a generation.

    Invariant between rounds: the cache holds the committed text without its last token, the anchor.

    Args:
        model (`transformers.PreTrainedModel`): the target, placed as the user likes.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.
    """

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
        if layer_ids is not None:
            self.model_kwargs["output_hidden_states"] = layer_output_indices(layer_ids)
        check_can_roll_back(model_kwargs["past_key_values"])
        self._outputs: Any = None

    @property
    def cache(self) -> Any:
        """The key/value cache."""
        return self.model_kwargs["past_key_values"]

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """Mask over left padding, `(B, L)`; `None` without padding."""
        return self.model_kwargs.get("attention_mask")

    def has_room(self, input_ids: torch.Tensor) -> bool:
        """Return whether a drafted token and the target's own both fit under the length limit, `input_ids` `(B, L)`."""
        max_length = self.generation_config.max_length
        return max_length is None or input_ids.shape[1] + 1 < max_length

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the prompt.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): the prompt.

        Returns:
            `torch.Tensor` of shape `(B, 1, V)`: raw logits of the token that follows.
        """
        self._outputs = self.model._prefill(input_ids, self.generation_config, self.model_kwargs)
        logits = self._outputs.logits[:, -1:].to(input_ids.device)
        # Only now: a sliding layer that records from the start would keep the whole prompt.
        start_recording(self._outputs.past_key_values)
        return logits

    def verify(self, input_ids: torch.Tensor, draft_tokens: torch.Tensor) -> torch.Tensor:
        """Run anchor and draft in one pass; each drafted token is seen once.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): the committed text; its last token is the anchor.
            draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): the draft, G >= 0.

        Returns:
            `torch.Tensor` of shape `(B, G + 1, V)`: raw logits; row `i` follows `input_ids, draft_tokens[:, :i]`.
        """
        gamma = draft_tokens.shape[1]
        kwargs = _extended(self.model_kwargs, gamma)
        inputs = self.model.prepare_inputs_for_generation(
            torch.cat([input_ids, draft_tokens], dim=1), next_sequence_length=gamma + 1, is_first_iteration=False, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = gamma + 1
        self._outputs = self.model(**inputs, return_dict=True)
        return self._outputs.logits[:, -gamma - 1 :].to(input_ids.device)

    def commit(self, num_tokens: int, num_drafted: int) -> torch.Tensor | None:
        """Keep what was accepted of the last pass and forget the rest.

        Args:
            num_tokens (`int`): tokens that the round added to the text. Keys and values of all but the last are kept: it is
                the next anchor, which no pass has seen.
            num_drafted (`int`): tokens that the last pass saw after the anchor.

        Returns:
            `torch.Tensor` of shape `(B, n, K * D)`, or `None`: hidden states of the pass's committed tokens.
        """
        outputs = self._outputs
        # The pass wrote the anchor and the draft; the anchor and all new tokens but the last stay.
        roll_back(outputs.past_key_values, num_drafted + 1 - num_tokens)
        return self._advance(outputs, num_tokens, num_tokens)

    def commit_prefill(self) -> torch.Tensor | None:
        """Commit the token that follows the prompt; returns the prompt's hidden states as `commit` does."""
        return self._advance(self._outputs, 1, None)

    def _advance(self, outputs: Any, num_tokens: int, num_states: int | None) -> torch.Tensor | None:
        """Let mask and positions grow with the text, and read the drafter's features off the pass."""
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
        if self.layer_ids is None:
            return None
        states = outputs.hidden_states
        if num_states is None:
            num_states = states[layer_output_indices(self.layer_ids)[0]].shape[1]
        return target_features(states, self.layer_ids, num_states)


def _repeat_last(types: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return token types `(B, L)` longer by `num_tokens` times their last column."""
    return torch.cat([types, types[:, -1:].expand(-1, num_tokens)], dim=1)


def _extended(model_kwargs: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return `model_kwargs` with mask and positions longer by `num_tokens` drafted tokens."""
    kwargs = dict(model_kwargs)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, num_tokens), value=1)
    for name in TOKEN_TYPE_NAMES:
        if kwargs.get(name) is not None:
            kwargs[name] = _repeat_last(kwargs[name], num_tokens)
    if positions is not None:
        steps = torch.arange(1, num_tokens + 1, device=positions.device)
        kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
    return kwargs

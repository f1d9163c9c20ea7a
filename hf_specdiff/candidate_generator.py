"""The drafter as transformers' own decoding loop knows it: a `CandidateGenerator`.

Letters: B batch, L committed length, G drafted tokens, V vocabulary. Knows the host's candidate interface; knows no acceptance
rule. Imported by the modelling file, for the host's stock loop.
"""

from typing import Any

import torch
from transformers import Cache
from transformers import LogitsProcessorList
from transformers.generation import CandidateGenerator

from .drafters import make_drafter
from .drafters import target_features
from .speculation import SpeculationConfig


class SpecDiffCandidateGenerator(CandidateGenerator):
    """Draft a chain for any loop that speaks the host's candidate interface.

    Args:
        assistant_model (`SpecDiffDrafter`): the drafter, of either conditioning.
        speculation (`SpeculationConfig`): how to draft.
        target (`transformers.PreTrainedModel`, *optional*): needed by a feature-conditioned drafter, which borrows its
            embedding and head.
        logits_processor (`LogitsProcessorList`, *optional*): the target's processors.
        model_kwargs (`dict[str, Any]`, *optional*): of the target; the attention mask over left padding is read from it.
        max_length (`int`, *optional*): most tokens of the finished text.
        past_key_values (`transformers.Cache`, *optional*): context that an earlier generator of the same text has seen.

    Raises:
        ValueError: if the drafter is feature-conditioned and no target is given.

    Lossless when: the loop compares tokens, or applies the ratio test to the returned scores and `speculation` has a prefix
    law.
    """

    def __init__(
        self,
        assistant_model: Any,
        speculation: SpeculationConfig,
        target: Any | None = None,
        logits_processor: LogitsProcessorList | None = None,
        model_kwargs: dict[str, Any] | None = None,
        max_length: int | None = None,
        past_key_values: Cache | None = None,
    ) -> None:
        layer_ids = assistant_model.config.target_layer_ids
        if layer_ids is not None and target is None:
            raise ValueError(
                "`target` must be given for a feature-conditioned drafter, got None. Pass the model it drafts for."
            )
        processors = LogitsProcessorList() if logits_processor is None else logits_processor
        self.drafter = make_drafter(assistant_model, target, speculation, processors, max_length)
        if past_key_values is not None:
            self.drafter.cache = past_key_values
        self.vocab_size = assistant_model.config.vocab_size
        self.max_length = max_length
        self.attention_mask = (model_kwargs or {}).get("attention_mask")
        self.requires_model_outputs = layer_ids is not None
        # Index i + 1 of the hidden states is the output of layer i; index 0 is the embedding.
        self.model_kwargs_overrides = {} if layer_ids is None else {"output_hidden_states": [i + 1 for i in layer_ids]}
        self._is_after_prefill = True

    def get_candidates(
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any | None = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft the tokens that follow `input_ids`.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): the committed text.
            model_kwargs (`dict[str, Any]`, *optional*): of the target's next pass.
            model_outputs (`ModelOutput`, *optional*): of the target's last pass, with hidden states.
            is_first_iteration (`bool`): whether the target has not run yet; a feature-conditioned drafter then has nothing to
                read and proposes nothing.
            n_last_matches (`int`): drafted tokens that the last pass accepted.
            **kwargs: what else the host passes.

        Returns:
            `tuple`: text and draft `(B, L + G)` int64, and the log-probabilities `(B, G, V)` float32 that the draft was drawn
            from (a point mass for argmax drafts); `(input_ids, None)` when nothing is proposed.
        """
        length = input_ids.shape[1]
        if (self.requires_model_outputs and is_first_iteration) or self._room(length) < 1:
            return input_ids, None
        features = None
        if self.requires_model_outputs:
            num_tokens = length - 1 if self._is_after_prefill else n_last_matches + 1
            hidden_states: Any = getattr(model_outputs, "hidden_states", None)
            features = target_features(hidden_states, self.drafter.target_layer_ids, num_tokens)
            self._is_after_prefill = False
        draft = self.drafter.draft(input_ids, self._mask(length, model_kwargs), features)
        tokens = draft.tokens.to(input_ids.device)
        return torch.cat([input_ids, tokens], dim=1), draft.scores(self.vocab_size)

    def _room(self, length: int) -> int:
        """Return the tokens that may be drafted so that the target's own still fits."""
        return 1 if self.max_length is None else self.max_length - length - 1

    def _mask(self, length: int, model_kwargs: dict[str, Any] | None) -> torch.Tensor | None:
        """Return the mask over left padding, as long as the text, `(B, L)`."""
        mask = self.attention_mask if model_kwargs is None else model_kwargs.get("attention_mask")
        if mask is None:
            return None
        return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)

"""The drafter as transformers' own decoding loop knows it: a `CandidateGenerator`.

Letters: B batch, L committed length, G drafted tokens, V vocabulary. Knows the host's candidate interface; knows no acceptance
rule.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import Cache
from transformers import GenerationConfig
from transformers import LogitsProcessorList
from transformers.generation import CandidateGenerator

from .conditioning import make_drafter
from .draft import Draft
from .features import Features
from .features import layer_output_indices
from .features import target_features
from .sampling import check_processors
from .sampling import is_prefix_free
from .sampling import process_if_taken
from .speculation import resolve_speculation
from .text import Text


class SpecDiffCandidateGenerator(CandidateGenerator):
    """Draft a chain for any loop that speaks the host's candidate interface.

    Args:
        assistant_model (`SpecDiffDrafter`): the drafter, of either conditioning.
        generation_config (`GenerationConfig`): the target's, merged; says whether to sample, and where the text ends.
        logits_processor (`LogitsProcessorList`, *optional*): the target's processors.
        model_kwargs (`dict[str, Any]`, *optional*): of the target; the attention mask over left padding is read from it.
        target (`transformers.PreTrainedModel`, *optional*): needed by a feature-conditioned drafter, which borrows its
            embedding and head.
        speculation (`dict[str, Any]`, *optional*): arguments of speculation by name; the drafter's defaults fill the rest.
        past_key_values (`transformers.Cache`, *optional*): context that an earlier generator of the same text has seen.

    Raises:
        ValueError: if the drafter is feature-conditioned and no target is given, or an argument of speculation is out of range.

    Lossless when: the loop compares tokens where no scores come with the draft, and compares tokens or applies the ratio test
    where they do, as the host's loop does.
    """

    def __init__(
        self,
        assistant_model: Any,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
        model_kwargs: dict[str, Any] | None = None,
        target: Any | None = None,
        speculation: dict[str, Any] | None = None,
        past_key_values: Cache | None = None,
    ) -> None:
        layer_ids = assistant_model.config.target_layer_ids
        if layer_ids is not None and target is None:
            raise ValueError(
                "`target` must be given for a feature-conditioned drafter, got None. Pass the model it drafts for."
            )
        num_copied = (speculation or {}).get("prompt_lookup_num_tokens")
        if num_copied is not None:
            raise ValueError(
                f"`speculation` must leave out `prompt_lookup_num_tokens`, got {num_copied!r}: only hf_specdiff.generate has "
                "copies beside a drafter."
            )
        settings = resolve_speculation(
            {"draft_shape": "chain"} | (speculation or {}), assistant_model, do_sample=bool(generation_config.do_sample)
        )
        settings = replace(settings, is_adaptive=False)  # "auto" is the full loop's; a loop with candidates gets whole windows
        processors = LogitsProcessorList() if logits_processor is None else logits_processor
        self.max_length = generation_config.max_length
        self.is_sampling = bool(generation_config.do_sample)
        self.eos_token_ids = _end_tokens(generation_config)
        self.drafter = make_drafter(
            assistant_model, target, settings, processors, self.max_length, end_token_ids=self.eos_token_ids
        )
        if past_key_values is not None:
            self.drafter.cache = past_key_values
        self.vocab_size = (assistant_model if target is None else target).config.get_text_config().vocab_size
        self.attention_mask = (model_kwargs or {}).get("attention_mask")
        self.requires_model_outputs = layer_ids is not None
        self.model_kwargs_overrides = {} if layer_ids is None else {"output_hidden_states": layer_output_indices(layer_ids)}
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
            input_ids (`torch.Tensor` of shape `(1, L)`, int64): the committed text.
            model_kwargs (`dict[str, Any]`, *optional*): of the target's next pass.
            model_outputs (`ModelOutput`, *optional*): of the target's last pass, with hidden states.
            is_first_iteration (`bool`): whether the target has not run yet; a feature-conditioned drafter then has nothing to
                read and proposes nothing.
            n_last_matches (`int`): drafted tokens that the last pass accepted.
            **kwargs: what else the host passes.

        Returns:
            `tuple`: text and draft `(1, L + G)` int64, and the log-probabilities `(1, G, V)` float32 that the draft was drawn
            from (a point mass for argmax drafts). `None` instead of the latter where the draft has no prefix law, so that the
            loop compares tokens; `(input_ids, None)` when nothing is proposed. A draft ends with its first end token.
        """
        length = input_ids.shape[1]
        has_room = self.max_length is None or length + 1 < self.max_length
        if not has_room or (self.requires_model_outputs and is_first_iteration):
            return input_ids, None
        features = None
        if self.requires_model_outputs:
            num_tokens = length - 1 if self._is_after_prefill else n_last_matches + 1
            hidden_states: Any = getattr(model_outputs, "hidden_states", None)
            states = target_features(hidden_states, list(self.drafter.target_layer_ids or []), num_tokens)
            features = Features(states, [num_tokens])
            self._is_after_prefill = False
        draft = self.drafter.draft(Text.of_prompt(input_ids, self._mask(length, model_kwargs)), features)
        assert isinstance(draft, Draft)  # a chain was asked for
        draft = self._cut(draft)
        scores = draft.scores(self.vocab_size) if draft.has_prefix_law else None
        return torch.cat([input_ids, draft.tokens.to(input_ids.device)], dim=1), scores

    def without_what_fails(
        self, input_ids: torch.Tensor, sequences: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return candidates behind which the host's loop can ask the processors, as it does behind every drafted token.

        Where they do not take the whole draft, the text with an end token for one, a greedy draft loses its last token. Of one
        that is tested against its law a token cannot be taken because of what it is.

        Args:
            input_ids (`torch.Tensor` of shape `(1, L)`, int64): the committed text.
            sequences (`torch.Tensor` of shape `(1, L + G)`, int64): text and draft.
            scores (`torch.Tensor` of shape `(1, G, V)`, float32): of the draft.

        Returns:
            `tuple`: both, perhaps one token shorter. The scores keep one row, which the host needs, also for no token.

        Raises:
            ValueError: if the loop would fail.
        """
        processors = self.drafter.processors
        if is_prefix_free(processors) or process_if_taken(processors, sequences, torch.zeros_like(scores[:, 0])) is not None:
            return sequences, scores
        if self.is_sampling:
            raise ValueError(
                "`logits_processor` must take drafted texts, and texts that have ended, in transformers' own loop, which asks "
                "behind every drafted token, and one failed. Use hf_specdiff.generate(target, ..., assistant_model=drafter)."
            )
        count = sequences.shape[1] - input_ids.shape[1] - 1
        return sequences[:, :-1], scores[:, : max(count, 1)]

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Change nothing: every draft is a whole window. (The base class of transformers 5.17 raises here.)"""

    def _cut(self, draft: Draft) -> Draft:
        """Return the draft up to its first end token: the loop of transformers 5.17 looks for one at the very end only."""
        tokens = draft.tokens[0].tolist()
        count = next((i for i, token in enumerate(tokens, 1) if token in self.eos_token_ids), len(tokens))
        return draft.first(count)

    def _mask(self, length: int, model_kwargs: dict[str, Any] | None) -> torch.Tensor | None:
        """Return the mask over left padding, as long as the text, `(1, L)`."""
        mask = self.attention_mask if model_kwargs is None else model_kwargs.get("attention_mask")
        if mask is None:
            return None
        return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


def _end_tokens(generation_config: GenerationConfig) -> set[int]:
    """Return the end tokens of a generation."""
    tokens = generation_config.eos_token_id
    if tokens is None:
        return set()
    return {tokens} if isinstance(tokens, int) else set(torch.as_tensor(tokens).flatten().tolist())


def check_stock_call(max_new_tokens: int | None, processors: list[Any] | None, embeddings: Any | None) -> None:
    """Refuse calls of the host's own loop whose text would not be plain `generate`'s.

    Args:
        max_new_tokens (`int`, *optional*): tokens that the loop asks a drafter for.
        processors (`list`, *optional*): the target's, which the loop shows rejected tokens too.
        embeddings (`torch.Tensor`, *optional*): `inputs_embeds` of the call, which the loop does not hand to the target.

    Raises:
        ValueError: if so.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(
            f"`max_new_tokens` must leave the drafter at least one token in transformers' own loop, got {max_new_tokens}. Pass "
            "max_new_tokens or max_length to generate: a MaxLengthCriteria alone does not tell that loop where the text ends."
        )
    if embeddings is not None:
        raise ValueError(
            "`inputs_embeds` must be None in transformers' own loop, got some, which it would leave out. Use "
            "hf_specdiff.generate(target, ..., assistant_model=drafter)."
        )
    check_processors(LogitsProcessorList(processors or []))

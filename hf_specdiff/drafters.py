"""The drafter as a decoding loop knows it, and how a masked-diffusion network fills a window.

Letters: B batch, L committed length, G drafted tokens, V vocabulary, D hidden size, K target layers read. Knows the network by
duck typing only (a class loaded from the Hub is another class object than the installed one). Imported by the conditionings
and the loop.
"""

from typing import Any
from typing import Protocol

import torch
from transformers import DynamicCache
from transformers import LogitsProcessorList

from .denoising import reveal_by_confidence
from .denoising import reveal_counts
from .denoising import reveal_left_to_right
from .draft import Draft
from .sampling import draw_from_scores
from .sampling import is_prefix_free
from .sampling import prefix_free_part
from .sampling import process_rows
from .sampling import to_float
from .sampling import to_probs
from .speculation import SpeculationConfig


class Drafter(Protocol):
    """Proposes tokens that follow a committed text. Nothing it does can change what is generated, only how fast.

    Attributes:
        target_layer_ids (`list[int]`, *optional*): target layers whose hidden states `draft` wants; `None` for none.
    """

    target_layer_ids: list[int] | None

    def draft(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, features: torch.Tensor | None) -> Draft:
        """Draft the tokens that follow `input_ids`.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): the committed text; calls of one generation only extend it.
            attention_mask (`torch.Tensor` of shape `(B, L)`, int64, *optional*): 0 on left padding; `None`: no padding.
            features (`torch.Tensor` of shape `(B, n, K * D)`, *optional*): hidden states of the tokens that the target has
                processed since the last call, in the order of the text; the anchor, the last token, is never among them.

        Returns:
            `Draft`: between 1 and gamma tokens for each row, on the drafter's device.

        Lossless when: any draft is lossless under the match rule; `Draft.has_prefix_law` says whether the other rules may
        be used.
        """
        ...


class DenoisingDrafter:
    """Draft with a masked-diffusion network: a window [anchor, mask x gamma], revealed in T passes.

    Subclasses say how the committed text conditions the window.

    Args:
        network (`SpecDiffDrafter`): the network.
        speculation (`SpeculationConfig`): gamma, denoising steps, reveal order, draft temperature.
        logits_processor (`LogitsProcessorList`): the target's; applied to the draft law as well, so that it stays close.
        max_length (`int`, *optional*): most tokens of the finished text; no draft reaches past it.

    Lossless when: see `Draft.has_prefix_law`; drawn tokens revealed by confidence in several steps have no prefix law.
    Source: arXiv:2408.05636, section 4.
    """

    def __init__(
        self,
        network: Any,
        speculation: SpeculationConfig,
        logits_processor: LogitsProcessorList,
        max_length: int | None = None,
    ) -> None:
        self.network = network
        self.speculation = speculation
        self.max_length = max_length
        self.target_layer_ids = network.config.target_layer_ids
        self.mask_token_id = network.config.mask_token_id
        self.cache = DynamicCache(config=network.config)
        # Out of order a position's prefix is not known yet, so processors that read it have nothing to read.
        self.processors = logits_processor if speculation.reveals_in_order else prefix_free_part(logits_processor)

    @torch.no_grad()
    def draft(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, features: torch.Tensor | None) -> Draft:
        """Draft one window; see `Drafter.draft`."""
        device = self.network.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        gamma = self._window_gamma(input_ids.shape[1])
        window = input_ids.new_full((input_ids.shape[0], gamma + 1), self.mask_token_id)
        window[:, 0] = input_ids[:, -1]
        logits = self._window_logits(window, input_ids, attention_mask, features)
        steps = reveal_counts(gamma, self.speculation.num_denoising_steps)
        if len(steps) == 1:
            tokens, probs = self._draw_in_order(input_ids, window[:, 1:1], logits)
            return Draft(tokens, probs, self.speculation.has_prefix_law)
        return self._denoise(input_ids, attention_mask, window, logits, steps)

    def _window_gamma(self, length: int) -> int:
        """Return the tokens worth drafting: the target always adds one more after them."""
        gamma = self.speculation.gamma
        return gamma if self.max_length is None else max(1, min(gamma, self.max_length - length - 1))

    def _denoise(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        window: torch.Tensor,
        logits: torch.Tensor,
        steps: list[int],
    ) -> Draft:
        """Reveal the window step by step, one pass each; `window` `(B, G + 1)` is filled in place.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): committed text.
            attention_mask (`torch.Tensor` of shape `(B, L)`, int64, *optional*): 0 on left padding.
            window (`torch.Tensor` of shape `(B, G + 1)`, int64): anchor and masks.
            logits (`torch.Tensor` of shape `(B, G, V)`): of the first pass.
            steps (`list[int]`): positions revealed at each step.

        Returns:
            `Draft`: the filled window; its probabilities are those of the step that revealed each token.
        """
        tokens = window[:, 1:]  # a view: what is revealed is in the next pass's input
        revealed = torch.zeros_like(tokens, dtype=torch.bool)
        laws = torch.zeros(*tokens.shape, logits.shape[-1], device=logits.device, dtype=torch.float32)
        is_drawn = self.speculation.draft_temperature > 0
        for step, count in enumerate(steps):
            if step > 0:
                logits = self._window_logits(window, input_ids, attention_mask, None)
            proposed, probs, chosen = self._reveal(input_ids, tokens, logits, revealed, count)
            tokens.masked_scatter_(chosen, proposed[chosen])
            if probs is not None:
                laws[chosen] = probs[chosen]
            revealed |= chosen
        return Draft(tokens.clone(), laws if is_drawn else None, self.speculation.has_prefix_law)

    def _reveal(
        self, input_ids: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, revealed: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return proposed tokens `(B, G)`, their laws `(B, G, V)` or `None`, and the positions to reveal now `(B, G)`."""
        if self.speculation.reveal_order == "left_to_right":
            done = int(revealed[0].sum())
            chosen = reveal_left_to_right(revealed, count)
            drawn, probs = self._draw_in_order(input_ids, tokens[:, :done], logits[:, done : done + count])
            proposed = tokens.masked_scatter(chosen, drawn)
            if probs is not None:
                probs = logits.new_zeros(logits.shape, dtype=probs.dtype).masked_scatter(chosen[:, :, None], probs)
            return proposed, probs, chosen
        scores = self._scores(input_ids, tokens, logits)
        proposed, probs = draw_from_scores(scores, self.speculation.draft_temperature)
        confidence = (to_probs(scores) if probs is None else probs).gather(2, proposed[:, :, None]).squeeze(2)
        return proposed, probs, reveal_by_confidence(confidence, revealed, count)

    def _draw_in_order(
        self, input_ids: torch.Tensor, prefix: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw the tokens of consecutive positions.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): committed text.
            prefix (`torch.Tensor` of shape `(B, m)`, int64): window tokens already revealed, left of the positions.
            logits (`torch.Tensor` of shape `(B, n, V)`): raw logits of the positions.

        Returns:
            `tuple`: tokens `(B, n)` and probabilities `(B, n, V)`, or `None` for a point mass.
        """
        temperature = self.speculation.draft_temperature
        if is_prefix_free(self.processors):
            return draw_from_scores(self._scores(input_ids, prefix, logits), temperature)
        ids = torch.cat([input_ids, prefix], dim=1)
        tokens, probs = [], []
        for i in range(logits.shape[1]):
            token, law = draw_from_scores(self._scores(ids, prefix[:, :0], logits[:, i : i + 1]), temperature)
            ids = torch.cat([ids, token], dim=1)
            tokens.append(token)
            probs.append(law)
        return torch.cat(tokens, dim=1), None if probs[0] is None else torch.cat(probs, dim=1)

    def _scores(self, input_ids: torch.Tensor, draft_tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return processed float32 logits `(B, n, V)` in which the mask id cannot be drafted."""
        logits = to_float(logits)
        if self.mask_token_id < logits.shape[-1]:
            logits[..., self.mask_token_id] = -torch.inf  # in place: they are the drafter's own, fresh from a pass
        return process_rows(self.processors, input_ids, draft_tokens, logits) if self.processors else logits

    def _window_logits(
        self,
        window: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """Take new context into the cache, run one pass over the window and forget the window again.

        Args:
            window (`torch.Tensor` of shape `(B, G + 1)`, int64): anchor, revealed tokens and masks.
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): committed text; its last token is the anchor.
            attention_mask (`torch.Tensor` of shape `(B, L)`, int64, *optional*): 0 on left padding.
            features (`torch.Tensor` of shape `(B, n, K * D)`, *optional*): of the new context.

        Returns:
            `torch.Tensor` of shape `(B, G, V)`: row `i` predicts window slot `i + 1`.
        """
        raise NotImplementedError

    def _layout(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_new: int, window_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return where a pass stands in the text: positions of its tokens and the padding mask of its keys.

        The keys of a pass are the cached context, `num_new` new context tokens, and the window, whose slot 0 is the anchor at
        text index L - 1. The context may begin after the text does, where the target started from a filled cache.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, int64): committed text.
            attention_mask (`torch.Tensor` of shape `(B, L)`, int64, *optional*): 0 on left padding.
            num_new (`int`): context tokens that this pass adds.
            window_size (`int`): G + 1.

        Returns:
            `tuple`: positions `(1 or B, num_new + G + 1)` int64, not counting padding; mask `(B, keys)` int64 or `None`.
        """
        anchor = input_ids.shape[1] - 1
        positions = torch.arange(anchor - num_new, anchor + window_size, device=input_ids.device)[None]
        if attention_mask is None:
            return positions, None
        num_keys = self.cache.get_seq_length() + num_new + window_size
        # Counted from the end: the mask may be longer than the text, where only new tokens were passed to a filled cache.
        key_mask = torch.nn.functional.pad(attention_mask, (0, window_size - 1), value=1)[:, -num_keys:]
        num_padding = (attention_mask == 0).sum(dim=1, keepdim=True)
        return (positions - num_padding).clamp(min=0), key_mask

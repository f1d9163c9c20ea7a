"""Where the text ends, found exactly as plain decoding would find it, also inside an accepted window.

Letters: B batch, L committed length, n new tokens. Knows the host's stopping criteria. Imported by the loop.
"""

import torch
from transformers import EosTokenCriteria
from transformers import MaxLengthCriteria
from transformers import StoppingCriteriaList

CLOSED_FORM_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


class StopCheck:
    """Ask the stopping criteria after every token, as plain decoding does, though the tokens come in windows.

    Args:
        criteria (`StoppingCriteriaList`): what `generate` built from its arguments.
        keep_scores (`bool`): whether to keep the scores of every generated token; plain decoding then shows them to the
            criteria and returns them.
    """

    def __init__(self, criteria: StoppingCriteriaList, *, keep_scores: bool) -> None:
        self.criteria = criteria
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None

    def cut(self, input_ids: torch.Tensor, new_tokens: torch.Tensor, scores: torch.Tensor) -> tuple[int, bool]:
        """Return how many of the new tokens plain decoding would have written before it stopped.

        Args:
            input_ids (`torch.Tensor` of shape `(1, L)`, int64): the committed text.
            new_tokens (`torch.Tensor` of shape `(1, n)`, int64): what the round would add.
            scores (`torch.Tensor` of shape `(1, at least n, V)`): the processed logits behind each of them.

        Returns:
            `tuple[int, bool]`: tokens to keep, 1 to n, and whether the text ends there.
        """
        num_tokens, has_stopped = self._cut_in_closed_form(input_ids.shape[1], new_tokens)
        earlier = self.scores
        others = [criterion for criterion in self.criteria if type(criterion) not in CLOSED_FORM_CRITERIA]
        text = torch.cat([input_ids, new_tokens], dim=1) if others else input_ids
        for kept in range(1, num_tokens + 1) if others else ():
            seen = None if earlier is None else earlier + scores[:, :kept].unbind(dim=1)
            if any(bool(criterion(text[:, : input_ids.shape[1] + kept], seen).all()) for criterion in others):
                num_tokens, has_stopped = kept, True
                break
        if earlier is not None:
            self.scores = earlier + scores[:, :num_tokens].unbind(dim=1)
        return num_tokens, has_stopped

    def _cut_in_closed_form(self, length: int, new_tokens: torch.Tensor) -> tuple[int, bool]:
        """Apply the two criteria that nearly every call has, without a call per token."""
        num_tokens, has_stopped = new_tokens.shape[1], False
        for criterion in self.criteria:
            if type(criterion) is MaxLengthCriteria:
                first_stop = max(1, criterion.max_length - length)
            elif type(criterion) is EosTokenCriteria:
                hits = torch.isin(new_tokens[0], criterion.eos_token_id.to(new_tokens.device)).nonzero()
                first_stop = int(hits[0]) + 1 if len(hits) else num_tokens + 1
            else:
                continue
            if first_stop <= num_tokens:
                num_tokens, has_stopped = first_stop, True
        return num_tokens, has_stopped

"""Where the text ends, found exactly as plain decoding would find it, also inside an accepted window.

Letters: B batch, L committed length, n new tokens. Knows the host's stopping criteria. Imported by the loop.
"""

import torch
from transformers import EosTokenCriteria
from transformers import MaxLengthCriteria
from transformers import StoppingCriteriaList


class StopCheck:
    """Ask the stopping criteria after every token, as plain decoding does, though the tokens come in windows.

    Args:
        criteria (`StoppingCriteriaList`): what `generate` built from its arguments.
        keep_scores (`bool`): whether to keep the scores of every generated token; plain decoding then shows them to the
            criteria and returns them.
    """

    def __init__(self, criteria: StoppingCriteriaList, *, keep_scores: bool) -> None:
        self.scores: tuple[torch.Tensor, ...] | None = () if keep_scores else None
        # Two criteria that nearly every call has are known in closed form; a subclass of theirs may mean something else.
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min(lengths) if lengths else None
        ends = [criterion.eos_token_id.flatten().tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = {token for ids in ends for token in ids}
        self.others = [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]

    def cut(self, input_ids: torch.Tensor, new_tokens: torch.Tensor, scores: torch.Tensor) -> tuple[int, bool]:
        """Return how many of the new tokens plain decoding would have written before it stopped.

        Args:
            input_ids (`torch.Tensor` of shape `(1, L)`, int64): the committed text.
            new_tokens (`torch.Tensor` of shape `(1, n)`, int64): what the round would add.
            scores (`torch.Tensor` of shape `(1, at least n, V)`): the processed logits behind each of them.

        Returns:
            `tuple[int, bool]`: tokens to keep, 1 to n, and whether the text ends there.
        """
        length, earlier = input_ids.shape[1], self.scores
        num_tokens, has_stopped = self._cut_in_closed_form(length, new_tokens)
        text = torch.cat([input_ids, new_tokens], dim=1) if self.others else input_ids
        for kept in range(1, num_tokens + 1) if self.others else ():
            seen = None if earlier is None else earlier + scores[:, :kept].unbind(dim=1)
            # Every criterion is asked each time, as the host's list does: one may count its calls.
            answers = [bool(criterion(text[:, : length + kept], seen).all()) for criterion in self.others]
            if any(answers):
                num_tokens, has_stopped = kept, True
                break
        if earlier is not None:
            self.scores = earlier + scores[:, :num_tokens].unbind(dim=1)
        return num_tokens, has_stopped

    def _cut_in_closed_form(self, length: int, new_tokens: torch.Tensor) -> tuple[int, bool]:
        """Apply the length limit and the end tokens, without a call per token."""
        room = new_tokens.shape[1] if self.max_length is None else max(1, self.max_length - length)
        for index, token in enumerate(new_tokens[0, :room].tolist(), 1):
            if token in self.eos_token_ids:
                return index, True
        return min(room, new_tokens.shape[1]), self.max_length is not None and room <= new_tokens.shape[1]

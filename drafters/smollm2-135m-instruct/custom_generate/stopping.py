"""Where the text ends, found exactly as plain decoding would find it, also inside an accepted window.

Letters: B batch, n new tokens, V vocabulary. Knows the host's stopping criteria.
"""

import torch
from transformers import EosTokenCriteria
from transformers import MaxLengthCriteria
from transformers import StoppingCriteriaList

from .sampling import Scores
from .text import Text
from .text import to_device


class StopCheck:
    """Ask the stopping criteria after every token, as plain decoding does, though the tokens come in windows.

    Rows of a batch grow at different paces, so each is shown to the criteria by itself.

    Args:
        criteria (`StoppingCriteriaList`): what `generate` built from its arguments.
        num_rows (`int`): B.
        keep_scores (`bool`): whether to keep the scores of every generated token; plain decoding then shows them to the
            criteria and returns them.
    """

    def __init__(self, criteria: StoppingCriteriaList, num_rows: int, *, keep_scores: bool) -> None:
        self.scores: list[list[torch.Tensor]] | None = [[] for _ in range(num_rows)] if keep_scores else None
        # Two criteria that nearly every call has are known in closed form; a subclass of theirs may mean something else.
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min(lengths) if lengths else None
        ends = [criterion.eos_token_id.flatten().tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos_token_ids = {token for ids in ends for token in ids}
        # Without such a criterion the host does not pad: rows that have ended write on until the last one ends.
        self.has_end_tokens = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.others = [criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)]

    def cut(self, text: Text, tokens: list[list[int]], nodes: list[list[int]], scores: Scores) -> tuple[list[int], list[bool]]:
        """Return how many of the new tokens plain decoding would have written before it stopped.

        Args:
            text (`Text`): committed.
            tokens (`list[list[int]]`): for each row, what the round would add.
            nodes (`list[list[int]]`): for each row, the drafted tokens behind whose logits they stand.
            scores (`Scores`): of the pass.

        Returns:
            `tuple`: for each row the tokens to keep, at least 1, and whether the text ends there.
        """
        answers = [self._cut_row(text, i, tokens[i], nodes[i], scores) for i in range(text.num_rows)]
        return [count for count, _ in answers], [is_done for _, is_done in answers]

    def _cut_row(self, text: Text, index: int, tokens: list[int], nodes: list[int], scores: Scores) -> tuple[int, bool]:
        """Return what `cut` does, for the row at `index` of the text."""
        row = text.rows[index]
        count, is_done = self._cut_in_closed_form(text.lengths[index], tokens)
        own = None if self.scores is None else [*self.scores[row], *scores.along(index, nodes[:count]).unbind()]
        if self.others:
            written = torch.cat([text.row(index), to_device([tokens], text.tokens.device)], dim=1)
            length, earlier = text.lengths[index], 0 if self.scores is None else len(self.scores[row])
            for kept in range(1, count + 1):
                seen = None if own is None else tuple(score[None] for score in own[: earlier + kept])
                # Every criterion is asked each time, as the host's list does: one may count its calls.
                answers = [_says_stop(criterion(written[:, : length + kept], seen)) for criterion in self.others]
                if any(answers):
                    count, is_done = kept, True
                    break
            own = None if own is None else own[: earlier + count]
        if self.scores is not None and own is not None:
            self.scores[row] = own
        return count, is_done

    def add(self, scores: Scores, nodes: list[list[int]]) -> None:
        """Keep the scores behind some nodes of every row, if scores are kept at all: what ended rows had to read."""
        if self.scores is None:
            return
        for row, path in enumerate(nodes):
            if path:
                self.scores[row] += scores.along(row, path).unbind()

    def _cut_in_closed_form(self, length: int, tokens: list[int]) -> tuple[int, bool]:
        """Apply the length limit and the end tokens, without a call per token."""
        room = len(tokens) if self.max_length is None else max(1, self.max_length - length)
        for count, token in enumerate(tokens[:room], 1):
            if token in self.eos_token_ids:
                return count, True
        return min(room, len(tokens)), self.max_length is not None and room <= len(tokens)


def _says_stop(answer: torch.Tensor | bool) -> bool:
    """Return whether a criterion ends the one row that it was shown; the host takes a Python bool too."""
    return bool(answer.all()) if isinstance(answer, torch.Tensor) else bool(answer)

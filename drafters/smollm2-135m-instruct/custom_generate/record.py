"""What rounds add to the text, and how all of them together are put into the host's shapes.

Letters: B batch, V vocabulary, D hidden size.
"""

from dataclasses import dataclass

import torch

from .draft import Outcome
from .sampling import Scores
from .text import Text


@dataclass(frozen=True, slots=True)
class Round:
    """What one round adds to the rows that are still running.

    Attributes:
        rows (`list[int]`): which rows of the batch these are.
        outcome (`Outcome`): what became of the draft; of the prompt's own round an empty one.
        scores (`Scores`): the target's logits of the pass.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): of the pass, if the call wants them.
    """

    rows: list[int]
    outcome: Outcome
    scores: Scores
    hidden_states: tuple[torch.Tensor, ...] | None


class Record:
    """All that was written, row by row, until it can be put into the host's shapes.

    Args:
        text (`Text`): the prompt.
        keep_logits (`bool`): whether to keep the raw logits behind every token.
    """

    def __init__(self, text: Text, *, keep_logits: bool) -> None:
        self.prompt = text.tokens
        self.tokens: list[list[int]] = [[] for _ in range(text.num_rows)]
        self.logits: list[list[torch.Tensor]] | None = [[] for _ in range(text.num_rows)] if keep_logits else None
        self.prompt_states: tuple[torch.Tensor, ...] | None = None
        self.states: list[list[torch.Tensor]] = [[] for _ in range(text.num_rows)]

    def add(self, addition: Round) -> None:
        """Take in what a round added."""
        tokens, nodes = addition.outcome.tokens, addition.outcome.nodes
        for index, row in enumerate(addition.rows):
            self.tokens[row] += tokens[index]
            if self.logits is not None:
                self.logits[row] += addition.scores.logits[index, nodes[index]].float().unbind()
        if addition.hidden_states is None:
            return
        if self.prompt_states is None:
            self.prompt_states = addition.hidden_states
            return
        for index, row in enumerate(addition.rows):
            # (layers, tokens, D); a sharded target's layers are on several devices.
            states = torch.stack([layer[index, nodes[index]].to(self.prompt.device) for layer in addition.hidden_states])
            self.states[row] += states.unbind(dim=1)

    def steps_of_states(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Return hidden states as the host does: for each step and layer `(B, tokens of the step, D)`, the prompt's first."""
        assert self.prompt_states is not None
        steps = stack_steps(self.states) if any(self.states) else ()  # each (B, layers, D)
        return (self.prompt_states, *(step[:, :, None].unbind(dim=1) for step in steps))

    def sequences(self, pad_token_id: int | None) -> torch.Tensor:
        """Return prompts and new tokens, `(B, longest)`; rows that ended earlier are padded on the right."""
        longest = max(map(len, self.tokens))
        padding = 0 if pad_token_id is None else pad_token_id
        rows = [tokens + [padding] * (longest - len(tokens)) for tokens in self.tokens]
        return torch.cat([self.prompt, torch.tensor(rows, device=self.prompt.device)], dim=1)


def stack_steps(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Turn scores by row into the host's scores by step: a tensor `(B, V)` for each step, 0 where a row had ended."""
    longest = max(map(len, rows))
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[step] if step < len(row) else nothing for row in rows]) for step in range(longest))

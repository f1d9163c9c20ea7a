"""The committed text of a batch: rows of different lengths in one tensor.

Letters: B batch, L tokens of the longest row, M columns of the prompt's mask. Knows no model.
"""

from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch


def to_device(numbers: Any, device: torch.device) -> torch.Tensor:
    """Return nested lists of whole numbers as an int64 tensor on a device, without waiting for what the device is doing."""
    # CUDA has copied the numbers aside when the call returns, so the host's tensor may go; others make no such promise.
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=device.type == "cuda")


def at_places(table: torch.Tensor, rows: Any, index: Any) -> torch.Tensor:
    """Return entries of a table by row and position.

    Args:
        table (`torch.Tensor` of shape `(B, G, ...)`): the table.
        rows (`list[int]` or `torch.Tensor` of shape `(n,)`): rows of the batch.
        index (`int` or `torch.Tensor` of shape `(n,)`): one position for all, or one of each.

    Returns:
        `torch.Tensor` of shape `(n, ...)`.
    """
    if not isinstance(index, torch.Tensor) or not isinstance(rows, torch.Tensor):
        return table[rows, index]
    # One index takes a fraction of the time that two take.
    return table.flatten(0, 1).index_select(0, index if len(table) == 1 else rows * table.shape[1] + index)


@dataclass(frozen=True, slots=True)
class Text:
    """What is final of every row.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, L)`, int64): row `b` is `tokens[b, :lengths[b]]`, left padding of the prompt
            included; what lies behind is filler.
        lengths (`list[int]`): tokens of each row, padding included.
        prompt_length (`int`): tokens of the prompt, the same for all rows.
        prompt_mask (`torch.Tensor` of shape `(B, M)`, int64, *optional*): 0 on padding of the prompt; `None`: no padding. M may
            exceed the prompt where the target went on from a filled cache: the first columns are then the cached tokens'.
        rows (`list[int]`): which rows of the batch these are; those that have ended are gone.
    """

    tokens: torch.Tensor
    lengths: list[int]
    prompt_length: int
    prompt_mask: torch.Tensor | None
    rows: list[int]

    @classmethod
    def of_prompt(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "Text":
        """Start from a prompt, `(B, L)`, and its mask over left padding, `(B, M)`; a mask without a 0 is no mask."""
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        num_rows, length = input_ids.shape
        return cls(input_ids, [length] * num_rows, length, attention_mask, list(range(num_rows)))

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.lengths)

    def row(self, index: int) -> torch.Tensor:
        """Return one row without filler, `(1, length)`."""
        return self.tokens[index : index + 1, : self.lengths[index]]

    def anchors(self) -> torch.Tensor:
        """Return the last token of every row, `(B, 1)`."""
        if self.num_rows == 1:
            return self.tokens[:, -1:]
        return self.tokens.gather(1, to_device(self.lengths, self.tokens.device)[:, None] - 1)

    def gather(self, starts: list[int], count: int) -> torch.Tensor:
        """Return `count` tokens of every row from `starts[b]` on, `(B, count)`; behind a row's end stands filler."""
        if self.num_rows == 1:
            return self.tokens[:, starts[0] : starts[0] + count]
        columns = to_device(starts, self.tokens.device)[:, None] + torch.arange(count, device=self.tokens.device)
        return self.tokens.gather(1, columns.clamp(max=self.tokens.shape[1] - 1))

    def num_padding(self) -> torch.Tensor | int:
        """Return the padding of every row, `(B, 1)` int64, or 0."""
        return 0 if self.prompt_mask is None else (self.prompt_mask == 0).sum(dim=1, keepdim=True)

    def is_text(self, start: int, count: int) -> torch.Tensor | None:
        """Return which tokens are no padding.

        Args:
            start (`int`): index of the first token to tell about; negative for tokens that were cached before the prompt.
            count (`int`): tokens to tell about.

        Returns:
            `torch.Tensor` of shape `(B, count)`, bool; `None`: all of them.
        """
        if self.prompt_mask is None:
            return None
        first = start + self.prompt_mask.shape[1] - self.prompt_length
        known = self.prompt_mask[:, first : first + count].bool()
        return torch.nn.functional.pad(known, (0, count - known.shape[1]), value=True)

    def extended(self, additions: list[list[int]]) -> "Text":
        """Return the text with more tokens, `additions[b]` after row `b`."""
        lengths = [length + len(addition) for length, addition in zip(self.lengths, additions, strict=True)]
        if self.num_rows == 1:
            added = to_device(additions, self.tokens.device)
            return replace(self, tokens=torch.cat([self.tokens, added], dim=1), lengths=lengths)
        tokens = torch.nn.functional.pad(self.tokens, (0, max(0, max(lengths) - self.tokens.shape[1])))
        rows = [row for row, addition in enumerate(additions) for _ in addition]
        columns = [self.lengths[row] + i for row, addition in enumerate(additions) for i in range(len(addition))]
        flat = [token for addition in additions for token in addition]
        row, column, token = to_device([rows, columns, flat], tokens.device)
        tokens = tokens.index_put((row, column), token)
        return replace(self, tokens=tokens, lengths=lengths)

    def select(self, rows: list[int]) -> "Text":
        """Return some of the rows."""
        lengths = [self.lengths[row] for row in rows]
        mask = None if self.prompt_mask is None else self.prompt_mask[rows]
        tokens = self.tokens[rows, : max(lengths)]
        return Text(tokens, lengths, self.prompt_length, mask, [self.rows[row] for row in rows])

    def to(self, device: torch.device) -> "Text":
        """Return the text on another device."""
        if self.tokens.device == device:
            return self
        mask = None if self.prompt_mask is None else self.prompt_mask.to(device)
        return replace(self, tokens=self.tokens.to(device), prompt_mask=mask)


def check_prompt(input_ids: Any, mask_token_id: int | None, vocab_size: int) -> None:
    """Refuse a prompt that is empty or holds a mask which the target cannot read, and a drafter without a mask.

    A mask inside the target's vocabulary is a token like others there: the target may have written it in an earlier turn. A
    drafter reads it as "not known", which makes the draft poorer and nothing wrong.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`, int64): the prompt.
        mask_token_id (`int`, *optional*): the drafter's.
        vocab_size (`int`): the target's.

    Raises:
        ValueError: if so.
    """
    if mask_token_id is None:
        raise ValueError(
            "`assistant_model` must have a `mask_token_id` in its config, got None. Set the id it was trained with."
        )
    if input_ids.shape[-1] == 0:
        raise ValueError(
            "`input_ids` must hold at least one token, got an empty prompt. Pass the bos token to start from nothing."
        )
    if mask_token_id >= vocab_size and bool((input_ids == mask_token_id).any()):
        raise ValueError(
            f"`input_ids` must hold tokens of the target's vocabulary of {vocab_size}, got the drafter's mask id "
            f"{mask_token_id}, which means 'not yet known'. Take it out of the prompt."
        )

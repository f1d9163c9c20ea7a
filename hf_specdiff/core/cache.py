"""Everything that touches transformers' key/value caches.

Letters: B batch, S slots, n slots of the last pass. Knows which caches can be rolled back and how. Knows no model.
"""

import torch
from transformers import Cache


def start_recording(cache: Cache) -> None:
    """Let sliding-window layers keep what a rollback needs; to be called once, after the prefill."""
    cache.activate_past_recording()


def roll_back(cache: Cache, num_tokens: int) -> None:
    """Remove the last tokens of every layer.

    Args:
        cache (`transformers.Cache`): changed in place.
        num_tokens (`int`): tokens to remove, not negative. With 0 a sliding layer still shrinks to its window.
    """
    # `crop` takes a non-positive count of tokens to remove (transformers 5.17 and later); a positive one raises.
    cache.crop(-num_tokens)


class RaggedCache:
    """A cache whose rows end at different slots, because they accepted differently.

    Row `b` owns its first `ends[b]` slots. A pass writes behind the longest row; `keep` moves what stays to each row's own end,
    so that nothing in front of the tail is ever copied and the cache is no longer than its longest row.

    Args:
        cache (`transformers.Cache`): the cache, all rows of the same length.
        num_rows (`int`): B.
    """

    def __init__(self, cache: Cache, num_rows: int) -> None:
        self.cache = cache
        self.ends = [cache.get_seq_length()] * num_rows

    @property
    def length(self) -> int:
        """Slots of the longest row."""
        return max(self.ends)

    def is_owned(self, device: torch.device) -> torch.Tensor | None:
        """Return which of the first `length` slots belong to each row, `(B, length)` bool; `None`: all."""
        if min(self.ends) == self.length:
            return None
        return torch.arange(self.length, device=device) < torch.tensor(self.ends, device=device)[:, None]

    def keep(self, kept: list[list[int]]) -> None:
        """Keep some slots of the last pass, in the given order, and forget the rest of it.

        Args:
            kept (`list[list[int]]`): for each row, slots counted from the first one that the pass wrote.
        """
        start, total = self.length, self.cache.get_seq_length()
        if len(kept) == 1:
            self._move_row(start, kept[0])
        elif any(kept) and any(end != start or row != list(range(len(row))) for end, row in zip(self.ends, kept, strict=True)):
            self._move_rows(start, kept)
        self.ends = [end + len(row) for end, row in zip(self.ends, kept, strict=True)]
        roll_back(self.cache, total - self.length)

    def _move_row(self, start: int, kept: list[int]) -> None:
        """Copy the kept slots of a single row to its end, from the first one on that does not lie there."""
        first = next((place for place, slot in enumerate(kept) if slot != place), None)
        if first is None:
            return
        count, goal, source = len(kept) - first, start + first, start + kept[first]
        is_block = kept[first:] == list(range(kept[first], kept[first] + count)) and source >= goal + count
        index = None if is_block else torch.tensor(kept[first:]) + start
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                # One branch of a tree lies in one piece.
                block = states.narrow(2, source, count) if index is None else states.index_select(2, index.to(states.device))
                states.narrow(2, goal, count).copy_(block)

    def _move_rows(self, start: int, kept: list[list[int]]) -> None:
        """Copy each row's kept slots to its own end, within the tail."""
        most = max(map(len, kept))
        # Rows that keep fewer move filler behind their end, where nobody looks.
        sources = torch.tensor([row + [0] * (most - len(row)) for row in kept], dtype=torch.long) + start
        goals = torch.tensor(self.ends)[:, None] + torch.arange(most)
        rows = torch.arange(len(kept))[:, None]
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                by_slot = states.transpose(1, 2)  # a view (B, slots, heads, dim)
                by_slot[rows, goals] = by_slot[rows, sources]

    def select(self, rows: list[int]) -> None:
        """Keep some rows only."""
        total = self.cache.get_seq_length()
        self.cache.batch_select_indices(torch.tensor(rows))
        self.ends = [self.ends[row] for row in rows]
        roll_back(self.cache, total - self.length)

"""A cache with room behind its tokens, whose rows come and go.

Letters: B rows, H heads, n tokens, D head size.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

# Room that a layer makes at once: more wastes memory, less copies more often.
ROOM = 128


class GrowingLayer(DynamicLayer):
    """A layer with room behind its tokens: a new token is written there, where the host's layer copies all of them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room: list[torch.Tensor] = []  # keys and values with all their room
        self._end = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states `(B, H, n, D)` behind the others and return all; see `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), key_states.shape[2]
        if not self._room or self._end + new > self._room[0].shape[2]:
            self._make_room(key_states, value_states, old, new)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, self._end : self._end + new] = states
        self._end += new
        self.keys, self.values = (room[:, :, self._end - old - new : self._end] for room in self._room)
        return self.keys, self.values

    def _make_room(self, key_states: torch.Tensor, value_states: torch.Tensor, old: int, new: int) -> None:
        grown = []
        for states, kept in ((key_states, self.keys), (value_states, self.values)):
            room = states.new_zeros(*states.shape[:2], old + new + ROOM, states.shape[3])
            if old:
                room[:, :, :old] = kept
            grown.append(room)
        self._room, self._end = grown, old

    def drop_front(self, count: int) -> None:
        """Forget the first slots of all rows."""
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]

    def widen_front(self, count: int) -> None:
        """Put empty slots in front of all rows."""
        pad = torch.nn.functional.pad
        self.keys, self.values = pad(self.keys, (0, 0, count, 0)), pad(self.values, (0, 0, count, 0))
        self._room = []

    def put(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the states `(H, n, D)` of another row's tokens over the last slots of a row."""
        self.keys[row, :, -keys.shape[1] :] = keys
        self.values[row, :, -values.shape[1] :] = values

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all other rows."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        self._room = []

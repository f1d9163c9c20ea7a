"""A batch whose rows have a target each: for models that read one text at a time, and caches that hold no more.

Letters: B batch, G drafted tokens, n tokens, V vocabulary, D hidden size. Knows no drafter and no rule.
"""

from copy import copy
from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache
from transformers import GenerationConfig

from .cache import CACHE_NAMES
from .draft import Draft
from .draft import DraftTree
from .features import Features
from .stateful_target import SETTINGS
from .stateful_target import chain_target_class
from .target import TOKEN_TYPE_NAMES
from .target import Target
from .text import Text

# What holds something for every row, and is divided among them.
ROW_NAMES = ("attention_mask", "position_ids", *TOKEN_TYPE_NAMES)


class RowwiseTarget(Target):
    """A causal language model in the middle of a generation: rows drafted for together, and verified one after another.

    Each row has a cache of its own and reads what plain decoding shows it in a batch, its padding too. A round costs a pass for
    each row, as so many calls would.

    Args:
        model (`transformers.PreTrainedModel`): a target for which `why_not_chained` returns `None`.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared, for which `why_not_divided` returns `None`.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.
        num_rows (`int`): B.
    """

    takes_trees_and_batches = True  # batches only; the entry refuses trees

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layer_ids: list[int] | None,
        num_rows: int,
    ) -> None:
        super().__init__(model, generation_config, model_kwargs, layer_ids)
        target_class = chain_target_class(model)
        divided = [_of_row(self.model_kwargs, row) for row in range(num_rows)]
        self.targets = [target_class(model, generation_config, kwargs, layer_ids) for kwargs in divided]
        self.lengths: list[int] = []
        self._num_read = [0] * num_rows  # drafted tokens that each row's last pass has read
        self._places = list(range(num_rows))
        self._keeps_rows = False
        self._whole: tuple[list[Target], Text] | None = None  # as they were for the whole batch
        self._states: tuple[torch.Tensor, ...] | None = None

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """All hidden states of the last pass, if the call wants them; rows that read less of the draft end in zeros."""
        return self._states

    def cut(self, draft: Draft | DraftTree) -> Draft | DraftTree:
        """Return as much of a draft as every row may read in one pass; see `Target.cut`."""
        for target in self.targets:
            draft = target.cut(draft)
        return draft

    def prefill(self, text: Text) -> torch.Tensor:
        """Run the prompts; see `Target.prefill`."""
        logits = [target.prefill(text.select([row])) for row, target in enumerate(self.targets)]
        self.lengths = list(text.lengths)
        if self._keeps_rows:
            self._whole = (self.targets, text)
        self._join_states()
        return torch.cat(logits)

    def verify(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Run each row's anchor and draft in a pass of its own; see `Target.verify`.

        Returns:
            `torch.Tensor` of shape `(B, G + 1, V)`: raw logits; 0 behind the length limit of a row, where nothing is kept.
        """
        logits, max_length = [], self.generation_config.max_length
        for row, target in enumerate(self.targets):
            room = draft.num_tokens if max_length is None else max(0, max_length - text.lengths[row] - 1)
            own = Draft(draft.tokens[row : row + 1, :room], None, has_prefix_law=True)
            self._num_read[row] = own.num_tokens
            seen = target.verify(text.select([row]), own)
            logits.append(_lengthened(seen, draft.num_tokens + 1))
        self._join_states()
        return torch.cat(logits)

    def commit(self, nodes: list[list[int]], num_drafted: int) -> Features | None:
        """Keep what each row accepted; see `Target.commit`."""
        parts = [target.commit([kept], read) for target, kept, read in zip(self.targets, nodes, self._num_read, strict=True)]
        for place, kept in zip(self._places, nodes, strict=True):
            self.lengths[place] += len(kept)
        if self.layer_ids is None:
            return None
        found = [part for part in parts if part is not None]
        counts = [part.counts[0] for part in found]
        most = max(counts)
        return Features(torch.cat([_lengthened(part.states, most) for part in found]), counts)

    def select_rows(self, rows: list[int]) -> None:
        """Forget all but some rows of the batch."""
        self.targets = [self.targets[row] for row in rows]
        self._num_read = [self._num_read[row] for row in rows]
        self._places = [self._places[row] for row in rows]

    def keep_rows(self) -> None:
        """Let `finish` go on with rows that have ended; called before the prefill."""
        self._keeps_rows = True

    def finish(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Let rows that ended early read the padding behind them, as the host lets them; see `Target.finish`."""
        if self._whole is None or max(self.lengths) == min(self.lengths):
            return None
        (targets, text), most = self._whole, tokens.shape[1] - min(self.lengths)
        logits, states = [], []
        for row, target in enumerate(targets):
            for end in range(self.lengths[row], tokens.shape[1]):
                own = Text(tokens[row : row + 1, :end], [end], text.prompt_length, None, [row])
                seen = target.verify(own, Draft.nothing(own.tokens))
                logits.append(seen)
                states.append(target.hidden_states)
                target.commit([[0]], 0)
        counts = [tokens.shape[1] - length for length in self.lengths]
        if self.keeps_states:
            self._states = tuple(_in_rows(list(layer), counts, most) for layer in zip(*states, strict=True))
        return _in_rows(logits, counts, most)

    def _join_states(self) -> None:
        """Put the rows' hidden states of the last pass together, if the call wants them."""
        if self.keeps_states:
            parts = [target.hidden_states or () for target in self.targets]
            most = max(part[0].shape[1] for part in parts)
            self._states = tuple(torch.cat([_lengthened(part, most) for part in layer]) for layer in zip(*parts, strict=True))


def why_not_divided(config: Any, model_kwargs: dict[str, Any], own_cache: Any | None) -> str | None:
    """Return why a call's rows cannot be taken apart, or `None` if they can.

    Args:
        config (`PreTrainedConfig`): of the text model.
        model_kwargs (`dict[str, Any]`): what `generate` prepared.
        own_cache (`transformers.Cache`, *optional*): the caller's.

    Returns:
        `str`, *optional*: the reason.
    """
    if own_cache is not None:
        return "the `past_key_values` that were passed hold all rows in one"
    if getattr(config, "keep_window_size", None) is not None:  # Doge
        return "the model looks at some keys only, among equal ones at those that the shape of a batch makes it choose"
    whole = [name for name in model_kwargs if name not in (*ROW_NAMES, *CACHE_NAMES)]
    whole = [name for name in whole if not all(isinstance(leaf, SETTINGS) for leaf in tree_leaves(model_kwargs[name]))]
    return f"`{whole[0]}` cannot be divided among its rows" if whole else None


def _of_row(model_kwargs: dict[str, Any], row: int) -> dict[str, Any]:
    """Return a row's part of what `generate` prepared, with an empty cache of its own."""
    own = dict(model_kwargs)
    for name in CACHE_NAMES:
        if own.get(name) is not None:
            own[name] = _another(own[name])
    for name in ROW_NAMES:
        if own.get(name) is not None:
            values = own[name]  # (B or 1, n), or (planes, B or 1, n)
            own[name] = values if values.shape[-2] == 1 else values[..., row : row + 1, :]
    return own


def _another(cache: Cache) -> Cache:
    """Return an empty cache like an empty one. What is no layer, such as a stream of the device, serves both."""
    other = copy(cache)
    other.layers = deepcopy(cache.layers)
    return other


def _lengthened(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return values `(B, n, ...)` with zeros behind, `(B, size, ...)`."""
    return torch.cat([values, values.new_zeros(values.shape[0], size - values.shape[1], *values.shape[2:])], dim=1)


def _in_rows(values: list[torch.Tensor], counts: list[int], size: int) -> torch.Tensor:
    """Return values of single tokens `(1, 1, ...)`, `counts[b]` for row `b`, as `(B, size, ...)` with zeros behind."""
    nothing, joined = torch.zeros_like(values[0][:, :0]), iter(values)
    rows = [torch.cat([nothing, *(next(joined) for _ in range(count))], dim=1) for count in counts]
    return torch.cat([_lengthened(row, size) for row in rows])

"""Transformers' key/value caches: taking tokens back, rows of different lengths, and passes that do not copy them.

Letters: B batch, S slots, n slots of the last pass. Knows which caches can be rolled back and how. Knows no model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as once
from threading import Lock
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from transformers import Cache
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .text import Text
from .text import to_device

# Under what names models take their cache; the second one is that of models which are all state.
CACHE_NAMES = ("past_key_values", "cache_params")
# Read by transformers' "sdpa" attention at every call; 5.17 does not know it yet.
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"
# How many passes are under way, in all threads, for which the setting was made.
_LOCK = Lock()
_passes = 0


def cache_of(model_kwargs: dict[str, Any]) -> Any:
    """Return the cache that `generate` prepared, by whichever name the model knows it; `None` if there is none."""
    return next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)


def check_takes_back(cache: Cache | None, name: str) -> None:
    """Refuse what a prefill left behind, if tokens cannot be taken back from all of it.

    Before a pass not every cache can tell: a convolution's layer does not know yet whether it will have a recurrent state.

    Args:
        cache (`transformers.Cache`, *optional*): what the model handed back; `None`: nothing.
        name (`str`): of the model.

    Raises:
        ValueError: if so; also for layers that keep something else than the text, such as an image's keys.
    """
    if cache is None:
        raise ValueError(f"`model` must hand back a cache, got none from {name}. Use plain model.generate for it.")
    if not getattr(cache, "is_croppable", True):
        raise ValueError(
            f"`past_key_values` must be a cache whose tokens can be taken back, got a {type(cache).__name__} of {name} that "
            "says it cannot. Use plain model.generate."
        )
    lengths = {layer.get_seq_length() for layer in filled_layers(cache)}
    if len(lengths) > 1:
        raise ValueError(
            f"`model` must keep keys of the text alone, got layers of {name} with {sorted(lengths)} tokens in the cache. "
            "Use plain model.generate for it."
        )


def filled_layers(cache: Cache) -> list[Any]:
    """Return the layers that hold keys and values; others belong to inputs that this text does not have, such as images."""
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def start_recording(cache: Cache) -> None:
    """Let sliding-window layers keep what a rollback needs; to be called once, after the prefill."""
    cache.activate_past_recording()


def roll_back(cache: Cache, num_tokens: int) -> None:
    """Remove the last tokens of every layer.

    Args:
        cache (`transformers.Cache`): changed in place.
        num_tokens (`int`): tokens to remove, not negative. With 0 a sliding layer still shrinks to its window.
    """
    if is_quantized(cache):
        for layer in cache.layers:
            _take_back_quantized(layer, num_tokens)
        return
    # `crop` takes a non-positive count of tokens to remove (transformers 5.17 and later); a positive one raises.
    cache.crop(-num_tokens)


def is_quantized(cache: Cache) -> bool:
    """Return whether a cache rounds keys and values to few bits, in one of the two ways from which tokens can be taken back.

    Token by token (fp8); or (quanto, hqq) all of them together, whenever as many as `residual_length` stand unrounded.
    """
    return any(hasattr(layer, "fp8_dtype") or hasattr(layer, "residual_length") for layer in getattr(cache, "layers", []))


def most_drafted(cache: Cache) -> int | None:
    """Return how many tokens a pass may read behind the anchor so that none is rounded sooner than in plain decoding.

    A pass that fills a quantized layer's unrounded part rounds all that the layer holds. Plain decoding does so at a certain
    token, and the tokens before it read unrounded keys: a draft has to end in front of that token.

    Args:
        cache (`transformers.Cache`): as it stands before the pass.

    Returns:
        `int`, *optional*: `None`: as many as wanted.
    """
    limits = []
    for layer in getattr(cache, "layers", []):
        if hasattr(layer, "residual_length"):
            num_unrounded = layer.keys.shape[-2] if layer.keys is not None and layer.keys.dim() == 4 else 0
            # The anchor counts too.
            limits.append(max(0, layer.residual_length - num_unrounded - 2))
    return min(limits, default=None)


def _take_back_quantized(layer: Any, num_tokens: int) -> None:
    """Remove the last tokens of a quantized layer; the host's `crop` knows nothing of its length (transformers 5.23)."""
    if num_tokens == 0:
        return
    if hasattr(layer, "fp8_dtype"):
        for name in ("_quantized_keys", "_quantized_values"):
            rounded, scale = getattr(layer, name)
            setattr(layer, name, (rounded[..., :-num_tokens, :], scale))
    else:
        DynamicLayer.crop(layer, -num_tokens)
    layer.cumulative_length -= num_tokens


# Keys and values `(heads, slots, width)` of one row, for each layer that holds some.
Parted = list[tuple[torch.Tensor, torch.Tensor]]


class WindowLayer(DynamicLayer):
    """A layer that keeps no more than a window sees; slots are counted as if it kept all.

    The host's own sliding layer drops slots by count, the same for all rows, which is wrong for rows of different lengths.

    Args:
        window (`int`): tokens that a query sees, itself included.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.offset = 0  # slots in front that were dropped

    def get_seq_length(self) -> int:
        """Return the slots that were written, those that were dropped among them."""
        length: int = super().get_seq_length()
        return self.offset + length

    def drop(self, end: int) -> None:
        """Drop what no query sees any more.

        Args:
            end (`int`): slots of the shortest row; later queries stand behind them.
        """
        count = end - (self.window - 1) - self.offset
        if count > 0:
            # Copies, also where a slice is contiguous, as of a single head: views would keep what is dropped alive.
            self.keys: torch.Tensor = self.keys[:, :, count:].clone(memory_format=torch.contiguous_format)
            self.values: torch.Tensor = self.values[:, :, count:].clone(memory_format=torch.contiguous_format)
            self.offset += count


def context_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a drafter's context; layers with a window keep no more than that.

    Args:
        config (`SpecDiffConfig`): the drafter's.

    Returns:
        `transformers.DynamicCache`: with a layer for each of the drafter's.
    """
    cache = DynamicCache()
    windows = [config.layer_window(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    cache.layers = [DynamicLayer() if window is None else WindowLayer(window) for window in windows]
    return cache


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
        self.places = list(range(num_rows))  # of the rows in the cache's tensors
        self._names = list(range(num_rows))
        self._parted: dict[int, Parted] | None = None

    @property
    def keeps_parted(self) -> bool:
        """Whether rows that leave can join again."""
        return self._parted is not None

    def keep_parted(self) -> None:
        """Remember from now on what rows that leave held, for `rejoin`."""
        self._parted = {}

    @property
    def length(self) -> int:
        """Slots of the longest row."""
        return max(self.ends)

    def seen(self, text: Text, start: int) -> torch.Tensor:
        """Return which of the first `length` slots each row sees: its own, but for padding.

        Args:
            text (`Text`): committed.
            start (`int`): which token of the text lies in slot 0; negative where a filled cache was gone on from.

        Returns:
            `torch.Tensor` of shape `(B, length)`, bool.
        """
        device = text.tokens.device
        if min(self.ends) == self.length:
            own = torch.ones(len(self.ends), self.length, dtype=torch.bool, device=device)
        else:
            own = torch.arange(self.length, device=device) < to_device(self.ends, device)[:, None]
        is_text = text.is_text(start, self.length)
        return own if is_text is None else own & is_text.to(device)

    def keep(self, kept: list[list[int]]) -> None:
        """Keep some slots of the last pass, in the given order, and forget the rest of it.

        Args:
            kept (`list[list[int]]`): for each row, slots counted from the first one that the pass wrote.
        """
        total = self.cache.get_seq_length()
        self._move(kept)
        roll_back(self.cache, total - self.length)
        for layer in self.cache.layers:
            if isinstance(layer, WindowLayer):
                layer.drop(min(self.ends))

    def _move(self, kept: list[list[int]]) -> None:
        """Let every row end behind its kept slots."""
        start = self.length
        if len(kept) == 1 and self.places == [0]:
            self._move_row(start, kept[0])
        elif any(kept) and any(end != start or row != list(range(len(row))) for end, row in zip(self.ends, kept, strict=True)):
            self._move_rows(start, kept)
        self.ends = [end + len(row) for end, row in zip(self.ends, kept, strict=True)]

    def _move_row(self, start: int, kept: list[int]) -> None:
        """Copy the kept slots of a single row to its end, from the first one on that does not lie there."""
        first = next((place for place, slot in enumerate(kept) if slot != place), None)
        if first is None:
            return
        count, goal, source = len(kept) - first, start + first, start + kept[first]
        is_block = kept[first:] == list(range(kept[first], kept[first] + count)) and source >= goal + count
        layers = filled_layers(self.cache)
        index = None if is_block else to_device(kept[first:], layers[0].keys.device) + start
        for layer in layers:
            offset = getattr(layer, "offset", 0)
            for states in (layer.keys, layer.values):
                # One branch of a tree lies in one piece.
                if index is None:
                    block = states.narrow(2, source - offset, count)
                else:
                    block = states.index_select(2, index.to(states.device) - offset)
                states.narrow(2, goal - offset, count).copy_(block)

    def _move_rows(self, start: int, kept: list[list[int]]) -> None:
        """Copy each row's kept slots to its own end, within the tail."""
        most = max(map(len, kept))
        # Rows that keep fewer move filler behind their end, where nobody looks.
        layers = filled_layers(self.cache)
        device = layers[0].keys.device
        sources = to_device([row + [0] * (most - len(row)) for row in kept], device) + start
        goals = to_device(self.ends, device)[:, None] + torch.arange(most, device=device)
        rows = to_device(self.places, device)[:, None]
        for layer in layers:
            offset = getattr(layer, "offset", 0)
            for states in (layer.keys, layer.values):
                by_slot = states.transpose(1, 2)  # a view (B, slots, heads, dim)
                own, to, source = (index.to(states.device) for index in (rows, goals - offset, sources - offset))
                by_slot[own, to] = by_slot[own, source]

    def select(self, rows: list[int]) -> None:
        """Keep some rows only."""
        total = self.cache.get_seq_length()
        if self._parted is not None:
            for row in set(range(len(self.ends))) - set(rows):
                self._parted[self._names[row]] = self._part(row)
        self.cache.batch_select_indices(torch.tensor(rows))
        self.ends = [self.ends[row] for row in rows]
        self.places = list(range(len(rows)))
        self._names = [self._names[row] for row in rows]
        roll_back(self.cache, total - self.length)

    def _part(self, row: int) -> "Parted":
        """Return a copy of what a row holds."""
        end, place = self.ends[row], self.places[row]
        return [
            (layer.keys[place, :, :end].clone(), layer.values[place, :, :end].clone()) for layer in filled_layers(self.cache)
        ]

    def rejoin(self) -> None:
        """Take the rows that have left in again, each at its place in the batch and with the slots it had."""
        assert self._parted is not None
        parts = self._parted | {name: self._part(row) for row, name in enumerate(self._names)}
        self._names, self._parted = sorted(parts), {}
        self.places = list(range(len(self._names)))
        self.ends = [parts[name][0][0].shape[1] for name in self._names]
        for index, layer in enumerate(filled_layers(self.cache)):
            for which, name in enumerate(("keys", "values")):
                rows = [parts[row][index][which] for row in self._names]
                padded = [torch.nn.functional.pad(row, (0, 0, 0, self.length - row.shape[1])) for row in rows]
                setattr(layer, name, torch.stack(padded))


@contextmanager
def grouped_heads(on_cpu: bool, num_tokens: int) -> Iterator[None]:
    """Let the query heads of a group share their keys and values inside `with`, also under a mask, instead of copying them.

    The host copies the whole cache in every layer of such a pass, since GPU kernels take no mask over grouped heads; those of
    the CPU do, and are then up to five times quicker. Plain decoding never copies: its passes of one token go another way.

    Args:
        on_cpu (`bool`): whether all of the pass runs there; elsewhere nothing is changed.
        num_tokens (`int`): of the pass; for a single one nothing is changed.

    Yields:
        Nothing.
    """
    if not (on_cpu and num_tokens > 1 and has_grouped_kernel() and _enter()):
        yield
        return
    try:
        yield
    finally:
        _leave()


def is_on_cpu(model: Any) -> bool:
    """Return whether all of a model's weights are used on the CPU."""
    placement = getattr(model, "hf_device_map", None)
    return all(str(place) == "cpu" for place in placement.values()) if placement else model.device.type == "cpu"


@once
def has_grouped_kernel() -> bool:
    """Return whether this torch has a fast CPU kernel for grouped heads under a mask; without one it copies all the same."""
    query, key = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 4, 8)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(query, key, key, torch.zeros(1, 1, 2, 4), enable_gqa=True)
    except RuntimeError:
        return False
    return True


def _enter() -> bool:
    """Make the setting, unless it is the user's own."""
    global _passes
    with _LOCK:
        if _passes == 0 and FORCE_GQA in os.environ:
            return False
        _passes += 1
        os.environ[FORCE_GQA] = "1"
    return True


def _leave() -> None:
    """Take the setting back with the last pass."""
    global _passes
    with _LOCK:
        _passes -= 1
        if _passes == 0:
            os.environ.pop(FORCE_GQA, None)

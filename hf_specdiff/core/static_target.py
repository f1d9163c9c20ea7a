"""A target on a static cache: every pass has one of a few widths, so that it can be compiled and is compiled once.

Letters: B batch, N drafted nodes, W slots of a pass, S slots of the cache, V vocabulary. Knows the host's static caches and
when it compiles; knows no drafter and no rule.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.exc import Unsupported
from transformers import Cache
from transformers import CompileConfig
from transformers import GenerationConfig
from transformers import StaticCache

from .cache import RaggedCache
from .cache import grouped_heads
from .draft import Draft
from .draft import DraftTree
from .masked_target import MaskedTarget
from .masked_target import additive
from .text import Text
from .text import to_device

# A cache's slots are a multiple of it, so that texts of nearly the same length share what was compiled.
SLOTS = 256
# Caches that no call is using, by model: their tensors keep their places, which compiled passes and CUDA graphs count on.
_FREE: WeakKeyDictionary[Any, list[Cache]] = WeakKeyDictionary()
_LOCK = Lock()


class StaticRows(RaggedCache):
    """Rows in a static cache: nothing grows or shrinks; what is not owned is overwritten by the next pass.

    Args:
        cache (`transformers.StaticCache`): the cache, all rows of the same length.
        num_rows (`int`): B.
        length (`int`): slots that are filled.
    """

    def __init__(self, cache: Cache, num_rows: int, length: int) -> None:
        super().__init__(cache, num_rows)
        self.ends = [length] * num_rows  # numbers of ours: the cache's own length is a tensor

    def keep(self, kept: list[list[int]]) -> None:
        """Keep some slots of the last pass, in the given order; see `RaggedCache.keep`."""
        self._move(kept)
        self._set_length()

    def select(self, rows: list[int]) -> None:
        """Go on with some rows; the others keep their places in the cache, where nobody looks any more."""
        self.places = [self.places[row] for row in rows]
        self.ends = [self.ends[row] for row in rows]
        self._set_length()

    def _set_length(self) -> None:
        """Let the next pass write behind the longest row. Its place is a tensor of the device, so nothing waits."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)


class StaticTarget(MaskedTarget):
    """A causal language model in the middle of a generation, in passes of a few widths over a static cache.

    A pass over fewer nodes than its width ends in filler, which no node sees and nobody reads. Where plain `generate` would
    compile its step (`compile_config`, `disable_compile`, the device and the model decide, as there), the passes are compiled;
    the prefill is not.

    Args:
        model (`transformers.PreTrainedModel`): a target without windows or running states, whose inputs the host only slices.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared; its static cache has no tensors yet and is replaced.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.
        widths (`list[int]`): of a pass, rising, the anchor counted.
        num_rows (`int`): B.

    Source: compiled steps over static caches as in transformers' own `_sample`.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layer_ids: list[int] | None,
        widths: list[int],
        num_rows: int,
    ) -> None:
        model_kwargs["past_key_values"] = take_cache(model, num_rows, longest_text(generation_config) + widths[-1])
        super().__init__(model, generation_config, model_kwargs, layer_ids)
        self.widths = widths
        self.num_rows = num_rows
        self.num_slots = self.cache.layers[0].max_cache_len
        self.is_compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        self._buffers: dict[int, dict[str, torch.Tensor]] = {}
        self._width = 0  # of the last pass

    def like(self, model_kwargs: dict[str, Any], layer_ids: list[int] | None, max_length: int) -> "StaticTarget":
        """Return one for a single text, of at least some length, whose passes are the same as these, to measure them."""
        own = self.generation_config
        config = GenerationConfig(max_length=max(own.max_length, max_length), compile_config=own.compile_config)
        config.disable_compile = own.disable_compile
        return StaticTarget(self.model, config, model_kwargs, layer_ids, self.widths, 1)

    def _start_keeping(self) -> None:
        """Need nothing: a static layer of the whole text goes back by its length alone; see `Target.prefill`."""

    def make_rows(self, text: Text) -> StaticRows:
        """Return the cache as rows of the batch; see `MaskedTarget.make_rows`."""
        return StaticRows(self.cache, text.num_rows, text.prompt_length)

    def verify(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Run the anchors and all nodes in one pass of the narrowest width that holds them; see `MaskedTarget.verify`."""
        assert isinstance(self.rows, StaticRows)
        size, places = draft.num_tokens + 1, self.rows.places
        width = next(width for width in self.widths if width >= size)
        inputs = self._filled(text, draft, width)
        self._width = width
        with compilation_explained(), grouped_heads(self._is_on_cpu, width):
            self._outputs = self._forward()(**inputs, return_dict=True)
        self._is_prompt = False
        logits = self._outputs.logits[places, :size] if len(places) < self.num_rows else self._outputs.logits[:, :size]
        # The next pass of a captured graph writes its outputs to the same place.
        return (logits.clone() if self.is_compiled else logits).to(text.tokens.device)

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """All hidden states of the last pass, if the call wants them."""
        return self._own_rows(super().hidden_states) if self.keeps_states else None

    def _layer_states(self) -> tuple[torch.Tensor, ...]:
        """Return the last pass's hidden states of the rows that have not ended; see `Target._layer_states`."""
        states = self._own_rows(super()._layer_states())
        if not self.is_compiled or self._is_prompt:
            return states
        return tuple(state if state is None else state.clone() for state in states)

    def _own_rows(self, states: Any) -> Any:
        """Take the rows of the text out of states of all rows of the cache."""
        if self._is_prompt or self.rows is None or len(self.rows.places) == self.num_rows:
            return states
        return tuple(state if state is None else state[self.rows.places] for state in states)

    def _forward(self) -> Callable[..., Any]:
        """Return the model's pass, compiled where plain `generate` would compile its own."""
        return self.model.get_compiled_call(self.generation_config.compile_config) if self.is_compiled else self.model

    def _filled(self, text: Text, draft: Draft | DraftTree, width: int) -> dict[str, Any]:
        """Write the pass into the buffers of its width and return the model's inputs: the same tensors every round."""
        assert self.rows is not None
        device, places = text.tokens.device, self._places(draft, text.tokens.device)
        positions = places - self.lag  # (B, N + 1) or (planes, B, N + 1)
        if width not in self._buffers:
            self._buffers[width] = self._make_buffers(width, positions.shape[:-2], device)
            if self.is_compiled and len(self.widths) == 1:
                inputs = [*self._buffers[width].values(), *states_of(self.cache)]
                fix_shapes(inputs, self.generation_config.compile_config)
        buffers, rows, start = self._buffers[width], self._own_places(device), self.rows.length
        size, end = draft.num_tokens + 1, start + draft.num_tokens + 1
        buffers["input_ids"][rows, :size] = torch.cat([text.anchors(), draft.tokens], dim=1)
        buffers["position_ids"].fill_(start)
        buffers["position_ids"][..., rows, :size] = positions
        mask = buffers["attention_mask"]
        mask.fill_(torch.finfo(self.dtype).min)
        # Everybody sees itself, filler too: nothing at all to look at would be a softmax over nothing.
        mask[:, 0].diagonal(offset=start, dim1=1, dim2=2).fill_(0.0)
        mask[rows, 0, :size, :end] = additive(self._visible(text, draft), self.dtype)[:, 0]
        kept = {name: value for name, value in self.model_kwargs.items() if name not in (*buffers, "logits_to_keep")}
        return kept | buffers | {"past_key_values": self.cache}

    def _own_places(self, device: torch.device) -> slice | torch.Tensor:
        """Return the places of the text's rows in the buffers, as an index."""
        assert self.rows is not None
        places = self.rows.places
        return slice(None) if len(places) == self.num_rows else to_device(places, device)

    def _make_buffers(self, width: int, planes: torch.Size, device: torch.device) -> dict[str, torch.Tensor]:
        shape = (self.num_rows, width)
        return {
            "input_ids": torch.zeros(shape, dtype=torch.long, device=device),
            "position_ids": torch.zeros(*planes, *shape, dtype=torch.long, device=device),
            "attention_mask": torch.zeros(self.num_rows, 1, width, self.num_slots, dtype=self.dtype, device=device),
        }

    def forget(self, num_tokens: int) -> None:
        """Take back the whole last pass; see `Target.forget`."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(self._width)

    def release(self) -> None:
        """Give the cache to the next call with this model."""
        give_back(self.model, self.cache)


def longest_text(config: GenerationConfig) -> int:
    """Return the tokens that caches shall have room for: of this call, and of those that `max_cache_len` announces."""
    announced = getattr(config, "max_cache_len", None)  # transformers 5.23 knows it
    return max(config.max_length, announced or 0)


def take_cache(model: Any, num_rows: int, num_slots: int) -> Cache:
    """Return an empty static cache of at least so many slots for a model, a used one where it fits."""
    num_slots = -(-num_slots // SLOTS) * SLOTS
    with _LOCK:
        free = _FREE.setdefault(model, [])
        for cache in free:
            first = cache.layers[0]
            fits = first.max_cache_len >= num_slots and first.batch_size == num_rows
            if fits and (first.keys.device, first.keys.dtype) == (model.device, model.dtype):
                free.remove(cache)
                cache.reset()
                return cache
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=num_slots)


def give_back(model: Any, cache: Cache) -> None:
    """Let the next call with a model have a cache, if a pass has filled it."""
    if cache.layers[0].is_initialized:
        with _LOCK:
            _FREE.setdefault(model, []).append(cache)


def fix_shapes(values: Iterable[Any], config: CompileConfig | None) -> None:
    """Have a pass compiled for the very shapes of its inputs, whatever was compiled before for others.

    The compiler would take shapes that it sees change for changing ones: slower code, for a pass that never changes. A
    `compile_config` that asks for dynamic shapes gets them.

    Args:
        values (`Iterable`): the inputs; what is no tensor has no shape.
        config (`CompileConfig`, *optional*): the call's.
    """
    if config is None or not config.dynamic:
        for value in values:
            if isinstance(value, torch.Tensor):
                torch._dynamo.mark_static(value)


def states_of(cache: Cache) -> list[torch.Tensor]:
    """Return the keys and values of a cache."""
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


@contextmanager
def compilation_explained() -> Iterator[None]:
    """Say in one line what the compiler could not do: a missing compiler, or a model that breaks the graph."""
    try:
        yield
    except Unsupported as error:
        raise ValueError(
            "`fullgraph` must be False in `compile_config` for a model whose pass is no single graph, got True: "
            f"{_said(error)} Leave it out, or pass disable_compile=True."
        ) from error
    except TorchDynamoException as error:
        raise ValueError(
            f"`compile_config` must name a compiler that works here, got an error of it: {_said(error)} Install what it asks "
            "for, or pass disable_compile=True to go on without it."
        ) from error


def _said(error: Exception) -> str:
    """Return the compiler's words in one line, without its advice on how to report a defect of it."""
    return shorten(str(error).split("Set TORCHDYNAMO_VERBOSE")[0], 300, placeholder=" ...")


def widths_of(num_nodes: int, *, is_adaptive: bool) -> list[int]:
    """Return the widths of a call's passes, the anchor counted.

    Args:
        num_nodes (`int`): most drafted nodes of a round.
        is_adaptive (`bool`): whether rounds take as many nodes as pay. If not, all passes are as wide as the whole draft: a
            narrower one, for the last token of a text, would cost more to compile than it saves.

    Returns:
        `list[int]`: rising.
    """
    narrower = [width for width in (1, 8, 16, 32, 64) if width <= num_nodes] if is_adaptive else []
    return [*narrower, num_nodes + 1]

"""A target that is told who sees whom: for draft trees, and for batches whose rows accept different lengths.

Letters: B batch, N drafted nodes, C cached slots, V vocabulary, D hidden size. Knows which masks the host's models read; knows
no drafter and no rule.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers import DynamicCache
from transformers import GenerationConfig

from .cache import RaggedCache
from .draft import Draft
from .draft import DraftTree
from .features import Features
from .features import target_features
from .target import TOKEN_TYPE_NAMES
from .target import Target
from .text import Text
from .text import to_device

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Functions of the host that mask sliding windows; a model's file imports the one it uses.
WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")


class MaskedTarget(Target):
    """A causal language model in the middle of a generation, with masks and positions of our own.

    Each drafted token sees the committed text of its row and its ancestors, and stands where its depth puts it: for the model
    that is the text it would have read, had the path to this token been written. What is accepted is moved to its row's end in
    the cache (`RaggedCache`); nothing is computed twice.

    Two numbers say where a token stands. Its place is the slot that it would have in its row, had the path been written,
    padding counted: windows are measured in places, as the host measures them in slots. Its position is what embeddings read:
    the place less the row's lag, which is read off the positions that the model was really given with the prompt.

    Args:
        model (`transformers.PreTrainedModel`): a target for which `why_not_masked` returns `None`.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.

    Raises:
        ValueError: if the cache is already filled and holds sliding layers, which have dropped what a mask would have to cover.
            An empty one with sliding layers is replaced by one that drops nothing; the entry never hands over a user's own.
    """

    takes_trees_and_batches = True

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layer_ids: list[int] | None,
    ) -> None:
        super().__init__(model, generation_config, model_kwargs, layer_ids)
        # A sliding layer drops slots by count, which is not by position once rows differ; the masks do its work.
        model_kwargs["past_key_values"] = _with_full_layers(self.cache)
        self.text_config = model.config.get_text_config()
        self.kinds = layer_kinds(self.text_config)
        self.dtype = model.dtype
        self.masks_windows = self.kinds == [FULL] or masks_its_windows(model)
        self.rows: RaggedCache | None = None
        self.num_leading: torch.Tensor | int = 0  # (B, 1) or 0: padding in front of each row
        self.lag: torch.Tensor | int = 0  # (B, 1), (planes, B, 1) or the same for all: place less position
        self.num_cached = 0  # tokens in the cache before the text begins
        self._reads_plain: bool | None = None  # `reads_plain_inputs`, asked once
        self._keeps_rows = False
        self._whole: tuple[Any, ...] = ()  # what `select_rows` cuts, as it was for the whole batch

    def prefill(self, text: Text) -> torch.Tensor:
        """Run the prompt; see `Target.prefill`."""
        with _received(self.model) as inputs:
            logits = super().prefill(text)
        self.rows = self.make_rows(text)
        self.num_cached = self.rows.length - text.prompt_length
        if text.prompt_mask is not None:
            self.num_leading = (text.prompt_mask.bool().cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
        # None: the model counts slots itself.
        if inputs.get("position_ids") is not None:
            self.lag = lag_of(inputs["position_ids"].to(text.tokens.device), self.rows.length - 1, text.num_rows)
        if self._keeps_rows and text.num_rows > 1:
            self.rows.keep_parted()
            token_types = {name: self.model_kwargs[name] for name in TOKEN_TYPE_NAMES if name in self.model_kwargs}
            self._whole = (text, self.num_leading, self.lag, token_types)
        return logits

    def make_rows(self, text: Text) -> RaggedCache:
        """Return the cache as rows of the batch, after the prefill of `text`."""
        return RaggedCache(self.cache, text.num_rows)

    def verify(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Run the anchors and all nodes in one pass.

        Args:
            text (`Text`): committed; the last token of each row is its anchor.
            draft (`Draft` or `DraftTree`): the nodes.

        Returns:
            `torch.Tensor` of shape `(B, N + 1, V)`: raw logits after the anchor (node 0) and after each node.
        """
        tokens = torch.cat([text.anchors(), draft.tokens], dim=1)  # (B, N + 1)
        inputs = self._inputs(tokens)
        inputs["position_ids"], inputs["attention_mask"] = self._layout(text, draft)
        return self._run(inputs, tokens.shape[1], text.tokens.device)

    def _inputs(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Return the model's inputs for some tokens `(B, N + 1)`, positions and mask left out."""
        kwargs = dict(self.model_kwargs, attention_mask=None, position_ids=None)
        for name in TOKEN_TYPE_NAMES:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, -1:].expand(-1, tokens.shape[1])
        if self._reads_plain is None:
            self._reads_plain = self.reads_plain_inputs(tokens.device)
        if self._reads_plain:
            return kwargs | {"input_ids": tokens}  # nothing here is longer than the new tokens
        return self.model.prepare_inputs_for_generation(tokens, is_first_iteration=False, **kwargs)

    def commit(self, nodes: list[list[int]], num_drafted: int) -> Features | None:
        """Move the kept tokens to their rows' ends; see `Target.commit`."""
        if self._is_prompt:
            return self._prompt_states()
        assert self.rows is not None
        self.rows.keep(nodes)
        if self.layer_ids is None:
            return None
        most = max(map(len, nodes))
        if nodes == [list(range(most))]:
            return Features(target_features(self._layer_states(), self.layer_ids, most), [most])
        features = target_features(self._layer_states(), self.layer_ids, num_drafted + 1)
        index = to_device([row + [0] * (most - len(row)) for row in nodes], features.device)
        if len(nodes) == 1:
            return Features(features[:, index[0]], [most])
        rows = torch.arange(len(nodes), device=features.device)[:, None]
        return Features(features[rows, index], [len(row) for row in nodes])

    def select_rows(self, rows: list[int]) -> None:
        """Forget all but some rows of the batch."""
        assert self.rows is not None
        self.rows.select(rows)
        if isinstance(self.num_leading, torch.Tensor):
            self.num_leading = self.num_leading[rows]
        if isinstance(self.lag, torch.Tensor):
            self.lag = self.lag[..., rows, :]
        for name in TOKEN_TYPE_NAMES:
            if self.model_kwargs.get(name) is not None:
                self.model_kwargs[name] = self.model_kwargs[name][rows]

    def keep_rows(self) -> None:
        """Let `finish` bring back rows that have ended, because the caller gets what they hold; called before the prefill."""
        self._keeps_rows = True

    def finish(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Bring the caller's cache to what plain decoding leaves behind; see `Target.finish`.

        Rows that ended early have left; the host would have fed them padding until the last one ended, so they join again and
        read it in one pass.
        """
        if self.rows is None or not self.rows.keeps_parted:
            return None
        text, self.num_leading, self.lag, token_types = self._whole
        self.model_kwargs |= token_types
        self.rows.rejoin()
        missing = [self.num_cached + tokens.shape[1] - 1 - end for end in self.rows.ends]
        if max(missing) == 0:
            return None
        lengths = [end - self.num_cached + 1 for end in self.rows.ends]
        text = Text(tokens, lengths, text.prompt_length, text.prompt_mask, text.rows)
        logits = self.verify(text, Draft(text.gather(lengths, max(missing) - 1), None, has_prefix_law=True))
        self.rows.keep([list(range(count)) for count in missing])
        return logits

    def _layout(self, text: Text, draft: Draft | DraftTree) -> tuple[torch.Tensor, Any]:
        """Return positions of the nodes `(B, N + 1)` or `(planes, B, N + 1)`, and the mask that the model reads, if any."""
        assert self.rows is not None
        device = text.tokens.device
        if text.num_rows == 1 and text.prompt_mask is None:
            # All that is cached is seen; one row's chain is what the host's own causal mask is for.
            places = self.rows.length + draft.depths()
            if isinstance(draft, Draft) and self.masks_windows:
                return places - self.lag, None
            if self.kinds == [FULL]:
                size = draft.num_tokens + 1
                mask = torch.zeros(1, 1, size, self.rows.length + size, dtype=self.dtype, device=device)
                mask[..., self.rows.length :].masked_fill_(~draft.ancestor_mask(), torch.finfo(self.dtype).min)
                return places - self.lag, mask
        places = self._places(draft, device)
        return places - self.lag, self._masks(self._visible(text, draft), places)

    def _places(self, draft: Draft | DraftTree, device: torch.device) -> torch.Tensor:
        """Return places of the nodes, `(B, N + 1)`."""
        assert self.rows is not None
        places = to_device(self.rows.ends, device)[:, None] + draft.depths()
        max_length = self.generation_config.max_length
        if max_length is not None and len(self.rows.ends) > 1:
            # A row near its end is drafted past it, since others are not; what stands there is never kept.
            places = places.clamp(max=self.num_cached + max_length - 1)
        return places

    def _visible(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Return which keys each node may see under full attention, `(B, N + 1, C + N + 1)` bool."""
        assert self.rows is not None
        # The prompt's mask begins where the cache does.
        start = 0 if text.prompt_mask is None else text.prompt_length - text.prompt_mask.shape[1]
        cached = self.rows.seen(text, start)
        nodes = draft.ancestor_mask().expand(len(cached), -1, -1)
        return torch.cat([cached[:, None].expand(-1, draft.num_tokens + 1, -1), nodes], dim=2)

    def _masks(self, visible: torch.Tensor, places: torch.Tensor) -> Any:
        """Return the mask that the model reads, added to its scores: one, or one for each kind of layer."""
        cached = torch.arange(visible.shape[2] - places.shape[1], device=places.device).expand(places.shape[0], -1)
        keys = torch.cat([cached, places], dim=1)
        masks = {kind: additive(self._narrowed(visible, places, keys, kind), self.dtype) for kind in self.kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _narrowed(self, visible: torch.Tensor, places: torch.Tensor, keys: torch.Tensor, kind: str) -> torch.Tensor:
        """Cut what a layer of some kind cannot see off what full attention sees."""
        if kind == SLIDING:
            return visible & (places[:, :, None] - keys[:, None] < self.text_config.sliding_window)
        if kind == CHUNKED:
            size = self.text_config.attention_chunk_size
            places, keys = places - self.num_leading, keys - self.num_leading
            return visible & (places[:, :, None] // size == keys[:, None] // size)
        return visible


def layer_kinds(config: Any) -> list[str]:
    """Return the kinds of attention that a model's layers have, each once.

    Args:
        config (`PreTrainedConfig`): of the text model.

    Returns:
        `list[str]`: of "full_attention", "sliding_attention", ...; whatever stands in `layer_types`.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sorted(set(kinds))
    has_window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return [SLIDING if has_window else FULL]


def masks_its_windows(model: Any) -> bool:
    """Return whether a model masks its sliding windows itself, in a pass of several tokens.

    Some (Moshi) mask nothing and see a window only because the cache drops what is older. One token at a time that is the
    same; of a chain the later tokens would see more. A model whose code does not know the host's masks over windows is taken
    for one of them.

    Args:
        model (`transformers.PreTrainedModel`): the target.
    """
    files = {type(part).__module__ for part in model.modules()}
    return any(hasattr(sys.modules.get(file), name) for file in files for name in WINDOW_MASKS)


def unmasked_window(model: Any, cache: Cache) -> int | None:
    """Return the tokens of a window that exists by the cache's dropping alone, or `None` if there is no such window.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        cache (`transformers.Cache`): as `generate` prepared it.
    """
    sizes = [layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(sizes) if sizes and not masks_its_windows(model) else None


@contextmanager
def _received(model: Any) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that holds, after a pass, the keyword arguments that the model was really given."""
    inputs: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    try:
        yield inputs
    finally:
        hook.remove()


def lag_of(positions: torch.Tensor, last_place: int, num_rows: int) -> torch.Tensor | int:
    """Return how far the positions of a model lie behind the places of the cache.

    Args:
        positions (`torch.Tensor` of shape `(B or 1, n)` or `(planes, B or 1, n)`, int64): of a pass.
        last_place (`int`): slot of the pass's last token.
        num_rows (`int`): B.

    Returns:
        `int`, the same for all rows; or `torch.Tensor` of shape `(B, 1)` or `(planes, B, 1)`, int64: places less positions.
    """
    lag = last_place - positions[..., -1:]
    if positions.dim() == 2 and bool((lag == lag[0]).all()):
        return int(lag[0])
    return lag.expand(*lag.shape[:-2], num_rows, 1)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a query sees a key and the smallest number elsewhere, `(B, 1, queries, keys)`."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _with_full_layers(cache: Cache) -> Cache:
    """Return the cache, or a fresh one in its place that drops nothing."""
    if not any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return cache
    if cache.get_seq_length() > 0:
        raise ValueError(
            "`past_key_values` must be empty or keep every token, got a filled cache with sliding layers. Leave it out, or "
            "pass draft_shape='chain' and one prompt at a time."
        )
    return DynamicCache()

"""A target that is told who sees whom: for draft trees, and for batches whose rows accept different lengths.

Letters: B batch, N drafted nodes, C cached slots, V vocabulary, D hidden size. Knows which masks the host's models read; knows
no drafter and no rule.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers import DynamicCache
from transformers import GenerationConfig

from .cache import RaggedCache
from .conditioning import target_features
from .draft import Draft
from .target import TOKEN_TYPE_NAMES
from .target import Target
from .text import Features
from .text import Text
from .tree import DraftTree

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Tokens in front of the tree that a model is tried with, and how many times the noise of a cached pass it may be off.
CONTEXT = 6
NOISE_MARGIN = 8.0
# Windows that our masks know of, and settings about them that are no windows.
KNOWN_WINDOWS = {"sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
# For each model that was asked: the state it was in, and why it cannot be masked (None: it can).
_ANSWERS: WeakKeyDictionary[Any, tuple[Any, str | None]] = WeakKeyDictionary()


class MaskedTarget(Target):
    """A causal language model in the middle of a generation, with masks and positions of our own.

    Each drafted token sees the committed text of its row and its ancestors, and stands where its depth puts it: for the model
    that is the text it would have read, had the path to this token been written. What is accepted is moved to its row's end in
    the cache (`RaggedCache`); nothing is computed twice.

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
        self.rows: RaggedCache | None = None
        self.prompt_positions: torch.Tensor | None = None  # (B, prompt slots), -1 on padding
        self.num_cached = 0  # tokens in the cache before the text begins
        self._reads_plain: bool | None = None  # `reads_plain_inputs`, asked once

    def prefill(self, text: Text) -> torch.Tensor:
        """Run the prompt; see `Target.prefill`."""
        logits = super().prefill(text)
        self.rows = RaggedCache(self.cache, text.num_rows)
        self.num_cached = self.rows.length - text.prompt_length
        if text.prompt_mask is not None:
            mask = text.prompt_mask.long()
            self.prompt_positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, -1)
        return logits

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
        index = torch.tensor([row + [0] * (most - len(row)) for row in nodes], device=features.device)
        if len(nodes) == 1:
            return Features(features[:, index[0]], [most])
        rows = torch.arange(len(nodes), device=features.device)[:, None]
        return Features(features[rows, index], [len(row) for row in nodes])

    def select_rows(self, rows: list[int]) -> None:
        """Forget all but some rows of the batch."""
        assert self.rows is not None
        self.rows.select(rows)
        if self.prompt_positions is not None:
            self.prompt_positions = self.prompt_positions[rows]
        for name in TOKEN_TYPE_NAMES:
            if self.model_kwargs.get(name) is not None:
                self.model_kwargs[name] = self.model_kwargs[name][rows]

    def _layout(self, text: Text, draft: Draft | DraftTree) -> tuple[torch.Tensor, Any]:
        """Return positions of the nodes `(B, N + 1)`, and the mask that the model reads, if it needs one."""
        assert self.rows is not None
        device = text.tokens.device
        if text.num_rows == 1 and text.prompt_mask is None and (isinstance(draft, Draft) or self.kinds == [FULL]):
            # All that is cached is seen; one row's chain is what the host's own causal mask is for.
            positions = self.rows.length + draft.depths()
            if isinstance(draft, Draft):
                return positions, None
            size = draft.num_tokens + 1
            mask = torch.zeros(1, 1, size, self.rows.length + size, dtype=self.dtype, device=device)
            mask[..., self.rows.length :].masked_fill_(~draft.ancestor_mask(), torch.finfo(self.dtype).min)
            return positions, mask
        positions, keys = self._positions(draft, device)
        return positions, self._masks(self._visible(draft, keys), positions, keys)

    def _positions(self, draft: Draft | DraftTree, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions of the nodes `(B, N + 1)`, and of all keys `(B or 1, C + N + 1)`, -1 where nobody may look."""
        assert self.rows is not None
        cached = torch.arange(self.rows.length, device=device)[None]  # (1, C)
        anchors = torch.tensor(self.rows.ends, device=device)[:, None]
        if self.prompt_positions is not None:
            prompt = self.prompt_positions.to(device)
            num_padding = (prompt < 0).sum(dim=1, keepdim=True)
            cached, anchors = cached - num_padding, anchors - num_padding
            cached[:, : prompt.shape[1]] = prompt
        owned = self.rows.is_owned(device)
        if owned is not None:
            cached = torch.where(owned, cached, -1)
        positions = anchors + draft.depths()
        max_length = self.generation_config.max_length
        if max_length is not None and len(self.rows.ends) > 1:
            # A row near its end is drafted past it, since others are not; what stands there is never kept.
            positions = positions.clamp(max=self.num_cached + max_length - 1)
        keys = torch.cat([cached.expand(positions.shape[0], -1), positions], dim=1)
        return positions, keys

    def _visible(self, draft: Draft | DraftTree, keys: torch.Tensor) -> torch.Tensor:
        """Return which keys each node may see under full attention, `(B, N + 1, C + N + 1)` bool."""
        size = draft.num_tokens + 1
        cached = (keys[:, None, :-size] >= 0).expand(-1, size, -1)
        return torch.cat([cached, draft.ancestor_mask().expand(keys.shape[0], -1, -1)], dim=2)

    def _masks(self, visible: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> Any:
        """Return the mask that the model reads, added to its scores: one, or one for each kind of layer."""
        masks = {
            kind: _additive(_narrowed(visible, positions, keys, kind, self.text_config), self.dtype) for kind in self.kinds
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


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


def _narrowed(visible: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, kind: str, config: Any) -> torch.Tensor:
    """Cut what a layer of some kind cannot see off what full attention sees."""
    if kind == SLIDING:
        return visible & (positions[:, :, None] - keys[:, None] < config.sliding_window)
    if kind == CHUNKED:
        size = config.attention_chunk_size
        return visible & (positions[:, :, None] // size == keys[:, None] // size)
    return visible


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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


def why_not_masked(model: Any, device: torch.device) -> str | None:
    """Return why a model cannot verify with masks of our own, or `None` if it can; found by trying, once for each model.

    A tree with siblings in the way must give the logits of the plain text along its path, as closely as the same text read
    through the cache does.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        device (`torch.device`): of the call's inputs.

    Returns:
        `str`, *optional*: the reason.
    """
    state = (model.config._attn_implementation, model.dtype, model.training, device)
    asked_in, answer = _ANSWERS.get(model, (None, None))
    if asked_in != state:
        answer = _why_not_by_config(model) or _why_not_by_trying(model, device)
        _ANSWERS[model] = (state, answer)
    return answer


def _why_not_by_config(model: Any) -> str | None:
    """Return what a model's configuration says against masks of our own."""
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config._attn_implementation not in ("eager", "sdpa"):
        return f"{name} with attention implementation {model.config._attn_implementation!r} reads no mask of ours; use 'sdpa'"
    unknown = [kind for kind in layer_kinds(config) if kind not in (FULL, SLIDING, CHUNKED)]
    if unknown:
        return f"{name} has layers of the kind {unknown[0]!r}, which read the text in order"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return f"{name} places tokens by their order (ALiBi)"
    # A window that the model measures inside its layers, by slots of the cache and not by positions.
    windows = [key for key, value in config.to_dict().items() if "window" in key and type(value) is int]
    strange = sorted(set(windows) - KNOWN_WINDOWS)
    if strange or getattr(config, "attention_types", None):
        return f"{name} has a window of its own kind (`{(strange or ['attention_types'])[0]}`)"
    return None


@torch.no_grad()
def _why_not_by_trying(model: Any, device: torch.device) -> str | None:
    name, vocab_size = type(model).__name__, model.config.get_text_config().vocab_size
    # Context, anchor, nine siblings in the way, and a path of three under the last of ten children.
    ids = ((torch.arange(CONTEXT + 13, device=device) * 7 + 3) % vocab_size)[None]
    text = Text.of_prompt(ids[:, : CONTEXT + 1])
    tree = DraftTree(ids[:, CONTEXT + 1 :], [[0] * 10 + [10, 11]])
    path = [0, 10, 11, 12]
    try:
        plain_ids = torch.cat([ids[:, :CONTEXT], ids[:, CONTEXT:][:, path]], dim=1)
        plain = model(plain_ids, use_cache=False).logits[:, CONTEXT:]
        chain = Draft(plain_ids[:, CONTEXT + 1 :], None, has_prefix_law=True)
        masked = _after_context(model, ids, lambda target: target.verify(text, tree))[:, path]
        cached = _after_context(model, ids, lambda target: target.verify(text, chain))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return f"{name} does not take a mask over draft trees ({type(error).__name__}: {str(error)[:80]})"
    rounding = max(1e-6, torch.finfo(plain.dtype).eps / 2) * float(plain.abs().max().clamp(min=1))
    noise = max(float((cached - plain).abs().max()), rounding)
    if float((masked - plain).abs().max()) > NOISE_MARGIN * noise:
        return f"{name} gives other logits under a mask over draft trees"
    return None


def _after_context(model: Any, ids: torch.Tensor, verify: Callable[[MaskedTarget], torch.Tensor]) -> torch.Tensor:
    """Return a pass's logits behind the first tokens of `ids` `(1, n)`."""
    model_kwargs = {"past_key_values": DynamicCache(), "use_cache": True}
    target = MaskedTarget(model, GenerationConfig(), model_kwargs, None)
    target._run({"input_ids": ids[:, :CONTEXT], "past_key_values": target.cache, "use_cache": True}, 1, ids.device)
    target.rows = RaggedCache(target.cache, 1)
    return verify(target)

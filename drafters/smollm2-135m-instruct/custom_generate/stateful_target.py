"""A target whose layers keep a running state: what is rejected cannot be cropped, so the state before the pass is put back.

Letters: G drafted tokens, V vocabulary, D hidden size. Knows what hybrid and recurrent models of the host do in passes of
several tokens; knows no drafter and no rule.
"""

import math
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers import GenerationConfig
from transformers import cache_utils
from transformers.cache_utils import DynamicIndexedLayer
from transformers.cache_utils import DynamicLayer
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

from .draft import Draft
from .draft import DraftTree
from .features import Features
from .target import Target
from .text import Text

# Committed tokens that are read once more; when there are more of them, a short pass of their own moves the state up. A pass
# over 40 tokens costs little more than one over 8, and a pass of its own as much as a round: with this many it is one in ten.
MOST_REPLAYED = 32
NO_LIMIT = (0.0, math.inf)
# Layers that only grow; the last one not even that (5.17 does not know it yet).
CROPPED = {DynamicLayer, DynamicIndexedLayer, getattr(cache_utils, "DummyLayer", DynamicLayer)}
# What layers of the host's own kinds write in place, and what is no part of a state.
STATES = ("conv_states", "recurrent_states")
SETTINGS = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Snapshot:
    """A cache as it stands, to be put back later: for layers whose state runs on and cannot be cropped.

    Keys and values of full attention are cropped. Those of sliding layers are kept by reference, since the host makes new ones
    in every pass. States (of a recurrence, of a convolution) are written in place and therefore copied, and so is all that a
    layer of a model's own kind holds.

    Args:
        cache (`transformers.Cache`): as it shall be again.

    Raises:
        ValueError: if a layer holds what cannot be copied.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.kept = [_kept(layer) for layer in cache.layers]

    def put_back(self, num_tokens: int) -> None:
        """Make the cache what it was; as often as wanted.

        Args:
            num_tokens (`int`): tokens that were added to it since, at least one.
        """
        for layer, kept in zip(self.cache.layers, self.kept, strict=True):
            for name, value in kept.items():
                setattr(layer, name, _copied(layer, name, value))
            if type(layer) in CROPPED:
                layer.crop(-num_tokens)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                DynamicLayer.crop(layer, -num_tokens)


def _kept(layer: Any) -> dict[str, Any]:
    """Return what is to be put back into a layer; keys and values that grow are cropped instead."""
    if type(layer) in CROPPED:
        return {}
    grows = type(layer) is LinearAttentionAndFullAttentionLayer
    return {
        name: _copied(layer, name, value) for name, value in vars(layer).items() if not (grows and name in ("keys", "values"))
    }


def _copied(layer: Any, name: str, value: Any) -> Any:
    """Return an attribute of a layer so that no later pass can change it."""
    is_written = name in STATES or type(layer).__module__ != cache_utils.__name__
    if isinstance(value, torch.Tensor):
        return value.clone() if is_written else value
    if isinstance(value, dict):
        return {key: _copied(layer, name, item) for key, item in value.items()}
    if not isinstance(value, SETTINGS):
        raise ValueError(
            f"`past_key_values` must have layers whose state can be copied, got {type(layer).__name__} with a "
            f"{type(value).__name__} in `{name}`. Use plain model.generate for this model."
        )
    return value


class StatefulTarget(Target):
    """A hybrid or recurrent causal language model in the middle of a generation: one row, one chain a round.

    Its cache stands at a snapshot, at or behind the anchor. A pass reads the committed tokens since then once more, then the
    anchor and the draft. If all of the draft stands the cache stays where the pass left it, and nothing is read twice; if not,
    the snapshot is put back, and what was accepted is read again by the next pass.

    Args:
        model (`transformers.PreTrainedModel`): a target for which `why_not_chained` returns `None`.
        generation_config (`GenerationConfig`): the call's.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        layer_ids (`list[int]`, *optional*): layers whose outputs the drafter reads.

    Raises:
        ValueError: at the first draft, if a layer of the cache holds what cannot be copied.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        layer_ids: list[int] | None,
    ) -> None:
        super().__init__(model, generation_config, model_kwargs, layer_ids)
        self.snapshot: Snapshot | None = None
        self.num_pending = 0  # committed tokens that the cache has not seen, the anchor left out
        self._limited = [module for module in model.modules() if getattr(module, "time_step_limit", None) is not None]
        self._stepped = [module for module in model.modules() if _forgets_in_a_pass(module)]

    def _start_keeping(self) -> None:
        """Nothing is recorded: snapshots keep what is needed."""

    def verify(self, text: Text, draft: Draft | DraftTree) -> torch.Tensor:
        """Run what is pending, anchor and draft in one pass.

        Args:
            text (`Text`): committed; its last token is the anchor.
            draft (`Draft`): a chain of G >= 0 tokens.

        Returns:
            `torch.Tensor` of shape `(1, G + 1, V)`: raw logits; row `i` follows the text and the first `i` drafted tokens.

        Raises:
            ValueError: for a tree, whose branches would all be written into one state.
        """
        if isinstance(draft, DraftTree):
            raise ValueError("`draft` must be a chain for a StatefulTarget, got a DraftTree. Its state reads tokens in order.")
        if self.num_pending > MOST_REPLAYED:
            self.finish(text.tokens)
        if self.num_pending == 0:
            self.snapshot = Snapshot(self.cache)
        tokens, num_new = torch.cat([text.tokens, draft.tokens], dim=1), draft.num_tokens + 1
        inputs = self._inputs_of_last(tokens, self.num_pending + num_new, draft.num_tokens)
        with unlimited_steps(self._limited), one_by_one(self._stepped):
            logits = self._run(inputs, num_new, tokens.device)
        self._drop_states_of_replayed(num_new)
        return logits

    def _drop_states_of_replayed(self, num_new: int) -> None:
        """Leave only the hidden states of the anchor and the draft: those of replayed tokens were given out before."""
        states = getattr(self._outputs, "hidden_states", None)
        if states is not None and self.num_pending:
            self._outputs.hidden_states = tuple(None if state is None else state[:, -num_new:] for state in states)

    def commit(self, nodes: list[list[int]], num_drafted: int) -> Features | None:
        """Keep what was accepted of the last pass; see `Target.commit`."""
        if self._is_prompt:
            return self._features_of_prompt()
        num_kept = len(nodes[0])
        if num_kept == num_drafted + 1:
            self.num_pending = 0
        else:
            self.forget(num_drafted + 1)
            self.num_pending += num_kept
        return self._advance(num_kept)

    def forget(self, num_tokens: int) -> None:
        """Take back the whole last pass over anchor and draft, and with it what was read before them once more."""
        assert self.snapshot is not None
        self.snapshot.put_back(self.num_pending + num_tokens)

    def finish(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Bring the cache to the committed text without its last token; see `Target.finish`."""
        if self.num_pending == 0:
            return None
        inputs = self._inputs_of_last(tokens[:, :-1], self.num_pending, -1)
        with unlimited_steps(self._limited), one_by_one(self._stepped):
            self._run(inputs, 1, tokens.device)
        self.num_pending = 0
        return None


@contextmanager
def unlimited_steps(modules: list[Any]) -> Iterator[None]:
    """Let passes of several tokens do inside `with` what the host's single steps do.

    Some Mamba layers bound the step size of their recurrence from below (`time_step_limit`) where they read several tokens, but
    not where they read one (transformers 5.23: nemotron_h, zamba2): plain decoding writes with unbounded ones.

    Args:
        modules (`list[torch.nn.Module]`): those that have such a limit.

    Yields:
        Nothing.
    """
    limits = [module.time_step_limit for module in modules]
    try:
        for module in modules:
            module.time_step_limit = NO_LIMIT
        yield
    finally:
        for module, limit in zip(modules, limits, strict=True):
            module.time_step_limit = limit


@contextmanager
def one_by_one(modules: list[Any]) -> Iterator[None]:
    """Let layers inside `with` read the tokens of a pass one after another, as in plain decoding.

    Mamba 1's begin every pass of several tokens with an empty state: their kernels take none (transformers 5.23: mamba,
    falcon_mamba, jamba, zamba). What stands around them, attention, experts and head, still reads all tokens at once.

    Args:
        modules (`list[torch.nn.Module]`): layers that take hidden states `(1, n, D)` and a mask `(1, at least n)`.

    Yields:
        Nothing.
    """
    own = [vars(module).get("forward") for module in modules]  # one that a hook has put there
    try:
        for module in modules:
            module.forward = _stepping(module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _stepping(whole: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a layer's pass as one over each token."""

    def step_by_step(
        hidden_states: torch.Tensor, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        size = hidden_states.shape[1]
        masks = [None] * size if attention_mask is None else attention_mask[:, -size:].split(1, dim=1)
        steps = zip(hidden_states.split(1, dim=1), masks, strict=True)
        return torch.cat([whole(state, *args, attention_mask=mask, **kwargs) for state, mask in steps], dim=1)

    return step_by_step


def _forgets_in_a_pass(module: Any) -> bool:
    """Return whether a layer is Mamba 1's: it has a decay for each channel, and steps that are projected from its inputs."""
    return hasattr(module, "A_log") and (hasattr(module, "x_proj") or hasattr(module, "x_proj_weight"))


def is_stateful(model: Any) -> bool:
    """Return whether a model keeps a running state, which cannot be cropped."""
    return bool(getattr(model, "_is_stateful", False))


def chain_target_class(model: Any) -> type[Target]:
    """Return the target that verifies one row's chains for a model."""
    return StatefulTarget if is_stateful(model) else Target

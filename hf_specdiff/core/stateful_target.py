"""A target whose layers keep a running state: what is rejected cannot be cropped, so the state before the pass is put back.

Letters: G drafted tokens, V vocabulary, D hidden size. Knows what hybrid and recurrent models of the host do in passes of
several tokens; knows no drafter and no rule.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig

from .cache import Snapshot
from .draft import Draft
from .draft import DraftTree
from .features import Features
from .target import Target
from .target import fresh_kwargs
from .text import Text

# Committed tokens that are read once more; when there are more of them, a short pass of their own moves the state up. A pass
# over 40 tokens costs little more than one over 8, and a pass of its own as much as a round: with this many it is one in ten.
MOST_REPLAYED = 32
# Tokens that a model is tried with: before the first draft, and in all.
NUM_CONTEXT, NUM_TRIED = 12, 24
# How far passes may be off stepping, in units of what the host's own two ways of reading a text differ by; that is at least
# the first and at most the second of these multiples of the rounding of a logit.
NOISE_MARGIN = 8.0
LEAST_NOISE, MOST_NOISE = 4, 256
NO_LIMIT = (0.0, math.inf)
# For each model that was asked: the state it was in, and why it cannot go on from a state (None: it can).
_ANSWERS: WeakKeyDictionary[Any, tuple[Any, str | None]] = WeakKeyDictionary()


class StatefulTarget(Target):
    """A hybrid or recurrent causal language model in the middle of a generation: one row, one chain a round.

    Its cache stands at a snapshot, at or behind the anchor. A pass reads the committed tokens since then once more, then the
    anchor and the draft. If all of the draft stands the cache stays where the pass left it, and nothing is read twice; if not,
    the snapshot is put back, and what was accepted is read again by the next pass.

    Args:
        model (`transformers.PreTrainedModel`): a target for which `why_not_stateful` returns `None`.
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
        with unlimited_steps(self._limited):
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

    def finish(self, tokens: torch.Tensor) -> None:
        """Bring the cache to the committed text without its last token; see `Target.finish`."""
        if self.num_pending == 0:
            return
        inputs = self._inputs_of_last(tokens[:, :-1], self.num_pending, -1)
        with unlimited_steps(self._limited):
            self._run(inputs, 1, tokens.device)
        self.num_pending = 0


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


def is_stateful(model: Any) -> bool:
    """Return whether a model keeps a running state, which cannot be cropped."""
    return bool(getattr(model, "_is_stateful", False))


def why_not_stateful(model: Any, device: torch.device) -> str | None:
    """Return why a model with a running state cannot verify drafts, or `None` if it can; found by trying, once for each model.

    A chain of which part is rejected, and the one after it, must give the logits that stepping gives, as closely as the host's
    own two ways of reading a text agree.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        device (`torch.device`): of the call's inputs.

    Returns:
        `str`, *optional*: the reason.
    """
    state = (model.dtype, model.training, device)
    asked_in, answer = _ANSWERS.get(model, (None, None))
    if asked_in != state:
        answer = _why_not_by_trying(model, device)
        _ANSWERS[model] = (state, answer)
    return answer


@torch.no_grad()
def _why_not_by_trying(model: Any, device: torch.device) -> str | None:
    name, vocab_size = type(model).__name__, model.config.get_text_config().vocab_size
    ids = ((torch.arange(NUM_TRIED, device=device) * 7 + 3) % vocab_size)[None]
    try:
        whole = model(ids, use_cache=False).logits[0, NUM_CONTEXT:]
        steps = _read(model, ids, [1] * (NUM_TRIED - NUM_CONTEXT))
        drafts = _read(model, ids, [3, NUM_TRIED - NUM_CONTEXT - 3])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        return f"{name} does not go on from its state ({type(error).__name__}: {str(error)[:80]})"
    rounding = torch.finfo(steps.dtype).eps * float(steps.abs().max())
    noise = min(max(float((whole - steps).abs().max()), LEAST_NOISE * rounding), MOST_NOISE * rounding)
    if not float((drafts - steps).abs().max()) <= NOISE_MARGIN * noise:
        return f"a pass of {name} over several tokens does not go on from the state before it"
    return None


def _read(model: Any, ids: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return logits behind the tokens after the context, `(tokens, V)`, read in rounds that add `counts` of them.

    Each round of more than one token but the last drafts two tokens more, which are rejected.
    """
    context = ids[:, :NUM_CONTEXT]
    target = StatefulTarget(model, GenerationConfig(), fresh_kwargs(model, context), None)
    target.prefill(Text.of_prompt(context))
    target.commit([[0]], 0)
    logits, end = [], NUM_CONTEXT
    for count in counts:
        drafted = ids[:, end + 1 : end + count]
        if count > 1 and end + count < ids.shape[1]:
            drafted = torch.cat([drafted, ids[:, :2]], dim=1)
        text = Text.of_prompt(ids[:, : end + 1])
        logits.append(target.verify(text, Draft(drafted, None, has_prefix_law=True))[0, :count])
        target.commit([list(range(count))], drafted.shape[1])
        end += count
    return torch.cat(logits)

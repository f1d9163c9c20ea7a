"""Let a target continue many prompts, tokens per second being what counts: rows that have ended make room for new prompts.

Letters: B rows, S slots of the cache, V vocabulary. All rows end at the last slot, so that every pass writes one slot of each;
what lies in front of a row's own tokens is masked. Knows no files.
"""

import inspect
import random
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import MinPLogitsWarper
from transformers.generation import TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper
from transformers.generation import TopPLogitsWarper

from hf_specdiff.training.growing_cache import GrowingLayer

# Rows that may stand idle before new prompts take their places: prompts that are read together cost less each.
IDLE_SHARE = 8
# Batches whose prompts are put in order by length together.
GROUP = 8
# What looks at scores alone and may do so for all rows at once.
TEXT_BLIND = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt among others.

    Attributes:
        index (`int`): which one; decides the draws when sampling.
        ids (`list[int]`): its token ids.
    """

    index: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Continued:
    """A prompt and what the target wrote behind it.

    Attributes:
        index (`int`): of the prompt.
        ids (`list[int]`): token ids of both, the end-of-text token included if it was written.
        num_prompt (`int`): how many of them are the prompt's.
    """

    index: int
    ids: list[int]
    num_prompt: int


def continue_prompts(
    target: Any,
    prompts: list[Prompted],
    *,
    max_length: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    unfinished: dict[int, list[int]] | None = None,
    after_pass: Callable[[], None] | None = None,
) -> Iterator[Continued]:
    """Continue prompts, many at once, and hand each over as soon as it has ended.

    Args:
        target (`transformers.PreTrainedModel`): the target, in evaluation mode.
        prompts (`list[Prompted]`): prompts, each shorter than `max_length`.
        max_length (`int`): tokens at most of prompt and continuation.
        batch_size (`int`): rows that are written together.
        temperature (`float`): 0: greedily; else the target samples as its `generate` would at this temperature.
        seed (`int`): of sampling. A prompt's draws depend on it and on the prompt's index, not on the rows beside it.
        unfinished (`dict[int, list[int]]`, *optional*): by index the token ids, the prompt's first, of texts in progress. It is
            kept up to date, and what it holds at first is gone on with (not by models that write batch by batch).
        after_pass (`Callable`, *optional*): called after each pass over the rows, when `unfinished` can be read.

    Yields:
        `Continued`: in the order in which they end. Up to rounding, which depends on the shape of a batch, the text is what
            `generate` writes.
    """
    ordered = in_order(prompts, GROUP * batch_size)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if all(type(layer) is DynamicLayer for layer in _empty_cache(target).layers) and _empty_cache(target).layers:
        rows = _Rows(target, ordered, max_length, batch_size, sampling, seed)
        rows.unfinished = {} if unfinished is None else unfinished
        yield from rows.run(after_pass or (lambda: None))
        return
    # Windows and recurrent states cannot be moved from row to row; these models write batch by batch.
    for start in range(0, len(ordered), batch_size):
        yield from _by_generate(target, ordered[start : start + batch_size], max_length, sampling, seed)


def in_order(prompts: list[Prompted], group_size: int) -> list[Prompted]:
    """Return prompts in groups taken at random, the longest of each group first.

    Prompts that are read together have about the same length then, which saves padding; and whatever is finished at any time
    is a fair sample of all.
    """
    shuffled = random.Random(0).sample(prompts, len(prompts))
    groups = [shuffled[start : start + group_size] for start in range(0, len(shuffled), group_size)]
    return [prompt for group in groups for prompt in sorted(group, key=lambda prompt: (-len(prompt.ids), prompt.index))]


def _empty_cache(target: Any) -> DynamicCache:
    return DynamicCache(config=target.config.get_text_config(decoder=True))


@dataclass(slots=True)
class _Row:
    """A row in progress; `None` in its place in the batch means that it is idle."""

    index: int
    ids: list[int]
    num_prompt: int
    draws: random.Random


class _Rows:
    """The rows that are written together, and the prompts that wait for a place."""

    def __init__(
        self, target: Any, prompts: list[Prompted], max_length: int, batch_size: int, sampling: dict[str, Any], seed: int
    ) -> None:
        self.target, self.max_length, self.batch_size, self.seed = target, max_length, batch_size, seed
        self.waiting = list(reversed(prompts))  # the next one last
        self.end_tokens = end_tokens_of(target)
        self.does_sample = sampling["do_sample"]
        self.processors = _processors_of(target, sampling)
        self.accepts = set(inspect.signature(target.forward).parameters)
        self.unfinished: dict[int, list[int]] = {}
        self.rows: list[_Row | None] = []
        self.cache = _empty_cache(target)

    @torch.inference_mode()
    def run(self, after_pass: Callable[[], None]) -> Iterator[Continued]:
        """Write until nothing waits and no row is left; what is in progress goes first."""
        self.waiting.sort(key=lambda prompt: prompt.index in self.unfinished)
        while self.waiting or any(self.rows):
            yield from self._fill()
            if any(self.rows):
                yield from self._step()
            after_pass()

    def _fill(self) -> Iterator[Continued]:
        """Give idle places to waiting prompts, where enough are idle; without waiting prompts, give the places up."""
        if not any(self.rows):
            self.rows, self.cache = [], self._new_cache()
            yield from self._read(list(range(min(self.batch_size, len(self.waiting)))), self.cache)
            return
        idle = [place for place, row in enumerate(self.rows) if row is None]
        if not idle:
            return
        if not self.waiting:
            rows = [place for place, row in enumerate(self.rows) if row is not None]
            for layer in self.cache.layers:
                layer.keep_rows(torch.tensor(rows, device=layer.keys.device))
            self.rows = [self.rows[place] for place in rows]
        elif len(idle) >= min(-(-len(self.rows) // IDLE_SHARE), len(self.waiting)):
            yield from self._read(idle[: len(self.waiting)], self._new_cache())

    def _new_cache(self) -> DynamicCache:
        cache = _empty_cache(self.target)
        cache.layers = [GrowingLayer() for _ in cache.layers]
        return cache

    def _read(self, places: list[int], cache: DynamicCache) -> Iterator[Continued]:
        """Read one waiting prompt for each place, and write its first token."""
        prompts = [self.waiting.pop() for _ in places]
        rows = [self._row(prompt) for prompt in prompts]
        tokens = self._pass(rows, cache, max(len(row.ids) for row in rows))
        if cache is self.cache:
            self.rows = [None] * len(rows)
        else:
            missing = cache.get_seq_length() - self.cache.get_seq_length()
            for layer, read in zip(self.cache.layers, cache.layers, strict=True):
                if missing > 0:
                    layer.widen_front(missing)
                for number, (place, row) in enumerate(zip(places, rows, strict=True)):
                    count = len(row.ids)
                    layer.put(place, read.keys[number, :, -count:], read.values[number, :, -count:])
        yield from self._append(places, rows, tokens)

    def _row(self, prompt: Prompted) -> _Row:
        """Return the row of a prompt, as far as it has come: as many draws as it has taken are taken."""
        ids = self.unfinished.setdefault(prompt.index, list(prompt.ids))
        draws = random.Random(f"{self.seed} {prompt.index}")
        for _ in ids[len(prompt.ids) :]:
            draws.random()
        return _Row(prompt.index, ids, len(prompt.ids), draws)

    def _step(self) -> Iterator[Continued]:
        """Write one token of every row."""
        idle = _Row(-1, [0], 0, random.Random(0))
        rows = [idle if row is None else row for row in self.rows]
        tokens = self._pass(rows, self.cache, 1)
        active = [place for place, row in enumerate(self.rows) if row is not None]
        yield from self._append(active, [rows[place] for place in active], [tokens[place] for place in active])
        longest = max((len(row.ids) - 1 for row in self.rows if row is not None), default=0)
        if longest and (excess := self.cache.get_seq_length() - longest) > 0:
            for layer in self.cache.layers:
                layer.drop_front(excess)

    def _append(self, places: list[int], rows: list[_Row], tokens: list[int]) -> Iterator[Continued]:
        """Put tokens behind rows, and hand over those that have ended."""
        for place, row, token in zip(places, rows, tokens, strict=True):
            row.ids.append(token)
            has_ended = token in self.end_tokens or len(row.ids) >= self.max_length
            self.rows[place] = None if has_ended else row
            if has_ended:
                del self.unfinished[row.index]
                yield Continued(row.index, row.ids, row.num_prompt)

    def _pass(self, rows: list[_Row], cache: DynamicCache, width: int) -> list[int]:
        """Run the target over the last `width` tokens of each row, padded on the left, and choose each row's next token."""
        device = self.target.device
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)[:, None]
        num_slots = cache.get_seq_length() + width
        ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids[-width:] for row in rows], device=device)
        columns = torch.arange(num_slots, device=device)
        inputs: dict[str, Any] = {
            "attention_mask": (columns >= num_slots - lengths).long(),
            "position_ids": (columns[-width:] - (num_slots - lengths)).clamp(min=0),
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.accepts}
        scores = self.target(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits[:, -1].float()
        scores = self._processed([row.ids for row in rows], scores)
        if not self.does_sample:
            return scores.argmax(-1).tolist()
        return _draw(scores, [row.draws.random() for row in rows])

    def _processed(self, texts: list[list[int]], scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `(B, V)` as `generate` would leave them."""
        if all(isinstance(processor, TEXT_BLIND) for processor in self.processors):
            return self.processors(None, scores)
        # Those that read the text are made for rows of one length: each row by itself, without padding.
        ids = [torch.tensor([text], device=scores.device) for text in texts]
        return torch.cat([self.processors(text, row[None]) for text, row in zip(ids, scores, strict=True)])


def end_tokens_of(target: Any) -> set[int]:
    """Return the ids that end the target's text."""
    ends = target.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or [])


def _processors_of(target: Any, sampling: dict[str, Any]) -> Any:
    """Return what `generate` does to the scores by the target's own generation configuration."""

    def take(model: Any, input_ids: torch.Tensor, *, logits_processor: Any, **kwargs: Any) -> Any:
        return logits_processor

    # The prompts' lengths differ, so nothing may count from a prompt's end.
    settings = {"min_new_tokens": None, "min_length": 0, "max_new_tokens": 1, "custom_generate": take}
    return target.generate(torch.tensor([[0]], device=target.device), **settings, **sampling)


def _draw(scores: torch.Tensor, uniforms: list[float]) -> list[int]:
    """Draw one token of each row, `scores` `(B, V)`, from its law; `uniforms` are in [0, 1), one a row."""
    cumulated = scores.softmax(-1).double().cumsum(-1)
    thresholds = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulated[:, -1:]
    # The first token whose cumulated probability exceeds the threshold: never one of probability 0.
    return torch.searchsorted(cumulated, thresholds, right=True).squeeze(1).clamp(max=scores.shape[1] - 1).tolist()


def _by_generate(
    target: Any, batch: list[Prompted], max_length: int, sampling: dict[str, Any], seed: int
) -> Iterator[Continued]:
    """Continue one batch by the host's `generate`; rows that have ended wait for the last one."""
    width = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[0] * (width - len(prompt.ids)) + prompt.ids for prompt in batch], device=target.device)
    lengths = torch.tensor([len(prompt.ids) for prompt in batch], device=target.device)[:, None]
    mask = (torch.arange(width, device=target.device) >= width - lengths).long()
    ends = end_tokens_of(target)
    padding = {"pad_token_id": min(ends)} if ends and target.generation_config.pad_token_id is None else {}
    with torch.random.fork_rng():
        torch.manual_seed(hash((seed, batch[0].index)) % 2**63)
        settings = {**sampling, **padding, "max_new_tokens": max_length - min(len(prompt.ids) for prompt in batch)}
        output = target.generate(ids, attention_mask=mask, **settings)
    for prompt, row in zip(batch, output[:, width:].tolist(), strict=True):
        row = row[: max_length - len(prompt.ids)]
        end = next((i for i, token in enumerate(row, 1) if token in ends), len(row))
        yield Continued(prompt.index, prompt.ids + row[:end], len(prompt.ids))

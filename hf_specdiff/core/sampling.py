"""From logits to probabilities to tokens: the one place that draws.

Letters: B batch, G drafted tokens, N nodes of a tree, V vocabulary. p is the target's law, q the drafter's. Knows the host's
logits processors; knows no model.
"""

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import EpsilonLogitsWarper
from transformers.generation import EtaLogitsWarper
from transformers.generation import InfNanRemoveLogitsProcessor
from transformers.generation import LogitNormalization
from transformers.generation import MinPLogitsWarper
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.generation import SuppressTokensLogitsProcessor
from transformers.generation import SynthIDTextWatermarkLogitsProcessor
from transformers.generation import TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper
from transformers.generation import TopPLogitsWarper
from transformers.generation import TypicalLogitsWarper
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .text import Text

# These read the scores alone, so all rows of a window go through in one call. Exact types only: a subclass may read the ids.
PREFIX_FREE_PROCESSORS = {
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}
# They carry a state from call to call that rejected tokens would spoil.
STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
# They make the same of a token whichever it is, and nothing of those that are minus infinity.
ID_BLIND = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def check_processors(processors: LogitsProcessorList) -> None:
    """Refuse processors that carry a state from call to call.

    Args:
        processors (`LogitsProcessorList`): what `generate` built.

    Raises:
        ValueError: if there is one.
    """
    for processor in processors:
        if isinstance(processor, STATEFUL_PROCESSORS):
            raise ValueError(
                f"`logits_processor` must be functions of ids and scores, got {type(processor).__name__}, which keeps a state "
                "that rejected tokens would spoil. Leave its setting out or use plain model.generate."
            )


def is_prefix_free(processors: LogitsProcessorList) -> bool:
    """Return whether no processor of the list reads the token ids."""
    return all(type(processor) in PREFIX_FREE_PROCESSORS for processor in processors)


def prefix_free_part(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return the processors of the list that do not read the token ids, in their order."""
    return LogitsProcessorList([processor for processor in processors if type(processor) in PREFIX_FREE_PROCESSORS])


def processors_of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """Return the processors for one row of the batch alone.

    Args:
        processors (`LogitsProcessorList`): what `generate` built for the whole batch.
        row (`int`): index in the batch.

    Returns:
        `LogitsProcessorList`: the same, but for those that hold something for every row.
    """
    return LogitsProcessorList([_of_row(processor, row) for processor in processors])


def _of_row(processor: Any, row: int) -> Any:
    padding = getattr(processor, "prompt_ignore_length", None)
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(padding, torch.Tensor) and len(padding) > 1:
        # transformers 5.23 tells it the left padding of each row.
        return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding[row : row + 1])
    return processor


def to_float(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, as the host does before any processor."""
    return logits.float()


def process_without_prefix(processors: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """Apply prefix-free processors to all rows at once.

    Args:
        processors (`LogitsProcessorList`): `is_prefix_free`.
        logits (`torch.Tensor` of shape `(..., V)`): raw logits.

    Returns:
        `torch.Tensor` of shape `(..., V)`, float32.
    """
    logits = to_float(logits)
    if not processors:
        return logits
    # A processor may work in place, and callers keep the raw logits.
    rows = logits.flatten(0, -2).clone()
    return processors(torch.zeros(rows.shape[0], 1, dtype=torch.long, device=rows.device), rows).view_as(logits)


def process_if_taken(processors: LogitsProcessorList, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """Return what processors make of logits behind a drafted text, `None` if they do not take that text.

    Plain decoding would never have shown them a draft, and they may fail on what it would not write: a grammar on a text that
    it does not derive, a trie on one that has ended. Such a text is not worth going on with, and no error of the call.

    Args:
        processors (`LogitsProcessorList`): of one row.
        input_ids (`torch.Tensor` of shape `(1, L)`, int64): committed text and draft.
        logits (`torch.Tensor` of shape `(1, V)`, float32): changed in place, perhaps.

    Returns:
        `torch.Tensor` of shape `(1, V)`, float32, *optional*: with a token that may follow.
    """
    try:
        scores = processors(input_ids, logits)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of code that is not ours, so it may be any
        return None
    return scores if bool(scores.amax().isfinite()) else None


class Scores:
    """The target's processed logits of one pass, each row of them with its own true prefix.

    Plain decoding shows a processor the text up to the token in question. So does this: row `b`'s node `v` is processed with
    the committed text and the drafted tokens that lead to `v`. Rows of the batch are processed one by one where the prefix
    counts, since their lengths differ.

    Args:
        processors (`LogitsProcessorList`): what `generate` built from its arguments.
        text (`Text`): committed.
        draft_tokens (`torch.Tensor` of shape `(B, N)`, int64): nodes 1 to N.
        logits (`torch.Tensor` of shape `(B, N + 1, V)`): raw logits after the anchor (node 0) and after each node.
    """

    def __init__(self, processors: LogitsProcessorList, text: Text, draft_tokens: torch.Tensor, logits: torch.Tensor) -> None:
        self.processors = processors
        self.text = text
        self.draft_tokens = draft_tokens
        self.logits = logits
        self.is_prefix_free = is_prefix_free(processors)
        self._window: torch.Tensor | None = None

    def window(self) -> torch.Tensor:
        """Return the scores of a whole chain, `(B, N + 1, V)` float32."""
        if self._window is None:
            if self.is_prefix_free:
                self._window = process_without_prefix(self.processors, self.logits)
            else:
                chain = list(range(self.logits.shape[1]))
                self._window = torch.stack([self.along(row, chain) for row in range(self.text.num_rows)])
        return self._window

    def along(self, row: int, nodes: list[int]) -> torch.Tensor:
        """Return the scores at the nodes of one path from the anchor, `(len(nodes), V)` float32."""
        if self._window is not None:
            return self._window[row, nodes]
        if self.is_prefix_free:
            return process_without_prefix(self.processors, self.logits[row, nodes])
        return torch.stack([self._at(row, nodes[: count + 1]) for count in range(len(nodes))])

    def last(self, row: int, nodes: list[int]) -> torch.Tensor:
        """Return the scores at the end of a path from the anchor, `(V,)` float32."""
        if self.is_prefix_free:
            return process_without_prefix(self.processors, self.logits[row, nodes[-1:]])[0]
        return self._at(row, nodes)

    def last_if_taken(self, row: int, nodes: list[int]) -> torch.Tensor | None:
        """Return what `last` does, and `None` if the processors do not take the drafted text; what is committed they must."""
        if self.is_prefix_free or len(nodes) == 1:
            return self.last(row, nodes)
        scores = process_if_taken(*self._arguments(row, nodes))
        return None if scores is None else scores[0]

    def _at(self, row: int, nodes: list[int]) -> torch.Tensor:
        processors, prefix, logits = self._arguments(row, nodes)
        return processors(prefix, logits)[0]

    def _arguments(self, row: int, nodes: list[int]) -> tuple[LogitsProcessorList, torch.Tensor, torch.Tensor]:
        """Return the processors of a row, and what to call them with at the end of a path."""
        drafted = self.draft_tokens[row : row + 1, [node - 1 for node in nodes[1:]]]
        prefix = torch.cat([self.text.row(row), drafted], dim=1)
        processors = processors_of_row(self.processors, self.text.rows[row])
        return processors, prefix, to_float(self.logits[row, nodes[-1:]]).clone()


def to_probs(scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the probabilities of processed logits at a positive temperature, shape `(..., V)`, rows summing to 1."""
    return torch.softmax(scores if temperature == 1 else scores / temperature, dim=-1)


def draw(probs: torch.Tensor) -> torch.Tensor:
    """Draw one token from each row with torch's global generator, as `generate` does.

    Args:
        probs (`torch.Tensor` of shape `(..., V)`): probabilities; rows need not be normalised.

    Returns:
        `torch.Tensor` of shape `(...)`, int64.
    """
    return torch.multinomial(probs.flatten(0, -2), num_samples=1).view(probs.shape[:-1])


def draw_from_scores(scores: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw draft tokens; tokens and the law they were drawn from leave together.

    Args:
        scores (`torch.Tensor` of shape `(..., V)`, float32): processed logits.
        temperature (`float`): of the draft distribution; 0 takes the most probable token and draws nothing.

    Returns:
        `tuple`: tokens `(...)` int64, and their probabilities `(..., V)` float32, or `None` at temperature 0.
    """
    if temperature == 0:
        return scores.argmax(dim=-1), None
    probs = to_probs(scores, temperature)
    return draw(probs), probs


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Return norm(max(p - q, 0)), the law of the token that follows a rejection.

    Args:
        target_probs (`torch.Tensor` of shape `(..., V)`): p, or p scaled by at most 1 under the block rule.
        draft_probs (`torch.Tensor` of shape `(..., V)`): q.

    Returns:
        `torch.Tensor` of shape `(..., V)`: rows summing to 1. Where p - q is positive nowhere (p equals q, and a rejection
        has probability 0 up to rounding) the row is p itself.
    """
    excess = (target_probs - draft_probs).clamp(min=0)
    mass = excess.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, excess / mass.clamp(min=torch.finfo(mass.dtype).tiny), target_probs)

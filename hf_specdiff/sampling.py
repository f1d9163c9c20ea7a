"""From logits to probabilities to tokens: the one place that draws.

Letters: B batch, L committed length, G drafted tokens, V vocabulary. p is the target's law, q the drafter's. Knows the host's
logits processors; knows no model. Imported by everything that needs a probability.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation import EpsilonLogitsWarper
from transformers.generation import EtaLogitsWarper
from transformers.generation import InfNanRemoveLogitsProcessor
from transformers.generation import LogitNormalization
from transformers.generation import MinPLogitsWarper
from transformers.generation import SuppressTokensLogitsProcessor
from transformers.generation import TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper
from transformers.generation import TopPLogitsWarper
from transformers.generation import TypicalLogitsWarper

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


def is_prefix_free(processors: LogitsProcessorList) -> bool:
    """Return whether no processor of the list reads the token ids."""
    return all(type(processor) in PREFIX_FREE_PROCESSORS for processor in processors)


def prefix_free_part(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return the processors of the list that do not read the token ids, in their order."""
    return LogitsProcessorList([processor for processor in processors if type(processor) in PREFIX_FREE_PROCESSORS])


def to_float(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, as the host does before any processor."""
    return logits.float()


def process_rows(
    processors: LogitsProcessorList, input_ids: torch.Tensor, draft_tokens: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Apply the logits processors to every row of a window, each with its own true prefix.

    Args:
        processors (`LogitsProcessorList`): what `generate` built from its arguments.
        input_ids (`torch.Tensor` of shape `(B, L)`, int64): committed text.
        draft_tokens (`torch.Tensor` of shape `(B, at least R - 1)`, int64): drafted tokens; row `i` has the prefix
            `input_ids, draft_tokens[:, :i]`.
        logits (`torch.Tensor` of shape `(B, R, V)`): raw logits of the rows.

    Returns:
        `torch.Tensor` of shape `(B, R, V)`, float32.
    """
    logits = to_float(logits)
    if not processors:
        return logits
    if is_prefix_free(processors):
        # A processor may work in place, and callers keep the raw logits.
        rows = logits.flatten(0, 1).clone()  # (B * R, V)
        return processors(input_ids.new_zeros(rows.shape[0], 1), rows).view_as(logits)
    ids = torch.cat([input_ids, draft_tokens], dim=1)
    length = input_ids.shape[1]
    rows = [processors(ids[:, : length + i], logits[:, i].clone()) for i in range(logits.shape[1])]
    return torch.stack(rows, dim=1)


def to_probs(scores: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of processed logits, shape `(..., V)`, rows summing to 1."""
    return torch.softmax(scores, dim=-1)


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
    probs = to_probs(scores / temperature)
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

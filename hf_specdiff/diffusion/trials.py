"""What a language model is, found by trying: whether it sees later tokens, and which reading of it predicts masked words best.

Knows passes over a few tokens; nothing of drafting.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hf_specdiff.core.masked_target import additive

# Of the change that a visible token makes: a hidden one may not make more, rounding included.
MOST_LEAK = 0.01

# Tokens of the text by which readings are compared, and by how many standard errors of the difference the best must win.
TEXT_LENGTH = 64
CLEAR_LEAD = 3.0


@dataclass(frozen=True, slots=True)
class Reading:
    """How a language model is read; see `DiffusionDrafter`.

    Attributes:
        logit_offset (`int`): 0 or -1.
        attention (`str`): `"full"`, `"block_causal"`, or, for comparison only, `"causal"`.
        block_length (`int`, *optional*): of `"block_causal"`.
    """

    logit_offset: int
    attention: str = "full"
    block_length: int | None = None

    def seen(self, size: int, device: torch.device) -> torch.Tensor:
        """Return who sees whom in a text without padding, `(size, size)` bool."""
        places = torch.arange(size, device=device)
        blocks = places // (self.block_length or (1 if self.attention == "causal" else size))
        return blocks[None] <= blocks[:, None]


@torch.no_grad()
def text_of(target: Any) -> torch.Tensor:
    """Let a target write a text by which readings can be compared: it needs no tokenizer, and is what will be drafted.

    Args:
        target (`transformers.PreTrainedModel`): the target.

    Returns:
        `torch.Tensor` of shape `(1, L)`, int64; drawn with a fixed seed, torch's generators are left as they were.
    """
    first = target.config.get_text_config().bos_token_id
    start = torch.tensor([[first if isinstance(first, int) else 0]], device=target.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return target.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            max_new_tokens=TEXT_LENGTH,
            min_new_tokens=TEXT_LENGTH // 2,
        )


def best_reading(body: Any, text: torch.Tensor, mask_token_id: int, readings: list[Reading]) -> Reading:
    """Return the reading under which masked words of a text are predicted best.

    Args:
        body (`transformers.PreTrainedModel`): the language model.
        text (`torch.Tensor` of shape `(1, L)`, int64): in the body's ids.
        mask_token_id (`int`): of the body.
        readings (`list[Reading]`): to choose among.

    Returns:
        `Reading`: one of them.

    Raises:
        ValueError: if the text is too short or does not tell them apart, or is predicted best as a causal language model would:
            such a model says nothing of a masked word that the words before it do not.
    """
    if text.shape[1] < 2:
        raise ValueError(
            "`logit_offset`, `attention` and `block_length` must be given, got a target's text without words that the language "
            "model knows, by which readings could be compared."
        )
    causal = Reading(-1, "causal")
    losses = {reading: masked_losses(body, text, mask_token_id, reading) for reading in [*readings, causal]}
    means = {reading: float(loss.mean()) for reading, loss in losses.items()}
    best, second = sorted(readings, key=means.__getitem__)[:2]
    if _lead(losses[causal], losses[best]) > CLEAR_LEAD:
        raise ValueError(
            f"`body` must have the weights of a masked diffusion language model, got ones that predict a word worse "
            f"({means[best]:.2f} nats) where they see the words after it than where they do not ({means[causal]:.2f}). Is it a "
            "causal language model?"
        )
    if _lead(losses[best], losses[second]) < CLEAR_LEAD:
        raise ValueError(
            "`logit_offset`, `attention` and `block_length` must be given, got readings that cannot be told apart on the "
            f"target's own text: {best} with {means[best]:.3f} and {second} with {means[second]:.3f} nats a token."
        )
    return best


def _lead(better: torch.Tensor, worse: torch.Tensor) -> float:
    """Return by how many standard errors one reading's losses lie below another's, token by token."""
    gap = worse - better
    return float(gap.mean() / (gap.std() / len(gap) ** 0.5).clamp(min=1e-9))


@torch.no_grad()
def masked_losses(body: Any, text: torch.Tensor, mask_token_id: int, reading: Reading) -> torch.Tensor:
    """Return the loss of each word of a text, masked alone with all others shown.

    Args:
        body (`transformers.PreTrainedModel`): the language model.
        text (`torch.Tensor` of shape `(1, L)`, int64): the words; the first is not asked for.
        mask_token_id (`int`): of the body.
        reading (`Reading`): how the body is read.

    Returns:
        `torch.Tensor` of shape `(L - 1,)`, float32: in nats.
    """
    text = text.to(body.device)
    size = text.shape[1]
    asked = torch.arange(1, size, device=text.device)
    rows = text.repeat(size - 1, 1)
    rows[asked - 1, asked] = mask_token_id
    mask = additive(reading.seen(size, text.device)[None], body.dtype)
    positions = torch.arange(size, device=text.device)[None]
    losses = []
    for ids, places in zip(rows.split(8), asked.split(8), strict=True):
        logits = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logits = logits[torch.arange(len(ids), device=ids.device), places + reading.logit_offset].float()
        losses.append(torch.nn.functional.cross_entropy(logits, text[0, places], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def check_sees_later_tokens(drafter: Any) -> None:
    """Refuse a body that ignores later tokens, as a causal language model does, or one that sees what a mask hides.

    Args:
        drafter (`DiffusionDrafter`): before its first draft.

    Raises:
        ValueError: if so.
    """
    ids = torch.full((3, 5), drafter.own_mask_token_id, device=drafter.device)
    known = drafter.own_ids[drafter.own_ids >= 0][:4].tolist()
    ids[:, :2] = torch.tensor((known * 2)[:2], device=drafter.device)
    ids[:, 4] = torch.tensor((known * 3)[:3], device=drafter.device)
    body, name = drafter.body, type(drafter.body).__name__

    def change(key_mask: torch.Tensor) -> float:
        """Return the most that the last token changes in the logits of those before it."""
        seen = torch.ones(len(ids), 5, 5, dtype=torch.bool, device=ids.device) & key_mask
        positions = torch.arange(5, device=ids.device)[None]
        logits = body(
            input_ids=ids, attention_mask=additive(seen, drafter.dtype), position_ids=positions, use_cache=False
        ).logits[:, :4]
        return float((logits.float() - logits[:1].float()).abs().max())

    last = torch.arange(5, device=ids.device) == 4
    everything = torch.ones(5, 5, dtype=torch.bool, device=ids.device)
    seen, hidden = change(everything), change(~last[None] | last[:, None])
    if seen == 0:
        raise ValueError(
            f"`body` must be a masked diffusion language model, whose logits depend on later tokens too, got {name}, whose "
            "logits ignore them under a mask that shows everything. Is it a causal language model? Pass those to "
            "model.generate as assistant_model."
        )
    if not hidden <= MOST_LEAK * seen:
        raise ValueError(
            f"`body` must see only what its `attention_mask` of shape (batch, 1, queries, keys) shows, got {name}, which sees "
            "more. Load the weights into a native class of transformers, such as Qwen2ForCausalLM."
        )

"""Prompts from nothing: an instruct model that is shown only the beginning of a user's turn writes the turn itself."""

from pathlib import Path
from typing import Any

from hf_specdiff.training.continuation import Prompted
from hf_specdiff.training.continuation import end_tokens_of
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.regeneration import continue_into

_MARK = "\u2042content\u2042"
MAX_TOKENS = 256
MIN_CHARACTERS = 8


def self_prompts(
    target: Any, tokenizer: Any, count: int, folder: Path, *, batch_size: int = 32, temperature: float = 1.0, seed: int = 0
) -> list[Prompt]:
    """Let an instruct model write users' turns.

    Args:
        target (`transformers.PreTrainedModel`): the target, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        count (`int`): turns to write. Those that do not end within 256 tokens, that are very short or that are there already
            are left out, so that fewer come back.
        folder (`pathlib.Path`): keeps what is written, batch by batch; see `continue_into`.
        batch_size (`int`): turns that are written together.
        temperature (`float`): of sampling.
        seed (`int`): of sampling.

    Returns:
        `list`: chats of one message each, all different.

    Raises:
        ValueError: if the tokenizer has no chat template, or one that does not show a user's turn as it is written.

    Source: arXiv:2406.08464.
    """
    beginning = beginning_of_a_turn(tokenizer)
    ends = end_tokens_of(target)
    turns = continue_into(
        target,
        [Prompted(number, beginning) for number in range(count)],
        folder,
        max_length=len(beginning) + MAX_TOKENS,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        what="Target writes prompts",
    )
    texts: dict[str, None] = {}
    for row in range(len(turns)):
        written = turns.ids(row)[len(beginning) :]
        if written[-1] in ends:
            texts[tokenizer.decode(written, skip_special_tokens=True).strip()] = None
    return [[{"role": "user", "content": text}] for text in texts if len(text) >= MIN_CHARACTERS]


def beginning_of_a_turn(tokenizer: Any) -> list[int]:
    """Return the token ids of a chat up to where the first user's words would stand.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.

    Returns:
        `list[int]`: ids.

    Raises:
        ValueError: if the tokenizer has no chat template, or one that changes what the user writes.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "`prompts` must be texts or chats for a tokenizer without a chat template, got self. Only a model that was trained "
            "on chats writes a user's turn."
        )
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before, mark, _ = text.partition(_MARK)
    if not mark or not before:
        raise ValueError(
            "`prompts` must be texts or chats for this chat template, got self: it does not show where a turn begins."
        )
    return list(tokenizer(before, add_special_tokens=False)["input_ids"])

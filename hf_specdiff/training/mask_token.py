"""Which id stands for "not yet known": one that the target never writes."""

from typing import Any

import torch

from hf_specdiff.training.continuation import end_tokens_of
from hf_specdiff.training.data import Sequences

# How tokenizers name ids that were set aside for such uses.
RESERVED = ("mask", "reserved", "unused", "extra_id", "fim_pad", "placeholder")


def find_mask_token(target: Any, tokenizer: Any, sequences: Sequences) -> int:
    """Choose a mask id that a drafter for a target can have.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        sequences (`Sequences`): text of the target; no id that stands in it is chosen.

    Returns:
        `int`: the tokenizer's mask token, a special token set aside for later, a row of the embedding that no token has, or
            another special token, the first of these that is never written.

    Raises:
        ValueError: if there is none.
    """
    written = set(sequences.tokens.unique().tolist()) | end_tokens_of(target)
    written |= {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    num_rows = target.get_input_embeddings().weight.shape[0]
    special = {index: str(token).lower() for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    candidates = [tokenizer.mask_token_id] if tokenizer.mask_token_id is not None else []
    candidates += [index for index, name in special.items() if any(word in name for word in RESERVED)]
    candidates += range(len(tokenizer), num_rows)
    candidates += special
    for index in candidates:
        if index < num_rows and index not in written:
            return int(index)
    raise ValueError(
        "`mask_token_id` must be an id that the target never writes, got none: each special token stands in its text. "
        "Name an id that stands in none, however rare."
    )


def check_mask_token(index: int, target: Any, sequences: Sequences) -> None:
    """Refuse an id that the target writes.

    Args:
        index (`int`): the mask id.
        target (`transformers.PreTrainedModel`): the target.
        sequences (`Sequences`): its text.

    Raises:
        ValueError: if the id ends the target's text, or stands in it.
    """
    if index in end_tokens_of(target):
        raise ValueError(
            f"`mask_token_id` must not end the target's text, got {index}. Leave it out, and an unused id is chosen."
        )
    if bool(torch.any(sequences.tokens == index)):
        raise ValueError(
            f"`mask_token_id` must be an id that the target never writes, got {index}, which stands in its text. Leave it "
            "out, and an unused id is chosen."
        )

"""Training sequences: token ids, which of them the target wrote, and the windows cut from them.

Letters: B batch, S sequence length, A windows per sequence, W block size, G drafted tokens. Knows tokens and files; knows no
drafter.
"""

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode_document


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences of different lengths, end to end.

    Attributes:
        tokens (`torch.Tensor` of shape `(total,)`, int32): all sequences.
        ends (`torch.Tensor` of shape `(N,)`, int64): index after the last token of each.
        is_answer (`torch.Tensor` of shape `(total,)`, bool): which tokens a drafter is to predict: those that the target wrote,
            or of a document those that stand where it writes.
        groups (`torch.Tensor` of shape `(N,)`, int64): the same number for sequences of the same prompt or document; none of a
            group may be held out where another is trained on.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    is_answer: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def from_lists(cls, sequences: list[list[int]], prompt_lengths: list[int]) -> "Sequences":
        """Join lists of token ids; what follows a prompt, at least all but the first token, is the answer."""
        starts = [max(length, 1) for length in prompt_lengths]
        masks = [[i >= start for i in range(len(ids))] for ids, start in zip(sequences, starts, strict=True)]
        groups = [group_of(ids[:start] if start > 1 else ids) for ids, start in zip(sequences, starts, strict=True)]
        return cls.from_masks(sequences, masks, groups)

    @classmethod
    def from_masks(cls, sequences: list[list[int]], masks: list[list[bool]], groups: list[int]) -> "Sequences":
        """Join lists of token ids, with a mask of the answers' tokens and a group for each."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        flat = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        is_answer = torch.tensor([is_answer for mask in masks for is_answer in mask], dtype=torch.bool)
        return cls(flat, lengths.cumsum(0), is_answer, torch.tensor(groups, dtype=torch.int64))

    @classmethod
    def concatenate(cls, parts: list["Sequences"]) -> "Sequences":
        """Join several into one."""
        starts = torch.tensor([0, *(len(part.tokens) for part in parts)]).cumsum(0)
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]),
            torch.cat([part.is_answer for part in parts]),
            torch.cat([part.groups for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> torch.Tensor:
        """Index of the first token of each sequence, `(N,)` int64."""
        return torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1]])

    def num_answers(self) -> torch.Tensor:
        """Return how many tokens of each sequence are of answers, `(N,)` int64."""
        counts = torch.nn.functional.pad(self.is_answer.long().cumsum(0), (1, 0))
        return counts[self.ends] - counts[self.starts]

    def select(self, rows: torch.Tensor) -> "Sequences":
        """Return some of the sequences, in the given order (`rows` int64)."""
        starts = self.starts
        places = [torch.arange(int(starts[row]), int(self.ends[row])) for row in rows.tolist()]
        index = torch.cat(places) if places else torch.zeros(0, dtype=torch.long)
        lengths = (self.ends - starts)[rows]
        return Sequences(self.tokens[index], lengths.cumsum(0), self.is_answer[index], self.groups[rows])

    def usable(self, max_length: int) -> torch.Tensor:
        """Return which sequences hold a window, an anchor and one token after it, within `max_length` tokens, `(N,)` bool."""
        starts = self.starts
        ends = torch.minimum(self.ends, starts + max_length)
        pairs = torch.nn.functional.pad((self.is_answer[:-1] & self.is_answer[1:]).long().cumsum(0), (1, 0))
        return pairs[(ends - 1).clamp(min=0)] > pairs[torch.minimum(starts, (ends - 1).clamp(min=0))]

    def ids(self, row: int) -> list[int]:
        """Return the token ids of one sequence."""
        return self.tokens[int(self.starts[row]) : int(self.ends[row])].tolist()

    def prompt(self, row: int, max_length: int) -> list[int]:
        """Return what of a sequence the target is to continue: all up to its last answer, or half if it is one answer."""
        start = int(self.starts[row])
        mask = self.is_answer[start : min(int(self.ends[row]), start + max_length)].tolist()
        last = len(mask) - mask[::-1].index(True)  # behind the last answer
        first = last - next((i for i, is_answer in enumerate(reversed(mask[:last])) if not is_answer), last)
        ids = self.ids(row)[:max_length]
        return ids[:first] if first > 1 else ids[: max(len(ids) // 2, 1)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the attributes by name, as they are written to a file."""
        return {"tokens": self.tokens, "ends": self.ends, "is_answer": self.is_answer, "groups": self.groups}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell these sequences from others."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def group_of(ids: list[int]) -> int:
    """Return a number for a prompt's or a document's token ids, from 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(array("q", ids).tobytes()).digest()[:8], "big") >> 1


def hold_out(sequences: Sequences, max_length: int, count: int, seed: int) -> tuple[Sequences, Sequences | None]:
    """Keep some prompts or documents out of training; one that occurs twice is on one side only.

    Args:
        sequences (`Sequences`): all of them.
        max_length (`int`): tokens of a training sequence; what holds no window within is not chosen.
        count (`int`): groups to keep out, at most a tenth of all.
        seed (`int`): of the choice.

    Returns:
        `tuple`: those to train on, in their order, and those kept out, or `None` if there are too few to keep any.
    """
    groups = sequences.groups.tolist()
    candidates = list(dict.fromkeys(sequences.groups[sequences.usable(max_length)].tolist()))
    apart = set(random.Random(seed).sample(candidates, min(count, len(set(groups)) // 10, len(candidates))))
    if not apart:
        return sequences, None
    is_apart = torch.tensor([group in apart for group in groups])
    return sequences.select((~is_apart).nonzero()[:, 0]), sequences.select(is_apart.nonzero()[:, 0])


class SequenceDataset(Dataset):
    """One item per sequence that is long enough to hold a window.

    Args:
        sequences (`Sequences`): prompts and continuations.
        max_length (`int`): tokens at most of a sequence; the rest is cut off.

    Attributes:
        features (`FeatureCache`, *optional*): what the target makes of each sequence; items hold it where it is set.

    Raises:
        ValueError: if no sequence has two tokens of an answer.
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self.sequences = sequences
        starts, keep = sequences.starts, sequences.usable(max_length)
        self.starts, self.lengths = starts[keep], (sequences.ends - starts).clamp(max=max_length)[keep]
        if not len(self.starts):
            raise ValueError(
                f"`sequences` must hold a continuation of at least 2 tokens within {max_length}, got none among {len(starts)} "
                "sequences. Are the prompts longer than the context?"
            )

        self.max_length = max_length
        self.features: Any = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.sequence(index)
        return item if self.features is None else {**item, **self.features[index]}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that tell this data set from others."""
        return hashlib.sha256(f"{self.sequences.digest()} {self.max_length}".encode()).hexdigest()[:16]

    def sequence(self, index: int) -> dict[str, Any]:
        """Return an item without features."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        ids = self.sequences.tokens[start : start + length].long()
        return {"input_ids": ids, "is_answer": self.sequences.is_answer[start : start + length], "index": index}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad sequences on the right.

    Args:
        items (`list[dict]`): of a `SequenceDataset`.

    Returns:
        `dict`: `input_ids` `(B, S)` int64, `is_answer` `(B, S)` bool, false on padding, `lengths` and `indices`, each `(B,)`
            int64; where the items hold them `features` `(B, S, K * D)` and `states` `(B, S, D)`, bfloat16, and
            `log_normalizers` `(B, S)` float32.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    kept = [name for name in ("features", "states", "log_normalizers") if name in items[0]]
    return {
        **{name: pad([item[name] for item in items], batch_first=True) for name in kept},
        "input_ids": pad([item["input_ids"] for item in items], batch_first=True),
        "is_answer": pad([item["is_answer"] for item in items], batch_first=True),
        "lengths": torch.tensor([len(item["input_ids"]) for item in items]),
        "indices": torch.tensor([item["index"] for item in items]),
    }


def sequences_of_texts(tokenizer: Any, texts: Sequence[Prompt], max_length: int) -> Sequences:
    """Take documents as they are, cut into pieces.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        texts (`Sequence`): documents: texts, of which all but the first token is to be predicted and an end-of-text token is
            put after each, or chats, of which the assistant's turns are.
        max_length (`int`): tokens of a piece; a document's rest of fewer than 32 is left out.

    Returns:
        `Sequences`: the pieces; those of a document are of one group.

    Raises:
        ValueError: if no text has three tokens, or no chat a turn of the assistant.
    """
    pieces, masks, groups = [], [], []
    for text in texts:
        ids, is_answer = encode_document(tokenizer, text)
        group = group_of(ids)
        for start in range(0, len(ids), max_length):
            piece, mask = ids[start : start + max_length], is_answer[start : start + max_length]
            if len(piece) >= (32 if start else 3) and any(mask):
                pieces.append(piece)
                masks.append([False, *mask[1:]])
                groups.append(group)
    if not pieces:
        raise ValueError(
            "`prompts` must hold a text of at least 3 tokens, or a chat with a turn of the assistant, "
            f"got none among {len(texts)}."
        )
    return Sequences.from_masks(pieces, masks, groups)

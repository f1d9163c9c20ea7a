"""Training sequences: prompts, the target's own continuations of them, and the windows cut from both.

Letters: B batch, S sequence length, A windows per sequence, W block size. Knows tokens and files; knows no drafter.
"""

import os
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.progress import track
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch.utils.data import Dataset

from hf_specdiff.training.losses import IGNORED
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import encode_document


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences of different lengths, end to end.

    Attributes:
        tokens (`torch.Tensor` of shape `(total,)`, int32): all sequences.
        ends (`torch.Tensor` of shape `(N,)`, int64): index after the last token of each.
        prompt_lengths (`torch.Tensor` of shape `(N,)`, int64): tokens of each that the target did not write.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    prompt_lengths: torch.Tensor

    @classmethod
    def from_lists(cls, sequences: list[list[int]], prompt_lengths: list[int]) -> "Sequences":
        """Join lists of token ids."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        flat = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        return cls(flat, lengths.cumsum(0), torch.tensor(prompt_lengths))

    @classmethod
    def concatenate(cls, parts: list["Sequences"]) -> "Sequences":
        """Join several into one."""
        starts = torch.tensor([0, *(len(part.tokens) for part in parts)]).cumsum(0)
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]),
            torch.cat([part.prompt_lengths for part in parts]),
        )

    def save(self, path: Path) -> None:
        """Write to a safetensors file, beside it first, so that the file is whole or absent."""
        partial = path.with_suffix(".partial")
        save_file({"tokens": self.tokens, "ends": self.ends, "prompt_lengths": self.prompt_lengths}, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Sequences":
        """Read what `save` wrote."""
        return cls(**load_file(path))


class SequenceDataset(Dataset):
    """One item per sequence that is long enough to hold a window.

    Args:
        sequences (`Sequences`): prompts and continuations.
        max_length (`int`): tokens at most of a sequence; the rest is cut off.

    Raises:
        ValueError: if no sequence has two tokens after its prompt.
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self.sequences = sequences
        starts = torch.cat([torch.zeros(1, dtype=torch.long), sequences.ends[:-1]])
        lengths = (sequences.ends - starts).clamp(max=max_length)
        # A window needs its anchor and one token after it, both written by the target.
        keep = lengths - sequences.prompt_lengths >= 2
        self.starts, self.lengths = starts[keep], lengths[keep]
        self.prompt_lengths = sequences.prompt_lengths[keep]
        if not len(self.starts):
            raise ValueError(
                f"`sequences` must hold a continuation of at least 2 tokens within {max_length}, got none among {len(starts)} "
                "sequences. Are the prompts longer than the context?"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = int(self.starts[index]), int(self.lengths[index])
        ids = self.sequences.tokens[start : start + length].long()
        return {"input_ids": ids, "prompt_length": int(self.prompt_lengths[index]), "index": index}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad sequences on the right.

    Args:
        items (`list[dict]`): of a `SequenceDataset`.

    Returns:
        `dict`: `input_ids` `(B, S)` int64, `lengths`, `prompt_lengths` and `indices`, each `(B,)` int64.
    """
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {
        "input_ids": ids,
        "lengths": torch.tensor([len(item["input_ids"]) for item in items]),
        "prompt_lengths": torch.tensor([item["prompt_length"] for item in items]),
        "indices": torch.tensor([item["index"] for item in items]),
    }


@dataclass(frozen=True, slots=True)
class Windows:
    """Many windows of each sequence of a batch.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, A * W)`, int64): for each window its anchor, then masks.
        position_ids (`torch.Tensor` of shape `(B, A * W)`, int64): 0-based, as in the sequence.
        labels (`torch.Tensor` of shape `(B * A, W - 1)`, int64): the tokens behind the masks; -100 past the sequence's end.
        anchors (`torch.Tensor` of shape `(B, A)`, int64): index of each anchor in its sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    anchors: torch.Tensor


def sample_windows(
    batch: dict[str, torch.Tensor], num_anchors: int, block_size: int, mask_token_id: int, generator: torch.Generator
) -> Windows:
    """Cut windows at random anchors among the tokens that the target wrote.

    Args:
        batch (`dict`): what `collate` returns.
        num_anchors (`int`): A, drawn with replacement.
        block_size (`int`): W.
        mask_token_id (`int`): what stands behind the anchor.
        generator (`torch.Generator`): a CPU generator; the only source of randomness.

    Returns:
        `Windows`: on the batch's device.
    """
    ids, lengths, first = batch["input_ids"], batch["lengths"], batch["prompt_lengths"].clamp(min=1)
    room = (lengths - 1 - first).clamp(min=1)  # anchors may stand at first .. length - 2
    draws = torch.rand(len(ids), num_anchors, generator=generator).to(ids.device)
    anchors = first[:, None] + (draws * room[:, None]).long()  # (B, A)
    positions = anchors[:, :, None] + torch.arange(block_size, device=ids.device)  # (B, A, W)
    inside = positions < lengths[:, None, None]
    tokens = ids.gather(1, positions.clamp(max=ids.shape[1] - 1).flatten(1)).view_as(positions)
    labels = tokens.masked_fill(~inside, IGNORED)[:, :, 1:]
    window_ids = torch.full_like(tokens, mask_token_id)
    window_ids[:, :, 0] = tokens[:, :, 0]
    return Windows(window_ids.flatten(1), positions.flatten(1), labels.flatten(0, 1), anchors)


def window_attention_mask(
    anchors: torch.Tensor, context_length: int, block_size: int, *, context_queries: bool
) -> torch.Tensor:
    """Return who sees whom when many windows share one pass.

    Keys: the sequence, then all windows. Queries: all windows; with `context_queries` the sequence in front of them. A window
    slot sees the sequence before its anchor and all slots of its own window; a sequence token sees itself and those before it.

    Args:
        anchors (`torch.Tensor` of shape `(B, A)`, int64): index of each anchor.
        context_length (`int`): S.
        block_size (`int`): W.
        context_queries (`bool`): true for a token-conditioned drafter.

    Returns:
        `torch.Tensor` of shape `(B, 1, queries, S + A * W)`, bool.
    """
    batch_size, num_anchors = anchors.shape
    device = anchors.device
    context = torch.arange(context_length, device=device)
    owner = torch.arange(num_anchors, device=device).repeat_interleave(block_size)  # (A * W,)
    sees_context = context[None, None] < anchors[:, owner, None]  # (B, A * W, S)
    sees_window = (owner[:, None] == owner[None]).expand(batch_size, -1, -1)
    mask = torch.cat([sees_context, sees_window], dim=2)
    if context_queries:
        causal = (context[None] <= context[:, None]).expand(batch_size, -1, -1)
        above = torch.cat([causal, causal.new_zeros(batch_size, context_length, len(owner))], dim=2)
        mask = torch.cat([above, mask], dim=1)
    return mask[:, None]


def sequences_of_texts(tokenizer: Any, texts: Sequence[Prompt], max_length: int) -> Sequences:
    """Take texts as they are, cut into pieces; anchors may stand anywhere but on the first token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        texts (`Sequence`): documents: texts, an end-of-text token is put after each, or chats.
        max_length (`int`): tokens of a piece; a document's rest of fewer than 32 is left out.

    Returns:
        `Sequences`: the pieces.

    Raises:
        ValueError: if no text has three tokens.
    """
    pieces = []
    for text in texts:
        ids = encode_document(tokenizer, text)
        cut = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        pieces += [piece for number, piece in enumerate(cut) if len(piece) >= (32 if number else 3)]
    if not pieces:
        raise ValueError(f"`prompts` must hold a text of at least 3 tokens, got none among {len(texts)}.")
    return Sequences.from_lists(pieces, [1] * len(pieces))


def regenerate(
    target: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    max_length: int,
    batch_size: int = 64,
    shard_size: int = 512,
    **generate_kwargs: Any,
) -> Sequences:
    """Let the target continue the prompts; a drafter learns best from the text it will have to predict.

    Finished shards are kept in `folder`, so that an interrupted call goes on where it stopped. Several processes (`accelerate
    launch`) share the shards out.

    Args:
        target (`transformers.PreTrainedModel`): the target, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, padding on the left.
        prompts (`Sequence`): texts or chats; those of more than `max_length - 2` tokens are left out.
        folder (`pathlib.Path`): of the shards.
        max_length (`int`): tokens of prompt and continuation.
        batch_size (`int`): prompts generated together.
        shard_size (`int`): prompts of a shard.
        **generate_kwargs: more arguments of the target's `generate`: greedily without any; with `do_sample=True` each shard has
            a seed of its own.

    Returns:
        `Sequences`: prompts and continuations, cut after the end-of-text token.

    Raises:
        ValueError: if no prompt leaves room for a continuation.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any id serves
    encoded = [ids for prompt in prompts if 0 < len(ids := encode(tokenizer, prompt)) <= max_length - 2]
    if not encoded:
        raise ValueError(f"`prompts` must leave room for a continuation within {max_length} tokens, got none that does.")
    folder.mkdir(parents=True, exist_ok=True)
    shards = [encoded[start : start + shard_size] for start in range(0, len(encoded), shard_size)]
    paths = [folder / f"sequences-{number:05d}.safetensors" for number in range(len(shards))]
    state = processes()
    own = list(zip(shards, paths, strict=True))[state.process_index :: state.num_processes]
    for shard, path in track(own, description="Target continues the prompts", disable=not state.is_main_process):
        if not path.is_file():
            with torch.random.fork_rng():
                torch.manual_seed(paths.index(path))  # so that an interrupted call goes on with the same text
                continued = _continue_all(target, tokenizer, shard, max_length, batch_size, generate_kwargs)
            Sequences.from_lists(*continued).save(path)
    state.wait_for_everyone()
    return Sequences.concatenate([Sequences.load(path) for path in paths])


def processes() -> PartialState:
    """Return who of how many this process is, as `accelerate launch` started it; on CPUs if told so or if there is no other."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _continue_all(
    target: Any, tokenizer: Any, prompts: list[list[int]], max_length: int, batch_size: int, generate_kwargs: dict[str, Any]
) -> tuple[list[list[int]], list[int]]:
    """Return the continued prompts and the prompts' lengths, in an order by length (padding costs time)."""
    ends = target.generation_config.eos_token_id
    end_tokens = {ends} if isinstance(ends, int) else set(ends or [])
    sequences, prompt_lengths = [], []
    for batch in _batches(sorted(prompts, key=len), batch_size):
        inputs = tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(target.device)
        width = inputs["input_ids"].shape[1]
        output = target.generate(**{**inputs, "max_new_tokens": max_length - width, "do_sample": False, **generate_kwargs})
        for prompt, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row, 1) if token in end_tokens), len(row))
            sequences.append(prompt + row[:end])
            prompt_lengths.append(len(prompt))
    return sequences, prompt_lengths


def _batches(items: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

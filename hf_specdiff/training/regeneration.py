"""Regenerated text as an artefact of its own: a folder of what a target wrote, to train any number of drafters on.

A drafter learns best from the text that it will have to predict, and writing it takes longer than any training; so it is
written once, kept batch by batch, and used again under any other setting of training.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.files import write_whole
from hf_specdiff.training.continuation import Continued
from hf_specdiff.training.continuation import Prompted
from hf_specdiff.training.continuation import continue_prompts
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.processes import processes
from hf_specdiff.training.progress import Speedometer
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.provenance import check_claim
from hf_specdiff.training.provenance import claim
from hf_specdiff.training.provenance import identity_of
from hf_specdiff.training.provenance import read_claim
from hf_specdiff.training.provenance import target_digest

CLAIM = "regeneration.json"
SHARDS = "sequences-??-?????.safetensors"
# Files for each batch: what is finished waits for no more than this part of one.
FILES_PER_BATCH = 4
UNFINISHED = "unfinished-{:02d}.json"
# Passes between two looks at what is in progress: the most that a stop without warning loses of it.
PASSES_PER_LOOK = 32
# Where a target was loaded from may change; what it is may not.
NAMES = ("target", "target_revision")


def regenerate(
    target: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    max_length: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    sources: dict[str, int] | None = None,
) -> Sequences:
    """Let the target continue prompts, and keep what it wrote in a folder; an interrupted call goes on where it stopped.

    Args:
        target (`transformers.PreTrainedModel`): the target, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence`): texts or chats; those of more than `max_length - 2` tokens are left out.
        folder (`pathlib.Path`): see `continue_into`.
        max_length (`int`): tokens of prompt and continuation.
        batch_size (`int`): rows that are written together; may change from call to call.
        temperature (`float`): 0: greedily; else the target samples as its `generate` would at this temperature.
        seed (`int`): of sampling.
        sources (`dict[str, int]`, *optional*): where the prompts come from, in their order, and how many from each, for
            `shares_of`.

    Returns:
        `Sequences`: prompts and continuations in the order of the prompts, cut after the end-of-text token.

    Raises:
        ValueError: if no prompt leaves room for a continuation, `max_length` exceeds the target's context, a chat comes without
            a chat template, or the folder holds text with other settings.
        OSError: if the disk is full; whole files are kept.
    """
    context = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(f"`max_length` must be at most the target's context of {context} tokens, got {max_length}.")
    encoded = [Prompted(number, encode(tokenizer, prompt)) for number, prompt in enumerate(prompts)]
    fitting = [prompt for prompt in encoded if 0 < len(prompt.ids) <= max_length - 2]
    if not fitting:
        shortest = min((len(prompt.ids) for prompt in encoded if prompt.ids), default=0)
        raise ValueError(
            f"`prompts` must leave room for a continuation within {max_length} tokens, got none that does: the shortest of "
            f"{len(encoded)} has {shortest}."
        )
    settings: dict[str, Any] = {"max_length": max_length, "temperature": temperature, "seed": seed}
    record = {"sources": sources or {"prompts": len(encoded)}}
    return continue_into(target, fitting, folder, **settings, batch_size=batch_size, record=record)


def continue_into(
    target: Any,
    prompts: list[Prompted],
    folder: Path,
    *,
    max_length: int,
    batch_size: int,
    temperature: float,
    seed: int,
    record: dict[str, Any] | None = None,
    what: str = "Target continues the prompts",
) -> Sequences:
    """Continue prompts of token ids, and keep the texts in a folder. Several processes (`accelerate launch`) share them out.

    Args:
        target (`transformers.PreTrainedModel`): the target, in evaluation mode.
        prompts (`list[Prompted]`): see `continue_prompts`, as are `max_length`, `batch_size`, `temperature` and `seed`.
        folder (`pathlib.Path`): gets a file for each part of a batch, and one of what is in progress: a stop without warning
            loses a few tokens of each text of a batch, Ctrl-C none.
        max_length (`int`): tokens of prompt and continuation.
        batch_size (`int`): rows that are written together.
        temperature (`float`): of sampling; 0: greedily.
        seed (`int`): of sampling.
        record (`dict`, *optional*): more to write down.
        what (`str`): the work, for its progress.

    Returns:
        `Sequences`: in the order of the prompts' indices.

    Raises:
        ValueError: if the folder holds text with other settings.
        OSError: if the disk is full.
    """
    digest = hashlib.sha256(json.dumps([[prompt.index, prompt.ids] for prompt in prompts]).encode()).hexdigest()
    settings: dict[str, Any] = {"max_length": max_length, "temperature": temperature, "seed": seed if temperature > 0 else None}
    settings |= {"prompts": digest[:16], "num_prompts": len(prompts), "dtype": str(target.dtype), **identity_of(target)}
    settings |= record or {}
    check_claim(folder / CLAIM, settings, folder, NAMES)
    with room_in(folder):
        with processes().main_process_first():
            claim(folder / CLAIM, settings)
        arguments = {"max_length": max_length, "batch_size": batch_size, "temperature": temperature, "seed": seed}
        _write_missing(target, prompts, folder, arguments, what)
    processes().wait_for_everyone()
    return _load(folder)


def load_sequences(folder: Path, target: Any) -> Sequences:
    """Read what `regenerate` wrote, finished or not.

    Args:
        folder (`pathlib.Path`): its folder.
        target (`transformers.PreTrainedModel`): whose text it must be.

    Returns:
        `Sequences`: in the order of the prompts.

    Raises:
        ValueError: if the folder holds no such text, or another target's.
    """
    settings = read_claim(folder / CLAIM)
    if settings is None or not any(folder.glob(SHARDS)):
        raise ValueError(
            f"`sequences` must be a folder that `hf-specdiff regenerate` wrote, got {str(folder)!r}, which holds no such text."
        )
    digest = target_digest(target)
    if settings["target_digest"] != digest:
        raise ValueError(
            f"`sequences` must be this target's text, got {str(folder)!r}, written by {settings['target']} "
            f"(digest {settings['target_digest']}; this one is {digest}). Regenerate with this target into another folder."
        )
    return _load(folder)


def num_missing(folder: Path) -> int:
    """Return how many texts are still to be written into a folder."""
    settings = read_claim(folder / CLAIM)
    return 0 if settings is None else settings["num_prompts"] - len(_finished(folder))


def shares_of(folder: Path) -> list[dict[str, Any]]:
    """Measure what each source has given.

    Args:
        folder (`pathlib.Path`): what `regenerate` wrote into.

    Returns:
        `list[dict]`: of each source `source`, `num_texts`, `num_tokens` that the target wrote, and `share` of all such tokens.
    """
    settings = read_claim(folder / CLAIM)
    assert settings is not None
    parts = [load_file(path) for path in sorted(folder.glob(SHARDS))]
    counts = [Sequences(**{name: part[name] for name in part if name != "indices"}).num_answers() for part in parts]
    indices, written = torch.cat([part["indices"] for part in parts]), torch.cat(counts)
    ends = torch.tensor(list(settings["sources"].values())).cumsum(0)
    source = torch.searchsorted(ends, indices, right=True)
    total = max(int(written.sum()), 1)
    return [
        {
            "source": name,
            "num_texts": int((source == number).sum()),
            "num_tokens": int(written[source == number].sum()),
            "share": int(written[source == number].sum()) / total,
        }
        for number, name in enumerate(settings["sources"])
    ]


def _write_missing(target: Any, prompts: list[Prompted], folder: Path, arguments: dict[str, Any], what: str) -> None:
    """Continue the prompts that no file holds yet, and write a file for every batch of finished ones."""
    state, done = processes(), _finished(folder)
    missing = [prompt for prompt in prompts if prompt.index not in done]
    state.wait_for_everyone()  # before the first new file: all processes must see the same ones as missing
    own = missing[state.process_index :: state.num_processes]
    texts: list[Continued] = []
    unfinished = Unfinished(folder / UNFINISHED.format(state.process_index), {prompt.index: prompt.ids for prompt in own})
    arguments = {**arguments, "unfinished": unfinished.texts, "after_pass": unfinished.look}
    with Speedometer(what, len(own), is_shown=state.is_main_process and bool(own)) as bar:
        try:
            for text in continue_prompts(target, own, **arguments):
                texts.append(text)
                bar.advance(1, len(text.ids) - text.num_prompt)
                if len(texts) >= -(-arguments["batch_size"] // FILES_PER_BATCH):
                    _save(texts, folder, state.process_index)
                    texts = []
                    bar.log()
        except KeyboardInterrupt:
            _save(texts, folder, state.process_index)
            unfinished.save()
            raise
        _save(texts, folder, state.process_index)
    unfinished.path.unlink(missing_ok=True)


class Unfinished:
    """Texts in progress, written down now and then.

    Args:
        path (`pathlib.Path`): the file; what it holds is gone on with.
        prompts (`dict[int, list[int]]`): token ids of the prompts that are still to be continued, by index.

    Attributes:
        texts (`dict[int, list[int]]`): token ids of prompt and continuation so far, by index.
    """

    def __init__(self, path: Path, prompts: dict[int, list[int]]) -> None:
        self.path, self.num_looks = path, 0
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.texts = {int(index): ids for index, ids in earlier.items() if int(index) in prompts}

    def look(self) -> None:
        """Count a pass, and write down what is in progress after some of them."""
        self.num_looks += 1
        if self.num_looks % PASSES_PER_LOOK == 0:
            self.save()

    def save(self) -> None:
        """Write down what is in progress."""
        write_text_whole(self.path, json.dumps(self.texts))


def _save(texts: list[Continued], folder: Path, process: int) -> None:
    """Write a file of finished texts, if there are any, under the next free number."""
    if not texts:
        return
    number = len(list(folder.glob(f"sequences-{process:02d}-?????.safetensors")))
    sequences = Sequences.from_lists([text.ids for text in texts], [text.num_prompt for text in texts])
    content = {**sequences.tensors(), "indices": torch.tensor([text.index for text in texts])}
    write_whole(folder / f"sequences-{process:02d}-{number:05d}.safetensors", lambda path: save_file(content, path))


def _finished(folder: Path) -> set[int]:
    """Return which prompts' texts are in the folder."""
    return {index for path in folder.glob(SHARDS) for index in load_file(path)["indices"].tolist()}


def _load(folder: Path) -> Sequences:
    """Return all texts of a folder, in the order of the prompts."""
    parts = [load_file(path) for path in sorted(folder.glob(SHARDS))]
    order = torch.cat([part.pop("indices") for part in parts]).argsort()
    return Sequences.concatenate([Sequences(**part) for part in parts]).select(order)

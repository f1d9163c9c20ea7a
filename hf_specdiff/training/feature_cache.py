"""A target's hidden states on disk: it runs once over a corpus, and every later epoch costs the drafter alone.

Letters: S tokens of a sequence, K target layers, D hidden size. Knows targets and files; knows no drafter.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_specdiff.core.features import layer_output_indices
from hf_specdiff.core.features import target_features
from hf_specdiff.core.files import write_whole
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import collate
from hf_specdiff.training.data import processes
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.progress import Speedometer
from hf_specdiff.training.provenance import claim
from hf_specdiff.training.provenance import identity_of
from hf_specdiff.training.provenance import read_claim

CLAIM = "features.json"
BATCH_SIZE = 16
# Tokens of a file: what an interrupt may lose, and what is read back in pieces.
TOKENS_PER_FILE = 16_384


class FeatureCache:
    """The features of a data set's sequences, in bfloat16, read from disk one sequence at a time.

    Args:
        folder (`pathlib.Path`): gets the files, and keeps them for any later run on the same sequences.
        dataset (`SequenceDataset`): the sequences.
        target (`transformers.PreTrainedModel`): the target.
        layer_ids (`list[int]`): K layers to keep, counted from 0.

    Raises:
        ValueError: if the folder holds the features of another target, of other layers or of other sequences.
    """

    def __init__(self, folder: Path, dataset: SequenceDataset, target: Any, layer_ids: list[int]) -> None:
        self.folder, self.dataset, self.target, self.layer_ids = folder, dataset, target, layer_ids
        self.settings = {
            "target_layer_ids": list(layer_ids),
            "sequences": dataset.digest(),
            "num_sequences": len(dataset),
            "target_dtype": str(target.dtype),
            **identity_of(target),
        }
        self._check()
        self.files = list(_files_of(dataset.lengths.tolist()))
        self.place_of = {index: (number, start) for number, rows in enumerate(self.files) for index, start in rows}

    @property
    def num_bytes(self) -> int:
        """What all files take together."""
        width = len(self.layer_ids) * self.target.config.get_text_config(decoder=True).hidden_size
        return 2 * width * int(self.dataset.lengths.sum())

    def fill(self) -> None:
        """Run the target over all sequences whose features no file holds yet; says size and time before and while it runs.

        Raises:
            ValueError: if the disk has no room for them, told before anything is written.
            OSError: if it gets full nevertheless; whole files are kept.
        """
        missing = [number for number in range(len(self.files)) if not self._path(number).is_file()]
        if not missing:
            return
        state = processes()
        with room_in(self.folder):
            with state.main_process_first():
                claim(self.folder / CLAIM, self.settings)
            self._check_room(len(missing))
            own = missing[state.process_index :: state.num_processes]
            with Speedometer("Target's features", len(own), is_shown=state.is_main_process) as bar:
                for number in own:
                    self._write(number)
                    bar.advance(1, sum(int(self.dataset.lengths[index]) for index, _ in self.files[number]))
                    bar.log()
        state.wait_for_everyone()

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return the features of one sequence, `(S, K * D)` bfloat16."""
        number, start = self.place_of[index]
        with safe_open(self._path(number), framework="pt") as file:
            return file.get_slice("features")[start : start + int(self.dataset.lengths[index])]

    def _check(self) -> None:
        earlier = read_claim(self.folder / CLAIM)
        if earlier is None:
            return
        names = ("target_digest", "target_dtype", "target_layer_ids", "sequences")
        changed = {name: (earlier.get(name), self.settings[name]) for name in names if earlier.get(name) != self.settings[name]}
        if changed:
            raise ValueError(
                f"`cache_features` must be a fresh folder or hold this target's features of these layers and sequences, got "
                f"{str(self.folder)!r} with other ones: {changed} (there, here). Name another folder."
            )

    def _check_room(self, num_missing: int) -> None:
        """Tell the size, and refuse to begin what cannot end."""
        wanted = self.num_bytes * num_missing / len(self.files) / 2**30
        free = shutil.disk_usage(self.folder).free / 2**30
        if processes().is_main_process:
            what = f"{len(self.dataset):,} sequences in {len(self.layer_ids)} layers"
            print(f"Target's features of {what}: {wanted:.2f} GiB, {free:.1f} GiB are free.", file=sys.stderr, flush=True)
        if wanted > free:
            raise ValueError(
                f"`cache_features` must be on a disk with room for {wanted:.2f} GiB, got {str(self.folder)!r} with {free:.2f} "
                "GiB free. Make room, name a folder on another disk, read fewer layers, or leave the cache out."
            )

    @torch.no_grad()
    def _write(self, number: int) -> None:
        rows = [index for index, _ in self.files[number]]
        parts = []
        for start in range(0, len(rows), BATCH_SIZE):
            batch = collate([self.dataset.sequence(index) for index in rows[start : start + BATCH_SIZE]])
            features = features_of(self.target, batch["input_ids"].to(self.target.device), self.layer_ids)
            parts += [
                row[:length].to(torch.bfloat16).cpu() for row, length in zip(features, batch["lengths"].tolist(), strict=True)
            ]
        content = {"features": torch.cat(parts)}
        write_whole(self._path(number), lambda path: save_file(content, path))

    def _path(self, number: int) -> Path:
        return self.folder / f"features-{number:05d}.safetensors"


def features_of(target: Any, input_ids: torch.Tensor, layer_ids: list[int]) -> torch.Tensor:
    """Run the target over sequences padded on the right, and return what conditions a drafter.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        input_ids (`torch.Tensor` of shape `(B, S)`, int64): the sequences. Attention is causal, so real tokens need no mask.
        layer_ids (`list[int]`): K layers, counted from 0.

    Returns:
        `torch.Tensor` of shape `(B, S, K * D)`.
    """
    outputs = target.get_decoder()(input_ids, use_cache=False, output_hidden_states=layer_output_indices(layer_ids))
    return target_features(outputs.hidden_states, layer_ids, input_ids.shape[1])


def _files_of(lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield for each file the sequences it holds and the token at which each begins there."""
    rows: list[tuple[int, int]] = []
    start = 0
    for index, length in enumerate(lengths):
        if rows and start + length > TOKENS_PER_FILE:
            yield rows
            rows, start = [], 0
        rows.append((index, start))
        start += length
    yield rows

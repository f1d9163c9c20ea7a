"""A target's hidden states on disk: it runs once over a corpus, and every later epoch costs the drafter alone.

Letters: S tokens of a sequence, K target layers, D hidden size, V vocabulary. Knows targets and files; knows no drafter.
"""

import shutil
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_specdiff.core.conditioning import lent_head
from hf_specdiff.core.features import layer_output_indices
from hf_specdiff.core.features import target_features
from hf_specdiff.core.files import write_whole
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import collate
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.processes import processes
from hf_specdiff.training.progress import Speedometer
from hf_specdiff.training.provenance import claim
from hf_specdiff.training.provenance import identity_of
from hf_specdiff.training.provenance import read_claim

CLAIM = "features.json"
BATCH_SIZE = 16
# Tokens of a file: what an interrupt may lose, and what is read back in pieces.
TOKENS_PER_FILE = 16_384
# Names of what is kept of the law, and by how many nats rounding may change it.
LAW = ("states", "log_normalizers")
ROUNDING = 1e-2


class FeatureCache:
    """The features of a data set's sequences, in bfloat16, and the target's law if asked, read from disk sequence by sequence.

    The law of a token is what the target's head makes of the last state, minus a number. Both are kept, so that the
    probabilities of some tokens cost the head's rows of these tokens, and no pass.

    Args:
        folder (`pathlib.Path`): gets the files, and keeps them for any later run on the same sequences.
        dataset (`SequenceDataset`): the sequences.
        target (`transformers.PreTrainedModel`): the target.
        layer_ids (`list[int]`): K layers to keep, counted from 0.
        keeps_law (`bool`): whether to keep the law as well. A folder that does serves runs that do not need it, too.

    Raises:
        ValueError: if the folder holds the features of another target, of other layers or of other sequences, or no law where
            it is asked for; or if the target does more to its logits than its head does.
    """

    def __init__(
        self, folder: Path, dataset: SequenceDataset, target: Any, layer_ids: list[int], *, keeps_law: bool = False
    ) -> None:
        self.folder, self.dataset, self.target, self.layer_ids = folder, dataset, target, layer_ids
        earlier = read_claim(folder / CLAIM)
        self.keeps_law = keeps_law or bool(earlier and earlier.get("keeps_law"))
        self.settings = {
            "target_layer_ids": list(layer_ids),
            "sequences": dataset.digest(),
            "num_sequences": len(dataset),
            "target_dtype": str(target.dtype),
            "keeps_law": self.keeps_law,
            **identity_of(target),
        }
        self._check(earlier)
        if keeps_law:
            check_law(target, dataset.sequence(0)["input_ids"][None].to(target.device))
        self.files = list(_files_of(dataset.lengths.tolist()))
        self.place_of = {index: (number, start) for number, rows in enumerate(self.files) for index, start in rows}

    @property
    def num_bytes(self) -> int:
        """What all files take together."""
        width = (len(self.layer_ids) + self.keeps_law) * self.target.config.get_text_config(decoder=True).hidden_size
        return (2 * width + 4 * self.keeps_law) * int(self.dataset.lengths.sum())

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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return what is kept of one sequence.

        `features` `(S, K * D)` bfloat16, and with the law `states` `(S, D)` bfloat16 and `log_normalizers` `(S,)` float32.
        """
        number, start = self.place_of[index]
        names = ("features", *LAW) if self.keeps_law else ("features",)
        with safe_open(self._path(number), framework="pt") as file:
            return {name: file.get_slice(name)[start : start + int(self.dataset.lengths[index])] for name in names}

    def _check(self, earlier: dict[str, Any] | None) -> None:
        if earlier is None:
            return
        names = ("target_digest", "target_dtype", "target_layer_ids", "sequences", "keeps_law")
        earlier = {"keeps_law": False, **earlier}
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
        kept: dict[int, dict[str, torch.Tensor]] = {}
        # Sequences of about the same length side by side: padding costs as much as text.
        by_length = sorted(rows, key=lambda index: int(self.dataset.lengths[index]))
        for start in range(0, len(rows), BATCH_SIZE):
            batch = collate([self.dataset.sequence(index) for index in by_length[start : start + BATCH_SIZE]])
            features, states = _features_and_states(self.target, batch["input_ids"].to(self.target.device), self.layer_ids)
            for row, (index, length) in enumerate(zip(batch["indices"].tolist(), batch["lengths"].tolist(), strict=True)):
                kept[index] = self._kept(features[row, :length], states[row, :length])
        content = {name: torch.cat([kept[index][name] for index in rows]) for name in kept[rows[0]]}
        write_whole(self._path(number), lambda path: save_file(content, path))

    def _kept(self, features: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is kept of a sequence, see `__getitem__`."""
        kept = {"features": features.to(torch.bfloat16).cpu()}
        if self.keeps_law:
            logits = lent_head(self.target, None)(states)
            kept |= {"states": states.to(torch.bfloat16).cpu(), "log_normalizers": logits.float().logsumexp(-1).cpu()}
        return kept

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
    return _features_and_states(target, input_ids, layer_ids)[0]


def _features_and_states(target: Any, input_ids: torch.Tensor, layer_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features `(B, S, K * D)`, and what the head reads `(B, S, D)`."""
    outputs = target.get_decoder()(input_ids, use_cache=False, output_hidden_states=layer_output_indices(layer_ids))
    return target_features(outputs.hidden_states, layer_ids, input_ids.shape[1]), outputs.last_hidden_state


def law_of(head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, log_normalizers: torch.Tensor) -> torch.Tensor:
    """Return a target's law from what a cache keeps.

    Args:
        head (`Callable`): of `lent_head`: from states to the logits of n tokens.
        states (`torch.Tensor` of shape `(..., D)`): what the head reads.
        log_normalizers (`torch.Tensor` of shape `(...)`, float32): of the law over all tokens.

    Returns:
        `torch.Tensor` of shape `(..., n)`, float32: log-probabilities among all tokens.
    """
    return head(states).float() - log_normalizers[..., None]


@torch.no_grad()
def check_law(target: Any, input_ids: torch.Tensor) -> None:
    """Refuse a target whose law is not what its head makes of the last state: some scale or cap their logits.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        input_ids (`torch.Tensor` of shape `(1, S)`, int64): some text.

    Raises:
        ValueError: if it is another one.
    """
    head = lent_head(target, None)
    own = target(input_ids, use_cache=False).logits.float().log_softmax(-1)
    logits = head(target.get_decoder()(input_ids, use_cache=False).last_hidden_state).float()
    gap = float((law_of(lambda states: states, logits, logits.logsumexp(-1)) - own).abs().max())
    if not gap <= ROUNDING:
        raise ValueError(
            "`cache_features` must be left out for objectives that read this target's law: it does more to its logits than its "
            f"head does (log-probabilities differ by {gap:.2f}). Leave the cache out, or take other objectives."
        )


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

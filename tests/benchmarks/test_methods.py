"""Drafters of every kind go through the benchmark: networks, ones with heads, diffusion language models, and own ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import hf_specdiff
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.time_budget import scaling_methods
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.diffusion.test_trials import make_body


class Copying:
    """A drafter of the user's own that has its two names and nothing else."""

    target_layer_ids = None

    def draft(self, text: hf_specdiff.Text, features: hf_specdiff.Features | None) -> hf_specdiff.Draft:
        return hf_specdiff.Draft(text.tokens[:, -3:], None, has_prefix_law=True)


@pytest.fixture(scope="module")
def kinds() -> Models:
    target = make_target(eos_token_id=None)
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    body, turned = make_body(), list(range(VOCAB_SIZE))[::-1]  # its words have other ids
    drafters = {
        "heads": make_drafter([0, 2], markov_rank=2),
        "language model": hf_specdiff.DiffusionDrafter(body, mask_token_id=31, block_size=4, target=target, own_ids=turned),
        "own": Copying(),
    }
    return Models(target, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0"), drafters)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafters_of_every_kind_are_laid_side_by_side(temperature: float, kinds: Models, tmp_path: Path) -> None:
    words = ("own", "heads, chain", "self-selection", "language model, tree of", "transformers")
    extent = standard.Extent({"any": ["5 9 4 7 7 3"]}, {"any": 8}, (temperature,), words=words)
    record = standard.benchmark(kinds, extent, tmp_path / "out", {}, "command")
    rows: dict[str, dict[str, Any]] = {row["method"]: row for row in record["rows"]}
    refused = {name: row["refusal"] for name, row in rows.items() if "refusal" in row}
    # One token after the other is what its drafts are, so selecting among several means nothing: said, and the others go on.
    assert refused.keys() == ({"own, by self-selection"} if temperature else set())
    assert all("`acceptance` must be one of match, ratio, block" in reason for reason in refused.values())
    ran = {name: row for name, row in rows.items() if name not in refused}
    assert all(row["num_tokens"] == 8 for row in ran.values())
    assert all(row["identical"] is (None if temperature else True) for row in ran.values())
    assert all(row["drafter_seconds"] > 0 for name, row in ran.items() if name.startswith("own"))
    own = ["own, auto", *(["own, by match", "own, by ratio", "own, by block", "own, by self-selection"] if temperature else [])]
    assert [name for name in rows if name.startswith("own")] == own
    # The host's loops take what has a `generate`.
    assert [name for name in rows if name.startswith("transformers")] == [
        "transformers, prompt lookup",
        "transformers' dflash loop, heads",
    ]


def test_a_drafter_of_ones_own_solves_problems_in_its_one_way(kinds: Models) -> None:
    assert [method.name for method in scaling_methods(kinds, ["heads", "own"])] == [PLAIN, "heads, chain", "own, auto"]
    own = scaling_methods(kinds, ["own"])[-1]
    output = own.decode(kinds, {"input_ids": torch.tensor([[5, 9, 4]])}, do_sample=False, max_new_tokens=5)
    assert output.shape == (1, 8)

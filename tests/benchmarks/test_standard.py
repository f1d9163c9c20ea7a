"""The standard set."""

from dataclasses import replace
from pathlib import Path

import hf_specdiff
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.methods import Models

from .conftest import prompts


def test_a_drafter_that_does_not_fit_is_in_the_table(tmp_path: Path) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    drafter.config.target_layer_ids = [0, 1, 2, 99]
    extent = standard.Extent({"any": prompts(1)}, {"any": 4}, temperatures=(0.0,), words=("chain",))
    record = standard.benchmark(Models(target, tokenizer, {"mine": drafter}), extent, tmp_path / "out", {}, "command")
    assert "`target_layer_ids`" in record["rows"][1]["refusal"]
    assert record["profile"] is None


def test_standard_blocks_have_names_of_their_own(models: Models) -> None:
    extent = standard.Extent({"math": prompts(2), "code": prompts(2, "code")}, {"math": 8, "code": 8})
    for sizes in ((1,), (1, 8)):
        blocks = standard.blocks_of(models, replace(extent, batch_sizes=sizes), is_standard=True)
        names = [block.name for block in blocks]
        assert len(set(names)) == len(names)
        assert "math, temperature 0.0, batch 8" in names

"""A hybrid pair, tiny: made, measured, and nothing done twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import hybrid
from benchmarks.report import hybrid_section
from hf_specdiff.benchmarks import runner
from hf_specdiff.benchmarks.methods import PLAIN


def test_the_target_is_a_hybrid_of_about_6_million_parameters() -> None:
    target = AutoModelForCausalLM.from_config(hybrid.FULL.config)
    assert 5.5e6 < target.num_parameters() < 6.5e6
    assert {"conv", "full_attention"} == set(target.config.layer_types)


def test_a_dry_run_makes_and_measures_a_pair_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as interruption:
        interruption.setattr(hybrid, "fit_drafter", lambda *arguments, **settings: False)
        with pytest.raises(hybrid.typer.Exit):
            hybrid.main(folder, dry_run=True)
    monkeypatch.setattr(hybrid, "make_target", never)
    hybrid.main(folder, num_prompts=2, dry_run=True)
    record = json.loads((folder / "hybrid.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["drafter, chain"]["num_identical"] == rows["drafter, auto"]["num_identical"] == 2
    assert "conv" in rows["drafter, tree of 15"]["refusal"]
    assert rows[PLAIN]["ratio_to_plain"] == 1
    assert [found["passes_per_round"] for found in record["passes"]] == [1, 1, 1]  # its convolutions take tokens back
    assert str(tmp_path) not in json.dumps(record)
    assert not (folder / "features").exists()
    monkeypatch.setattr(hybrid, "make_drafter", never)
    monkeypatch.setattr(runner, "run_step", never)
    hybrid.main(folder, num_prompts=2, dry_run=True)
    section = hybrid_section(json.loads((folder / "hybrid.json").read_text()))
    assert "| math | 0 | 1 | drafter, chain |" in section
    assert "The target answers 0 of 2 problems right." in section
    assert "| 15 | 0 % | 1.00 | 1.00 |" in section or record["passes"][-1]["acceptance_rate"] > 0


def never(*arguments: Any, **settings: Any) -> None:
    pytest.fail("done again")

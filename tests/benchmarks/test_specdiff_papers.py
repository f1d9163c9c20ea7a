"""The papers' experiment at its smallest: finished phases are skipped, a run out of time goes on, tables show what there is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import context_cache
from benchmarks import specdiff_papers
from benchmarks.papers_tables import papers_tables
from benchmarks.papers_tables import plot_papers
from benchmarks.report import RESULTS
from benchmarks.report import section_of
from benchmarks.specdiff_papers import Setting
from hf_specdiff.training.losses import IGNORED
from recipes.diffusion_language_models import mask_texts

SIZES = "--num-layers 1 --language-model-steps 2 --alignment-steps 1 --num-texts 16 --max-length 64 --batch-size 2 "
SIZES += "--num-anchors 1 --num-seeds 1 --num-prompts 2 --num-tokens 8 --prompts-together 2"


def run(module: Any, *words: str) -> Any:
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(words))


def test_a_broken_run_goes_on_and_finished_phases_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specdiff_papers, "settings_of", lambda heat: [Setting(heat, gamma=4), Setting(heat, 4, 1, 2, 1.0)])
    output, work = tmp_path / "papers.json", tmp_path / "work"
    command = [str(output), "--work", str(work), *SIZES.split()]
    done: list[str] = []

    def over(self: Any) -> None:
        done.append("check")
        if len(done) == 8:
            raise specdiff_papers.OutOfTime

    monkeypatch.setattr(specdiff_papers.Deadline, "check", over)
    first = run(specdiff_papers, *command)
    assert first.exit_code == 0, first.output
    assert "The minutes are over" in first.output
    record = json.loads(output.read_text())
    assert 0 < len(record["rows"]) < 16
    for name in ("train_diffusion_language_model", "fit_drafter"):
        monkeypatch.setattr(specdiff_papers, name, lambda *words, **settings: pytest.fail("trained again"))
    second = run(specdiff_papers, *command)
    assert second.exit_code == 0, second.output
    record = json.loads(output.read_text())
    assert len(record["rows"]) == 16  # 2 settings, 2 temperatures, 4 drafters
    assert all(row["num_identical"] == row["num_prompts"] for row in record["rows"] if row["temperature"] == 0)
    assert all(1 <= row["low"] <= row["tokens_per_round"] <= row["high"] for row in record["rows"])
    assert "| + CE + streak |" in papers_tables(record)
    assert "temperature 0 16 of 16 texts are plain" in papers_tables(record)
    assert plot_papers(record).axes[0].get_ylabel() == "tokens per round, best K"
    other = run(specdiff_papers, *command, "--num-seeds", "2")
    assert isinstance(other.exception, ValueError)
    assert "`--objective` must be one of + CE" in run(specdiff_papers, *command, "--objective", "+ NLL").output


def test_one_objective_can_be_tried_alone() -> None:
    scale = specdiff_papers.Scale(8, 1200, 600, 64, 160, 16, 2, 1, 4, 64, 2, ("+ streak",))
    assert {name for _, name, _ in specdiff_papers.todo(scale)} == {"unaligned", "+ streak"}


def made_up_record(scale: specdiff_papers.Scale, rates: dict[str, float], **kept: Any) -> dict[str, Any]:
    """Return a record in which each drafter's rounds bring what is said, and 8 samples a third more accepted tokens than 1."""
    notes = []
    for setting, name, seed in specdiff_papers.todo(scale):
        if any(getattr(setting, key) not in values for key, values in kept.items()):
            continue
        accepted = (rates[name] - 1) * (4 / 3 if setting.num_drafts == 8 else 1)
        for number in range(2):
            note: dict[str, Any] = {"num_rounds": 900, "num_accepted": int(accepted * 900) + number, "num_rows": 2}
            note |= {} if setting.temperature else {"num_identical": 2}
            notes.append({**asdict(setting), "drafter": name, "seed": seed, "batch": number, **note})
    rows = specdiff_papers.rows_of_notes(notes, scale.num_seeds, 2)
    conditions = {**asdict(scale), "command": "x", "parameters": {"drafter": 4e6, "target": 9e6}}
    conditions |= {"num_settings": len(rows), "num_settings_planned": 152}
    return {"conditions": conditions, "rows": rows, "speed": []}


def test_the_page_says_what_is_as_in_the_papers_and_what_is_not(tmp_path: Path) -> None:
    scale = specdiff_papers.Scale(8, 1200, 100, 64, 160, 16, 2, 2, 4, 64, 2)
    rates = {"unaligned": 2.0, "+ CE": 3.0, "+ streak": 2.5, "+ CE + streak": 3.0}
    record = made_up_record(scale, rates)
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / RESULTS / "specdiff_papers.json").write_text(json.dumps(record))
    page = section_of(tmp_path, "docs/results.md", "specdiff_papers")
    assert "1,200 steps of 16 texts as a language model, then 100 steps" in page
    assert "152 settings of 152" in page
    assert "temperature 0 608 of 608 texts are plain" in page
    for line in (
        "unaligned: likeliest tokens | about 1.3x | 1.25x (1.25 to 1.25) | 1.25x (1.25 to 1.25) | yes, yes |",
        "| 0.83x (0.83 to 0.83) | 0.83x (0.83 to 0.83) | no, no |",
        "| self-selection among 8 joint samples, to 1 | about 1.15x, up to 1.2x | 1.20x (1.20 to 1.20) | 1.20x",
        "| streak and self-selection, to unaligned: likeliest tokens | 1.4x to 1.5x | 1.50x (1.50 to 1.50) | 1.50x",
        "| 4 denoising steps, to 1 | little | 1.00x (1.00 to 1.00) | 1.00x (1.00 to 1.00) | yes, yes |",
        "| T | drafter | likeliest tokens | K = 1 | K = 2 | K = 4 | K = 8 | best K, to unaligned |",
        f"| 0 | + CE |{' 3.00 (3.00 to 3.00) |' * 4} 3.67 (3.67 to 3.67) | 1.57x (1.57 to 1.57) |",
        "| T | drafter | 1 step | 2 steps | 4 steps |",
        "| T | drafter | 8 tokens | 16 tokens | 32 tokens | 8 tokens, K = 8 | 16 tokens, K = 8 | 32 tokens, K = 8 |",
    ):
        assert line in page
    assert "speed to plain" not in page
    speed = [{"temperature": 0.0, "method": "x", "ratio_to_plain": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}]
    assert "| 0 | x | 2.00x (1.50 to 2.50) |" in papers_tables({**record, "speed": speed})


def test_what_was_not_decoded_has_no_table() -> None:
    scale = specdiff_papers.Scale(8, 1200, 100, 64, 160, 16, 2, 2, 4, 64, 2)
    rates = dict.fromkeys(("unaligned", *specdiff_papers.OBJECTIVES), 2.0)
    page = papers_tables(made_up_record(scale, rates, gamma=(16,), num_denoising_steps=(1,), draft_temperature=(0.0, 1.0)))
    assert "4 denoising steps" not in page
    assert "| T | drafter | 1" not in page
    assert "| not told apart, not told apart |" in page


def test_time_that_is_up_ends_training_as_ctrl_c_does(tmp_path: Path) -> None:
    result = run(specdiff_papers, str(tmp_path / "x.json"), "--work", str(tmp_path / "w"), "--minutes", "1e-9", *SIZES.split())
    assert result.exit_code == 1
    assert "Nothing is decoded yet" in result.output
    assert list((tmp_path / "w" / "language-model-checkpoints").glob("checkpoint-*"))


def test_each_setting_varies_one_thing() -> None:
    centre = Setting(1.0)
    settings = specdiff_papers.settings_of(1.0)
    assert settings[0] == centre
    assert len(set(settings)) == len(settings) == 5 + 12 + 2
    assert {setting.num_denoising_steps for setting in settings} == {1, 2, 4}
    assert {setting.gamma for setting in settings} == {8, 16, 32}


def test_hidden_tokens_are_those_that_are_asked_for() -> None:
    batch = {"input_ids": torch.randint(4, 30, (6, 40)), "lengths": torch.tensor([40, 30, 20, 10, 5, 2])}
    ids, labels, shares = mask_texts(batch, 3, torch.Generator().manual_seed(0))
    is_hidden = labels != IGNORED
    assert torch.equal(ids == 3, is_hidden)
    assert torch.equal(torch.where(is_hidden, labels, ids), batch["input_ids"])
    assert not is_hidden[:, 0].any()
    assert not (is_hidden & (torch.arange(40) >= batch["lengths"][:, None])).any()
    assert sorted(int(share * 6) for share in (shares - 0.05) / 0.95) == list(range(6))


def test_both_contexts_are_timed(tmp_path: Path) -> None:
    options = "--length 24 --num-tokens 3 --num-calls 1 --num-layers 1"
    result = run(context_cache, str(tmp_path / "x.json"), *options.split())
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "x.json").read_text())
    assert [row["context_cache"] for row in record["rows"]] == ["exact", "prefix"]
    assert f"{record['ratio']:.2f} times as fast" in result.output

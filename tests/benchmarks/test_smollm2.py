"""A real model's benchmark: sets take turns until the time is over, figures are there after each prompt, pages show them."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hf_specdiff
from benchmarks import smollm2
from benchmarks.report import REAL_SUMMARY
from benchmarks.report import read_record
from benchmarks.report import row_of
from benchmarks.report import smollm2_section
from benchmarks.report import summary_section
from hf_specdiff.benchmarks.data_sets import Questions
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.plots import plot_tasks
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.training.first_weights import new_drafter

ROOT = Path(__file__).parents[2]
SIZE = smollm2.Size(num_prompts=2, num_category_prompts=1, num_sampled=2, num_untrained=1, max_new_tokens=6)


def write_sets(folder: Path) -> Path:
    sums = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    sets = {
        "gsm8k": sums,
        "humaneval": [{"prompt": "def f():"}] * 2,
        "mbpp": [{"prompt": "Write f."}],
        "spec_bench": [{"category": kind, "turns": [f"A {kind}?"]} for kind in ("writing", "qa")],
    }
    folder.mkdir()
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def models() -> Models:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    untrained = new_drafter(drafter.config, seed=0).eval()
    return Models(target, tokenizer, {smollm2.DRAFTER: drafter, smollm2.UNTRAINED: untrained})


def test_sets_take_turns() -> None:
    blocks = smollm2.blocks_of({"gsm8k": Questions(["a"] * 4, ["1"] * 4), "mbpp": Questions(["b"] * 2)}, SIZE, seed=0)
    assert [(block.task, block.temperature, len(block.texts)) for block in blocks] == [
        ("gsm8k", 0.0, 2),
        ("mbpp", 0.0, 2),
        ("gsm8k", 0.7, 2),
        ("gsm8k, 40 tokens", 0.0, 1),
        ("gsm8k, 40 tokens", 1.0, 1),
    ]
    order = [(block.task, block.temperature, number) for block, number in smollm2.turns(blocks)]
    halves = [("gsm8k", 0.0), ("mbpp", 0.0), ("gsm8k", 0.7)]
    single = [("gsm8k, 40 tokens", 0.0, 0), ("gsm8k, 40 tokens", 1.0, 0)]
    assert order == [(*one, 0) for one in halves] + single + [(*one, 1) for one in halves]


def test_no_prompt_is_begun_that_would_not_be_finished_and_the_rest_is_caught_up(tmp_path: Path) -> None:
    pair, steps = models(), []
    one = Questions(["What is 1 + 1?"] * 4, ["2"] * 4)
    size = smollm2.Size(num_prompts=4, num_category_prompts=1, num_sampled=0, num_untrained=0, max_new_tokens=4)
    blocks = smollm2.blocks_of({"gsm8k": one}, size, seed=0)
    ticks = itertools.count()
    journal = Journal(tmp_path / "work", {})
    # Each look at the clock takes a second: a prompt begins at one and ends at the next, the first one after its warm-up.
    assert not smollm2.measure(pair, blocks, journal, 5, lambda: steps.append(1), lambda: float(next(ticks)))
    assert 1 <= len(steps) < 4
    rows = smollm2.rows_so_far(blocks, pair, journal)
    assert [row["num_prompts"] for row in rows] == [len(steps)] * len(smollm2.GREEDY_METHODS)
    assert all(row["identical"] for row in rows)
    begun = len(steps)
    assert smollm2.measure(pair, blocks, Journal(tmp_path / "work", {}), 1e9, lambda: steps.append(1))
    assert len(steps) == 4
    assert begun < 4


def test_the_command_measures_everything_and_the_pages_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(smollm2.main)
    monkeypatch.setattr(smollm2, "SHORT", 4)
    output = tmp_path / "smollm2.json"
    arguments = [str(output), str(PAIR / "target"), str(PAIR / "features"), "--work", str(tmp_path / "work")]
    arguments += ["--data", str(write_sets(tmp_path / "data"))]
    arguments += ["--num-prompts", "1", "--num-category-prompts", "1", "--num-sampled", "2", "--num-untrained", "1"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "6"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(output.read_text())
    rows = record["rows"]
    assert not [row for row in rows if "refusal" in row]
    greedy = [row for row in rows if not row["temperature"]]
    assert all(row["identical"] for row in greedy)
    assert {row["task"] for row in greedy} == {
        "gsm8k", "humaneval", "mbpp", "spec-bench: multi-turn", "spec-bench: qa", "gsm8k, 4 tokens",
    }  # fmt: skip
    assert {row["method"] for row in greedy} == {
        "plain generate", "drafter, default", "drafter, chain", "drafter, tree of 15", "untrained, default",
        "drafter, default with copies", "transformers, prompt lookup",
    }  # fmt: skip
    assert {row["task"] for row in rows if row["temperature"] == 0.7} == {"gsm8k", "spec-bench: multi-turn", "spec-bench: qa"}
    right = {row["num_right"] for row in greedy if row["task"] == "gsm8k"}
    assert len(right) == 1  # plain's and ours
    assert str(tmp_path) not in output.read_text()
    section = smollm2_section(record)
    assert "| spec-bench: its worst category |" in section
    assert section.count("| gsm8k |") == 2
    summary = summary_section(read_record(ROOT, "standard"), record).splitlines()
    for key, line in zip(REAL_SUMMARY, summary[-2:], strict=True):
        assert line.startswith("| SmolLM2-135M-Instruct on ")
        assert f"{row_of(rows, *key)['ratio_to_plain']:.2f}x" in line
    drawn = [row for row in rows if row["method"] != "plain generate"]
    assert save(plot_tasks(drawn), tmp_path / "smollm2.png").read_bytes().startswith(b"\x89PNG")
    figures = output.read_text()
    again = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "6"])
    assert again.exit_code == 0, again.output
    assert output.read_text() == figures  # nothing was run again

"""Published sets of prompts: read from a folder or from the Hub under one name, by category, and refused by name."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import hf_specdiff
from hf_specdiff.benchmarks import data_sets
from hf_specdiff.benchmarks.answers import final_number
from hf_specdiff.benchmarks.answers import is_right
from hf_specdiff.benchmarks.answers import number_so_far
from hf_specdiff.benchmarks.data_sets import Questions
from hf_specdiff.benchmarks.data_sets import read_questions

SUMS = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(1, 5)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_last_number_is_the_answer() -> None:
    assert final_number("3 + 4 = 7 coins. #### 1,234.50") == "1234.5"
    assert final_number("It costs $18.00.") == "18"
    assert final_number("from 10-8 to -3") == "-3"
    assert final_number("10-8") == "8"
    assert final_number("none") is None
    assert final_number("-0.0") == "0"
    assert is_right("so she has 1,000.", "1000")
    assert not is_right("so she has 1,000 and then 2.", "1000")
    assert not is_right("no idea", "1000")
    assert number_so_far("12 + 30 = 4", is_whole=False) == "30"  # more digits may follow
    assert number_so_far("12 + 30 = 4", is_whole=True) == "4"
    assert number_so_far("12 + 30 = 42 ", is_whole=False) == "42"
    assert number_so_far("1,", is_whole=False) is None


def test_sets_are_found_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_train.jsonl", [{"prompt": "never", "answer": "1"}])
    write(tmp_path / "gsm8k_test_dev.jsonl", SUMS)
    write(tmp_path / "math500.jsonl", [{"turns": ["first", "second"]}])
    found = read_questions("gsm8k", 2, tmp_path)
    assert found == {"gsm8k": Questions([row["prompt"] for row in SUMS[:2]], ["2", "4"])}
    assert read_questions("math500", 9, tmp_path) == {"math500": Questions(["first"])}


def test_each_category_is_measured_for_itself_and_its_kinds_take_turns(tmp_path: Path) -> None:
    kinds = ("writing", "writing", "math", "qa", "math", "qa")
    write(tmp_path / "spec_bench.jsonl", [{"category": kind, "turns": [f"{kind} {n}"]} for n, kind in enumerate(kinds)])
    found = read_questions("spec-bench", 2, tmp_path)
    assert found == {
        "spec-bench: multi-turn": Questions(["writing 0", "math 2"]),
        "spec-bench: qa": Questions(["qa 3", "qa 5"]),
    }


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, "sums", "must be one of gsm8k, humaneval, mbpp, math500, spec-bench, got 'sums'"),
        ({}, "gsm8k", r"must hold one file gsm8k\*\.jsonl, training files aside, got none"),
        ({"gsm8k_a": SUMS, "gsm8k_b": SUMS}, "gsm8k", r"got gsm8k_a\.jsonl, gsm8k_b\.jsonl"),
        (
            {"gsm8k": [{"question": "?"}]},
            "gsm8k",
            "must find 'prompt', a text, or 'turns', a list of texts in each row",
        ),
        ({"gsm8k": [{"prompt": "?"}]}, "gsm8k", "must find 'answer', a text in each row, got prompt in line 1"),
        ({"gsm8k": [{"prompt": "?", "answer": "many"}]}, "gsm8k", "`answer` must hold a number, got 'many'"),
        ({"spec-bench": [{"turns": ["?"]}]}, "spec-bench", "must find 'category', a text in each row"),
    ],
)
def test_what_cannot_be_read_is_said(files: dict[str, list[dict]], name: str, words: str, tmp_path: Path) -> None:
    for stem, rows in files.items():
        write(tmp_path / f"{stem}.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        read_questions(name, 2, tmp_path)


def test_without_network_and_folder_one_line_says_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must reach openai/gsm8k or have --data with a folder that holds gsm8k\*\.jsonl"):
        read_questions("gsm8k", 2)
    with pytest.raises(ValueError, match=r"must reach https://.*spec-bench\*\.jsonl, got neither: HF_HUB_OFFLINE is set"):
        read_questions("spec-bench", 2)
    with pytest.raises(ValueError, match="must be a folder"):
        read_questions("gsm8k", 2, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        (
            "gsm8k",
            {"question": ["1 + 1?"], "answer": ["1 + 1 = <<2>>2\n#### 2"]},
            Questions(["1 + 1?"], ["1 + 1 = <<2>>2\n#### 2"]),
        ),
        ("mbpp", {"text": ["Write f."], "code": ["def f"]}, Questions(["Write f."])),
        ("humaneval", {"prompt": ["def f():"]}, Questions(["def f():"])),
    ],
)
def test_sets_of_the_hub_are_read_by_their_own_columns(
    name: str, columns: dict[str, list], expected: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(path: str, config: str | None, *, split: str) -> Dataset:
        asked.append((path, config, split))
        return Dataset.from_dict(columns)

    monkeypatch.setattr(data_sets, "load_dataset", load)
    assert read_questions(name, 3) == {name: expected}
    source = data_sets.DATA_SETS[name]
    assert asked == [(source.path, source.config, "test")]
    monkeypatch.setattr(data_sets, "load_dataset", lambda *names, **settings: Dataset.from_dict({"other": ["?"]}))
    with pytest.raises(ValueError, match=f"must have the column {source.prompt}.*got other in '{source.path}'"):
        read_questions(name, 3)


def test_spec_bench_is_read_from_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"category": kind, "turns": [f"{kind}?", "more"]}) + "\n" for kind in ("qa", "rag"))
    asked = []
    monkeypatch.setattr(data_sets, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data_sets, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(lines.encode()))
    assert read_questions("spec-bench", 1) == {"spec-bench: qa": Questions(["qa?"]), "spec-bench: rag": Questions(["rag?"])}
    assert asked == [data_sets.SPEC_BENCH]


def test_the_hubs_problems_are_asked_as_those_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sets, "load_dataset", lambda *names, **settings: Dataset.from_dict({"problem": ["Solve {x}."]}))
    (prompt,) = read_questions("math500", 1)["math500"].prompts
    assert prompt == "Solve {x}.\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_prompts_without_room_are_left_out() -> None:
    tokenizer = hf_specdiff.load_demo()[2]
    questions = Questions(["word " * 50, "short"], ["1", "2"])
    assert data_sets.leave_out_long(questions, tokenizer, 20) == (Questions(["short"], ["2"]), 1)

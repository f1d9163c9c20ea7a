import json
from pathlib import Path

import pytest

import hf_specdiff
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import prompt_sets
from hf_specdiff.commands import doctor
from hf_specdiff.commands import main as cli
from hf_specdiff.core.budget import Profile
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.hub.card import check_results
from hf_specdiff.training.first_weights import new_drafter
from tests.conftest import TEMPLATE

PROFILE = Profile([1, 64], [0.01, 0.02], 0.002)


def warnings_of(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.warning for finding in findings if finding.warning}


@pytest.mark.parametrize("kind", ["features", "tokens"])
def test_a_pair_that_fits_gets_no_warning(kind: str) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo(kind)
    findings = doctor.compare(target, drafter, tokenizer)
    assert warnings_of(findings) == {}
    assert {"vocabulary", "eos_token_id", "mask id", "layers read", "device", "dtype", "parameters"} <= {
        f.name for f in findings
    }


def test_every_misfit_is_named() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    drafter.config.vocab_size += 1
    drafter.config.mask_token_id = 40
    drafter.config.target_layer_ids = [1, 5, 9, 16]
    drafter.config.hidden_size = 64
    assert set(warnings_of(doctor.compare(target, drafter, tokenizer))) == {
        "vocabulary",
        "mask id",
        "layers read",
        "hidden size",
    }
    with pytest.raises(ValueError, match="vocabulary"):
        doctor.costs(target, drafter)


def test_special_ids_are_a_warning_for_token_conditioned_drafters_alone() -> None:
    for kind, warned in (("tokens", {"eos_token_id", "pad_token_id"}), ("features", set())):
        target, drafter, tokenizer = hf_specdiff.load_demo(kind)
        drafter.config.eos_token_id, drafter.config.pad_token_id = [7, 8], None
        assert set(warnings_of(doctor.compare(target, drafter, tokenizer))) == warned


def test_a_target_that_verifies_nothing_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_not_chained", lambda target, device: "it looks ahead")
    assert warnings_of(doctor.compare(*hf_specdiff.load_demo()))["verifies"] == "it looks ahead: use plain model.generate"


def test_a_drafter_for_a_deeper_target_is_pointed_out() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    drafter.config.num_target_layers = 24
    assert "24 layers" in warnings_of(doctor.compare(target, drafter, tokenizer))["layers read"]


def test_what_is_no_drafter_or_has_no_mask_is_said_plainly() -> None:
    target, assistant, tokenizer = hf_specdiff.load_demo("autoregressive")
    with pytest.raises(TypeError, match="must be a SpecDiffDrafter, got LlamaForCausalLM"):
        doctor.compare(target, assistant, tokenizer)
    drafter = hf_specdiff.load_demo()[1]
    drafter.config.mask_token_id = None
    assert "must name the id" in warnings_of(doctor.compare(target, drafter, tokenizer))["mask id"]


def test_tokenizers_without_padding_are_fine() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    tokenizer.pad_token = None
    rows = doctor.try_prompts(Models(target, tokenizer, {"drafter": drafter}), {"any": ["def f(x):"]}, 8)
    assert all(row["num_tokens"] == 8 for row in rows)


def test_what_auto_brings_is_told_and_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    models = Models(target, tokenizer, {"drafter": drafter})
    passes: list[int] = []
    hook = target.register_forward_hook(lambda *arguments: passes.append(1))
    rows = doctor.try_prompts(models, {"math": ["1 + 1 ="], "code": ["def f(x):"]}, 8)
    hook.remove()
    assert [row["method"] for row in rows] == ["plain generate", "chain", "tree of 15", "auto"] * 2
    # At worst a pass for each token: the warm-up, both prompts, and what "auto" measured and what was tried first.
    assert len(passes) <= 4 * (doctor.WARM_TOKENS + 2 * 8) + 150
    line = doctor.auto_line(rows)
    for row in rows[3::4]:
        assert f"{row['ratio_to_plain']:.2f}x plain generate's speed on {row['task']}" in line
    assert doctor.tie_line(rows, models) == "in float32 0 of 6 greedy texts (0 %) differ from plain generate's"
    rows[1] |= {"num_identical": 0, "num_near_ties": 1}
    told = doctor.tie_line(rows, models)
    assert "1 of 6 greedy texts (17 %)" in told
    assert told.endswith("1 of them first where two tokens are as close as rounding")
    cheap = Profile([1, 64], [0.01, 0.01], 0.001)
    assert not any("please report" in warning for warning in doctor.verdict(rows, cheap, models))
    rows[1] |= {"num_near_ties": 0}
    assert any("rounding in float32 does not explain it" in warning for warning in doctor.verdict(rows, cheap, models))


def test_an_untrained_drafter_is_called_suspicious() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    models = Models(target, tokenizer, {"drafter": new_drafter(drafter.config, seed=0).eval()})
    rows = doctor.try_prompts(models, {"any": ["def f(x):"]}, 16)
    (warning,) = doctor.verdict(rows, PROFILE, models)
    assert "probably mis-loaded" in warning
    assert "layers [1, 5, 9, 13]" in warning


def test_a_drafter_that_costs_more_than_it_brings_is_pointed_out() -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    models = Models(target, tokenizer, {"drafter": drafter})
    rows = doctor.try_prompts(models, {"any": ["def f(x):"]}, 16)
    (warning,) = doctor.verdict(rows, Profile([1, 64], [0.01, 9.0], 0.002), models)
    assert "tree_budget='auto'" in warning


def test_chats_are_decoded(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    prompts = prompt_sets(file, 4)
    assert prompts == {"mixed": ["a", [{"role": "user", "content": "b"}]]}
    target, drafter, tokenizer = hf_specdiff.load_demo()
    models = Models(target, tokenizer, {"drafter": drafter})
    with pytest.raises(ValueError, match="must be texts for a tokenizer without a chat template"):
        doctor.try_prompts(models, prompts, 4)
    tokenizer.chat_template = TEMPLATE
    rows = doctor.try_prompts(models, prompts, 4)
    assert all(row["num_identical"] == row["num_prompts"] == 2 for row in rows)


def test_the_cost_of_a_round_is_told_in_plain_steps() -> None:
    lines = doctor.cost_lines(Profile([1, 16], [0.01, 0.02], 0.005), gamma=15)
    assert "10.0 ms" in lines[0]
    assert "25.0 ms" in lines[1]
    assert "2.50 tokens per round" in lines[2]


def test_the_command_reports_and_writes_figures_for_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "results.json"
    arguments = ["doctor", str(PAIR / "target"), str(PAIR / "tokens"), "--num-prompts", "1", "--max-new-tokens", "24"]
    cli.app([*arguments, "--output", str(output)], standalone_mode=False)
    shown = capsys.readouterr().out
    for words in ("vocabulary", "eos_token_id", "a plain step takes", "tokens per round"):
        assert words in shown
    results = check_results(json.loads(output.read_text()))
    assert {row["task"] for row in results["rows"]} == {"math", "code"}
    assert all(row["num_identical"] == row["num_prompts"] for row in results["rows"])
    assert results["conditions"]["dtype"] == "float32"

"""The command line does the job, resumes, and says in one line what is wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hf_specdiff
from hf_specdiff.commands import demo
from hf_specdiff.commands.main import app
from hf_specdiff.commands.main import main
from hf_specdiff.commands.main import number_or_word
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.training.prompts import encode

TARGET, FEATURES = str(PAIR / "target"), str(PAIR / "features")
TRAIN = [
    "--max-length",
    "128",
    "--num-layers",
    "1",
    "--batch-size",
    "4",
    "--num-anchors",
    "2",
    "--float32",
    "--save-steps",
    "4",
]


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in load_prompts("math")[:count]))
    return path


def test_generate_streams_plain_generates_text_and_statistics(tmp_path: Path) -> None:
    target, _, tokenizer = hf_specdiff.load_demo()
    records = load_prompts("math")[:2]
    prompts = str(write_prompts(tmp_path / "p.jsonl", 2))
    result = CliRunner().invoke(app, ["generate", TARGET, FEATURES, "--prompts-file", prompts, "--max-new-tokens", "40"])
    assert result.exit_code == 0, result.output
    for record in records:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        text = tokenizer.decode(
            target.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :], skip_special_tokens=True
        )
        assert record["prompt"] + text in result.stdout
    assert "tokens per round" in result.stderr


def test_generate_asks_in_the_chat_template_unless_told_not_to(chat_target: Path) -> None:
    target, tokenizer = hf_specdiff.load_demo()[0], AutoTokenizer.from_pretrained(chat_target)
    prompt = "Add 1 and 2."
    for flags, asked in (((), [{"role": "user", "content": prompt}]), (("--raw",), prompt)):
        ids = torch.tensor([encode(tokenizer, asked)])
        written = target.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        arguments = ["generate", str(chat_target), FEATURES, "--prompt", prompt, "--max-new-tokens", "12", *flags]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert tokenizer.decode(written, skip_special_tokens=True).strip() in result.output


def test_demo_compares_all_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in demo.MAX_NEW_TOKENS:
        monkeypatch.setitem(demo.MAX_NEW_TOKENS, task, 24)
    result = CliRunner().invoke(app, ["demo", "--num-prompts", "1"])
    assert result.exit_code == 0, result.output
    assert "identical: 12/12" in result.output
    for words in ("plain generate", "AR assistant", "tokens, chain", "features, tree", "math: 1", "code: 1"):
        assert words in result.output


def test_train_makes_a_drafter_that_loads_and_drafts(tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p.jsonl", 4), tmp_path / "drafter"
    for conditioning in ("features", "tokens"):
        arguments = ["--prompts", str(prompts), "--output", str(output / conditioning), "--conditioning", conditioning]
        result = CliRunner().invoke(app, ["train", TARGET, *arguments, "--num-epochs", "1", *TRAIN])
        assert result.exit_code == 0, result.output
        drafter = hf_specdiff.SpecDiffDrafter.from_pretrained(output / conditioning)
        assert drafter.config.is_feature_conditioned == (conditioning == "features")
        target, _, tokenizer = hf_specdiff.load_demo()
        ids = tokenizer(load_prompts("math")[9]["prompt"], return_tensors="pt").input_ids
        settings = {"do_sample": False, "max_new_tokens": 20}
        assert torch.equal(
            hf_specdiff.generate(target, ids, assistant_model=drafter, **settings), target.generate(ids, **settings)
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", TARGET, FEATURES], "`--prompt` or `--prompts-file` must be given"),
        (["generate", "nowhere/here", FEATURES, "--prompt", "a"], "`target` must be a model folder"),
        (["generate", TARGET, TARGET, "--prompt", "a"], "LlamaForCausalLM"),
        (["generate", TARGET, FEATURES, "--prompt", "a", "--gamma", "16"], "`gamma` must be an integer from 1 to 15"),
        (["train", TARGET, "--prompts", "no.jsonl", "--output", "x"], "`prompts` must be a text or JSON-lines file"),
        (["demo", "--num-prompts", "0"], "`num_prompts` must be from 1"),
    ],
    ids=["no-prompt", "no-target", "no-drafter", "gamma", "no-prompts", "none-to-show"],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-specdiff", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error


def test_numbers_and_words_are_told_apart() -> None:
    assert [number_or_word(value) for value in (None, "7", "-1", "auto", "1.5")] == [None, 7, -1, "auto", "1.5"]

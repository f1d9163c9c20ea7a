"""The command line does the job, resumes, and says in one line what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_specdiff
from hf_specdiff.commands.main import app
from hf_specdiff.commands.main import number_or_word
from hf_specdiff.commands.train import read_loss_weights
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.demo.bundle import load_prompts

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


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hf_specdiff.commands.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in load_prompts("math")[:count]))
    return path


def test_generate_streams_plain_generates_text_and_statistics(tmp_path: Path) -> None:
    target, _, tokenizer = hf_specdiff.load_demo()
    records = load_prompts("math")[:2]
    result = run(
        "generate", TARGET, FEATURES, "--prompts-file", str(write_prompts(tmp_path / "p.jsonl", 2)), "--max-new-tokens", "40"
    )
    assert result.returncode == 0, result.stderr
    for record in records:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        text = tokenizer.decode(
            target.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :], skip_special_tokens=True
        )
        assert record["prompt"] + text in result.stdout
    assert "tokens per round" in result.stderr


def test_demo_compares_all_methods() -> None:
    result = CliRunner().invoke(app, ["demo", "--num-prompts", "1"])
    assert result.exit_code == 0, result.output
    assert "identical: 12/12" in result.output
    for words in ("plain generate", "AR assistant", "tokens, chain", "features, tree", "math: 1", "code: 1"):
        assert words in result.output


def test_train_makes_a_drafter_that_loads_and_drafts(tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p.jsonl", 8), tmp_path / "drafter"
    for conditioning in ("features", "tokens"):
        arguments = ["--prompts", str(prompts), "--output", str(output / conditioning), "--conditioning", conditioning]
        result = CliRunner().invoke(app, ["train", TARGET, *arguments, "--num-epochs", "2", *TRAIN])
        assert result.exit_code == 0, result.output
        drafter = hf_specdiff.SpecDiffDrafter.from_pretrained(output / conditioning)
        assert drafter.config.is_feature_conditioned == (conditioning == "features")
        target, _, tokenizer = hf_specdiff.load_demo()
        ids = tokenizer(load_prompts("math")[9]["prompt"], return_tensors="pt").input_ids
        settings = {"do_sample": False, "max_new_tokens": 20}
        assert torch.equal(
            hf_specdiff.generate(target, ids, assistant_model=drafter, **settings), target.generate(ids, **settings)
        )


def test_ctrl_c_leaves_a_loadable_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "p.jsonl", 16), tmp_path / "drafter"
    command = [
        sys.executable,
        "-m",
        "hf_specdiff.commands.main",
        "train",
        TARGET,
        "--prompts",
        str(prompts),
        "--output",
        str(output),
    ]
    command += ["--num-epochs", "20", *TRAIN]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = output / "work" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Interrupted" in stderr
    assert not (output / "model.safetensors").exists()
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    hf_specdiff.SpecDiffDrafter.from_pretrained(newest)
    assert int(newest.name.split("-")[1]) < 80
    # Other settings are refused in the same folder; the same ones go on.
    other = run(*command[3:], "--seed", "3")
    assert other.returncode == 2
    assert "fresh folder" in other.stderr
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env={**os.environ})
    assert resumed.returncode == 0, resumed.stderr
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", TARGET, FEATURES], "`--prompt` or `--prompts-file` must be given"),
        (["generate", "nowhere/here", FEATURES, "--prompt", "a"], "`target` must be a model folder"),
        (["generate", TARGET, TARGET, "--prompt", "a"], "`assistant_model` must be a SpecDiffDrafter"),
        (["generate", TARGET, FEATURES, "--prompt", "a", "--gamma", "16"], "`gamma` must be an integer from 1 to 15"),
        (["train", TARGET, "--prompts", "no.jsonl", "--output", "x"], "`prompts` must be a text or JSON-lines file"),
        (["demo", "--num-prompts", "0"], "`num_prompts` must be from 1"),
    ],
    ids=["no-prompt", "no-target", "no-drafter", "gamma", "no-prompts", "none-to-show"],
)
def test_mistakes_end_in_one_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_loss_terms_are_read_or_refused() -> None:
    assert read_loss_weights(["ce:1", "streak:0.5", "dpace"]) == {"ce": 1.0, "streak": 0.5, "dpace": 1.0}
    for term in (["typo:1"], ["ce:0"], ["ce:x"], ["ce:1", "ce:2"], ["ce:nan"]):
        with pytest.raises(ValueError, match="`--loss` must be objective:weight"):
            read_loss_weights(term)


def test_numbers_and_words_are_told_apart() -> None:
    assert [number_or_word(value) for value in (None, "7", "-1", "auto", "1.5")] == [None, 7, -1, "auto", "1.5"]

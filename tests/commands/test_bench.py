"""`hf-specdiff bench` writes figures, table and pictures, and refuses what cannot be measured before any work."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_specdiff
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.commands.main import app
from hf_specdiff.commands.main import main
from hf_specdiff.demo.bundle import PAIR


def prompts(count: int, task: str = "math") -> list[str]:
    return [str(record["prompt"]) for record in hf_specdiff.load_prompts(task)[:count]]


def test_the_command_writes_figures_table_and_pictures(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(1)))
    output = tmp_path / "out"
    arguments = ["bench", str(PAIR / "target"), str(PAIR / "tokens"), "--output", str(output), "--prompts-file", str(file)]
    arguments += ["--max-new-tokens", "5", "--assistant", str(PAIR / "autoregressive"), "--method", "tokens", "--seed", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "results.json").read_text())
    assert {"torch", "transformers", "commit", "machine", "threads", "command", "dtype"} <= record["conditions"].keys()
    assert {row["task"] for row in record["rows"]} == {"mine"}
    assert {row["temperature"] for row in record["rows"]} == {0.0, 1.0}
    names = {row["method"] for row in record["rows"]}
    assert {PLAIN, "transformers, tokens", "tokens, chain", "tokens, auto"} <= names
    assert "transformers, AR assistant" not in names  # no part of its name was asked for
    assert "tokens, tree of 15" in (output / "table.md").read_text()
    assert {path.name for path in output.glob("*.png")} == {"ratio.png", "rounds.png", "acceptance.png", "time.png", "cost.png"}
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert record["profile"]["sizes"][0] == 1
    figures = (output / "results.json").read_text()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads((output / "results.json").read_text())["rows"] == json.loads(figures)["rows"]
    refused = CliRunner().invoke(app, [*arguments[:-1], "4"])
    assert "where seed differs" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "`temperature` must be at least 0"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--method", "eagle"], "`method` must be part of a method's name"),
        (["--max-new-tokens", "1000"], "1024 positions free"),
        (["--budget", "1"], "`--budget` must come with"),
        (["--dtype", "bfloat16"], "must come with a target"),
        (["--time-budget", "--budget", "0.001"], "`budget` must be longer"),
        (["--time-budget", "--budget", "0"], "`budget` must be longer"),
        (["--time-budget", "--method", "auto"], "must stand without"),
        (["--assistant", "x"], "`--assistant` must come with a target"),
        (["--method", "chain", "--method", "eagle"], "got 'eagle'"),
        ([str(PAIR / "target"), str(PAIR / "autoregressive")], "must be SpecDiffDrafters"),
        ([str(PAIR / "target")], "`drafters` must be given"),
        ([str(PAIR / "target"), str(PAIR / "tokens"), str(PAIR / "tokens")], "different last parts"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["hf-specdiff", "bench", "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()

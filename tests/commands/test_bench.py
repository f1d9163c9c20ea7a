"""`hf-specdiff bench` writes figures, table and pictures, and refuses what cannot be measured before any work."""

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM
from typer.testing import CliRunner

import hf_specdiff
from hf_specdiff.benchmarks import runner
from hf_specdiff.benchmarks.answers import final_number
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.commands.bench import _models_of
from hf_specdiff.commands.loading import load_own_drafter
from hf_specdiff.commands.main import app
from hf_specdiff.commands.main import main
from hf_specdiff.demo.bundle import PAIR
from tests.benchmarks.conftest import CHAIN


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


def test_published_sets_are_asked_as_chats_and_answers_are_counted(
    chat_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    (data / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"category": kind, "turns": [f"A {kind}?", "Another?"]} for kind in ("math", "qa", "qa")]
    (data / "spec_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    encode = runner.encode
    monkeypatch.setattr(runner, "encode", lambda tokenizer, prompt: asked.append(prompt) or encode(tokenizer, prompt))
    arguments = ["bench", str(chat_target), str(PAIR / "features"), "--output", str(output), "--data", str(data)]
    arguments += ["--prompts", "gsm8k", "--prompts", "spec-bench", "--max-new-tokens", "12", "--num-prompts", "2"]
    result = CliRunner().invoke(app, [*arguments, "--temperature", "0", "--method", "chain"])
    assert result.exit_code == 0, result.output
    assert [{"role": "user", "content": "What is 1 + 1?"}] in asked
    assert [{"role": "user", "content": "A qa?"}] in asked
    measured = json.loads((output / "results.json").read_text())["rows"]
    assert [row["task"] for row in measured[::2]] == ["gsm8k", "spec-bench: multi-turn", "spec-bench: qa"]
    plain, chain = measured[:2]
    assert plain["num_right"] == chain["num_right"]
    assert plain["num_prompts"] == chain["num_prompts"] == 2
    assert [row["num_right"] for row in measured[2:]] == [None] * 4
    table = (output / "table.md").read_text()
    assert f"| {plain['num_right']}/2 |" in table
    assert "equally often right" in table


def test_right_answers_are_told_from_wrong_ones() -> None:
    """The control of `num_right`: the same text, once with the answer that it gives and once with another."""
    target, drafter, tokenizer = hf_specdiff.load_demo()
    models, methods = Models(target, tokenizer, {"features": drafter}), [Method(PLAIN, {}), CHAIN]
    texts = prompts(1)
    ids = tokenizer(texts, return_tensors="pt").input_ids
    written = target.generate(ids, do_sample=False, max_new_tokens=60)[0, ids.shape[1] :]
    given = str(final_number(tokenizer.decode(written, skip_special_tokens=True)))
    for answer, count in ((given, 1), (f"{given}1", 0)):
        block, journal = runner.Block("math", texts, methods, 60, num_detailed=0, answers=[answer]), Journal()
        runner.run_block(models, block, journal)
        assert [row["num_right"] for row in rows_of(block, models, journal)] == [count, count]


def test_time_budgets_run_on_published_problems(chat_target: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?", "answer": "2"}) + "\n")
    output = tmp_path / "out"
    arguments = ["bench", str(chat_target), str(PAIR / "unaligned"), str(PAIR / "features"), "--time-budget", "--one-answer"]
    arguments += ["--budget", "100", "--prompts", "gsm8k", "--data", str(tmp_path), "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    record = json.loads((output / "results.json").read_text())
    assert {row["method"] for row in record["rows"]} == {PLAIN, "unaligned, chain", "features, chain", "features, auto"}
    assert {(row["difficulty"], row["strategy"], row["problems"]) for row in record["rows"]} == {("gsm8k", "one answer", 1)}
    assert record["conditions"]["num_problems"] == 1
    assert (output / "time_budget.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "`temperature` must be at least 0"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--method", "eagle"], "`method` must be part of a method's name"),
        (["--max-new-tokens", "1000"], "1024 positions free"),
        (["--prompts", "gsm8k"], "must reach openai/gsm8k or have --data with a folder"),
        (["--prompts", "sums"], "must be one of gsm8k, humaneval"),
        (["--prompts", "gsm8k", "--prompts-file", "x"], "must stand without `--prompts-file`"),
        (["--data", "x"], "`--data` must come with `--prompts`"),
        (["--one-answer"], "`--one-answer` must come with `--time-budget`"),
        (["--budget", "1"], "`--budget` must come with"),
        (["--dtype", "bfloat16"], "must come with a target"),
        (["--time-budget", "--budget", "0.001"], "`budget` must be longer"),
        (["--time-budget", "--budget", "0"], "`budget` must be longer"),
        (["--time-budget", "--method", "auto"], "must stand without"),
        (["--time-budget", "--compile"], "must stand without"),
        (["--assistant", "x"], "`--assistant` must come with a target"),
        (["--method", "chain", "--method", "eagle"], "got 'eagle'"),
        ([str(PAIR / "target"), str(PAIR / "autoregressive")], "must hold a drafter of a known format"),
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


OWN_FILE = """
import hf_specdiff

class Copying:
    target_layer_ids = None
    def __init__(self, target): self.target = target
    def draft(self, text, features): return hf_specdiff.Draft.nothing(text.tokens)

made, number = Copying(None), 5
"""


def test_a_drafter_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_FILE)
    target = object()
    assert load_own_drafter(f"{file}:Copying", target).target is target
    assert load_own_drafter(f"{file}:made", target).target is None
    for name, kind, words in (("number", TypeError, "got int"), ("other", ValueError, "that .*mine.py defines, got 'other'")):
        with pytest.raises(kind, match=words):
            load_own_drafter(f"{file}:{name}", target)
    with pytest.raises(ValueError, match="a file that exists"):
        load_own_drafter(f"{tmp_path}/none.py:made", target)
    models = _models_of(str(PAIR / "target"), [str(PAIR / "tokens"), f"{file}:made"], None, "float32", "cpu")
    assert list(models.drafters) == ["tokens", "made"]


def test_a_diffusion_language_model_is_loaded_like_any_drafter(tmp_path: Path) -> None:
    vocab_size = json.loads((PAIR / "target" / "config.json").read_text())["vocab_size"]
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, initializer_range=0.5, **sizes)).save_pretrained(tmp_path / "dream")
    config = json.loads((tmp_path / "dream" / "config.json").read_text())
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": vocab_size - 1}
    (tmp_path / "dream" / "config.json").write_text(json.dumps(config))
    models = _models_of(str(PAIR / "target"), [str(PAIR / "tokens"), str(tmp_path / "dream")], None, "float32", "cpu")
    assert models.drafters["dream"].logit_offset == -1
    assert models.drafters["dream"].num_parameters() < models.drafters["tokens"].num_parameters()

"""Runs from prompts to a drafter: what they learn from, what stops them, and that nothing whole is lost then."""

import errno
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import logging

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.commands.main import main
from hf_specdiff.training import losses
from hf_specdiff.training import pipeline
from hf_specdiff.training import regeneration
from hf_specdiff.training.checkpoints import last_whole_checkpoint
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import hold_out
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.disk import is_full
from hf_specdiff.training.disk import room_in
from hf_specdiff.training.evaluation import HeldOut
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.trainer import SpecDiffTrainer
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_target

from .test_training import make_sequences

PLAN = TrainingPlan(None, num_layers=1, block_size=4, num_epochs=2, batch_size=4, bf16=False, save_steps=4, learning_rate=1e-2)
TEXTS = [f"def f_{i}(x):\n    return x + {i}  # the sum" for i in range(24)]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = hf_specdiff.load_demo()[2]
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture
def target(tokenizer: Any) -> LlamaForCausalLM:
    """A random target that reads and writes the bundled tokenizer's ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def train(target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return `hf-specdiff train` on a few texts, run in this process; it returns the exit code."""
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = "--conditioning tokens --num-layers 1 --block-size 4 --max-length 40 --batch-size 4 --save-steps 4 --float32"

    def run(*options: str, without: Sequence[str] = ()) -> int:
        words = ["train", str(tmp_path / "target"), "--prompts", str(prompts), "--output", str(tmp_path / "drafter")]
        words = [word for word in words if word not in without]
        monkeypatch.setattr(sys, "argv", ["hf-specdiff", *words, *settings.split(), *options])
        verbosity = logging.get_verbosity()
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            logging.set_verbosity(verbosity)
        return 0

    return run


def checkpoints_of(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "work" / "checkpoints").iterdir())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return SpecDiffDrafter.from_pretrained(folder).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    for name, weight in weights_of(one).items():
        assert torch.equal(weights_of(other)[name], weight), name


def test_texts_are_cut_into_pieces_and_short_ones_kept(tokenizer: Any) -> None:
    long = "\n".join(TEXTS)
    ids = [*tokenizer(long)["input_ids"], tokenizer.eos_token_id]
    length = (len(ids) - 5) // 2  # so that a rest of five or six tokens is left
    assert length > 32
    sequences = sequences_of_texts(tokenizer, [long, "x = 1", ""], length)
    starts = [0, *sequences.ends.tolist()]
    pieces = [sequences.tokens[start:end].tolist() for start, end in itertools.pairwise(starts)]
    assert pieces == [ids[:length], ids[length : 2 * length], [*tokenizer("x = 1")["input_ids"], tokenizer.eos_token_id]]
    assert [sequences.is_answer[start:end].tolist() for start, end in itertools.pairwise(starts)] == [
        [False] + [True] * (len(piece) - 1) for piece in pieces
    ]
    assert sequences.groups[0] == sequences.groups[1] != sequences.groups[2]
    with pytest.raises(ValueError, match=r"at least 3 tokens, .* got none among 1"):
        sequences_of_texts(tokenizer, [""], 64)


def test_as_is_learns_the_texts_themselves(
    target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target writes nothing, every document is on one side only, and held-out ones are continued from their middle."""
    seen: dict[str, Any] = {}

    def fit(target: Any, sequences: Sequences, output: Path, plan: TrainingPlan, **settings: Any) -> bool:
        seen.update(settings, sequences=sequences)
        return False

    monkeypatch.setattr(pipeline, "fit_drafter", fit)
    monkeypatch.setattr(pipeline, "regenerate", lambda *arguments, **settings: pytest.fail("the target wrote"))
    plan = TrainingPlan(None, max_length=64, as_is=True)
    assert not train_drafter(target, tokenizer, TEXTS, tmp_path, plan, mask_token_id=3)
    whole = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in TEXTS}

    def pieces(sequences: Sequences) -> set[tuple[int, ...]]:
        starts = [0, *sequences.ends.tolist()]
        return {tuple(sequences.tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)}

    held_out = seen["held_out"]
    kept_out = pieces(held_out.sequences)
    assert len(kept_out) == 2  # a tenth of 24
    assert pieces(seen["sequences"]) == whole - kept_out
    assert sorted(map(tuple, held_out.prompts)) == sorted(ids[: len(ids) // 2] for ids in kept_out)


def test_as_is_chats_are_continued_from_the_last_answer_on(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ask, reply = {"role": "user", "content": "a + b?"}, {"role": "assistant", "content": "it is c"}
    chats = [[{"role": "system", "content": str(i)}, ask, reply, ask, reply] for i in range(10)]
    sequences = sequences_of_texts(tokenizer, chats, 200)
    seen, apart = hold_out(sequences, 200, 8, seed=0)
    assert apart is not None
    assert (len(seen), len(apart)) == (9, 1)
    answers = tokenizer.decode(sequences.tokens[sequences.is_answer])
    assert answers == f"it is c{tokenizer.eos_token}" * 20
    (prompt,) = HeldOut.of(apart, 200).prompts
    text = tokenizer.decode(prompt)
    assert text.count("it is c") == 1
    assert text.endswith(f"<user>a + b?{tokenizer.eos_token}\n<assistant>")


def test_as_is_trains_from_the_command_line_and_is_part_of_the_runs_settings(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train("--as-is", "--num-epochs", "1") == 0
    assert "steps, " in capsys.readouterr().err
    drafter = SpecDiffDrafter.from_pretrained(tmp_path / "drafter")
    assert "of text as it stands" in drafter.config.training["data"]
    assert not (tmp_path / "drafter" / "work" / "sequences").exists()
    assert train("--num-epochs", "1") == 2
    assert "'as_is': (True, False)" in capsys.readouterr().err
    assert train("--as-is", "--regenerate-at", "0") == 2
    assert "`--regenerate-at` must be left out" in capsys.readouterr().err


def test_ctrl_c_leaves_a_loadable_checkpoint_and_the_same_command_goes_on(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The signal comes in the middle of step 6 of 12: that step is finished and saved."""
    output, calls = tmp_path / "drafter", []

    def objective(log_probs: torch.Tensor, labels: torch.Tensor, decay: float) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return losses.decayed_cross_entropy(log_probs, labels, decay)

    monkeypatch.setitem(losses.OBJECTIVES, "decayed_ce", objective)
    command = ["--num-epochs", "2", "--eval-prompts", "0"]
    assert train(*command) == 130
    assert "Interrupted; a checkpoint is in" in capsys.readouterr().err
    assert not (output / "model.safetensors").exists()
    assert checkpoints_of(output) == ["checkpoint-4", "checkpoint-6"]
    SpecDiffDrafter.from_pretrained(output / "work" / "checkpoints" / "checkpoint-6")
    assert train(*command, "--seed", "3") == 2  # other settings are refused in the same folder
    assert "fresh folder" in capsys.readouterr().err
    assert len(calls) == 6
    assert train(*command) == 0
    assert len(calls) == 12
    assert (output / "model.safetensors").exists()


def test_written_text_is_learnt_from_under_any_other_setting(
    train: Callable[..., int], target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "text"
    regenerate(target, tokenizer, TEXTS, folder, max_length=40, sources={"code": len(TEXTS)})
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl")]
    assert train("--sequences", str(folder)) == 2
    assert "`--prompts` or `--sequences` must be given, one of them, got both" in capsys.readouterr().err
    options = ["--num-epochs", "1", "--sequences", str(folder)]
    assert train(*options, without=prompts) == 0
    said = capsys.readouterr().err
    assert "code: 24 texts, " in said
    assert "Step 6 of 6: " in said
    (tmp_path / "drafter").rename(tmp_path / "first")
    assert train(*options, "--block-size", "6", without=prompts) == 0
    assert SpecDiffDrafter.from_pretrained(tmp_path / "drafter").config.block_size == 6
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not (tmp_path / "drafter" / "work" / "sequences").exists()
    assert train(*options, "--as-is", without=prompts) == 2
    assert "must be left out with `--sequences`" in capsys.readouterr().err


def test_a_run_that_is_refused_claims_nothing(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options in (["--mask-token-id", "2"], ["--as-is", "--max-length", "2000", "--mask-token-id", "2"]):
        assert train("--num-epochs", "1", *options) == 2
        assert "`mask_token_id` must not end the target's text, got 2" in capsys.readouterr().err
        assert not (tmp_path / "drafter" / "work" / "plan.json").exists()
    assert train("--num-epochs", "1") == 0
    assert SpecDiffDrafter.from_pretrained(tmp_path / "drafter").config.mask_token_id == 3  # the tokenizer's own


@pytest.mark.usefixtures("with_pictures")
def test_texts_that_exceed_the_length_end_in_no_error_at_the_first_save(
    target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """Nine prompts in ten leave room for an answer of one token only: none of them may be all that a run is judged by."""
    long = Sequences.from_lists([[5 + i] * 40 for i in range(90)], [39] * 90)
    short = Sequences.from_lists([[200 + i] * 12 for i in range(10)], [2] * 10)
    plan = replace(PLAN, max_length=40, num_epochs=4, num_eval_prompts=4, eval_tokens=4)
    sequences = Sequences.concatenate([long, short])
    assert train_drafter(target, tokenizer, sequences, tmp_path / "drafter", plan, mask_token_id=3)
    assert (tmp_path / "drafter" / "acceptance.png").is_file()


def test_a_drafter_is_gone_on_from(target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    sequences = make_sequences()
    plan = replace(PLAN, num_eval_prompts=0, learning_rate=1e-9)
    assert train_drafter(target, tokenizer, sequences, tmp_path / "first", plan, mask_token_id=50)
    later = replace(plan, seed=5)
    for name, start_from in (("second", tmp_path / "first"), ("fresh", None)):
        assert train_drafter(target, tokenizer, sequences, tmp_path / name, later, mask_token_id=50, start_from=start_from)
    first, second, fresh = (weights_of(tmp_path / name)["layers.0.mlp.up_proj.weight"] for name in ("first", "second", "fresh"))
    torch.testing.assert_close(second, first, atol=1e-6, rtol=0)
    assert not torch.allclose(fresh, first, atol=1e-3)
    other = replace(plan, block_size=6)
    with pytest.raises(ValueError, match=r"`start_from` must be a drafter of the shape .*'block_size': \(4, 6\)"):
        train_drafter(target, tokenizer, sequences, tmp_path / "x", other, mask_token_id=50, start_from=tmp_path / "first")
    with pytest.raises(ValueError, match="`output` must be a fresh folder or hold a run with the same settings"):
        train_drafter(target, tokenizer, sequences, tmp_path / "second", later, mask_token_id=50)


def test_a_resumed_run_sums_up_all_its_parts_and_evaluates_not_again_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """12 steps, logged at each; the first part dies in step 7, after the checkpoint of step 4."""
    evaluated: list[int] = []
    calls: list[int] = []

    def decode(self: SpecDiffTrainer) -> dict[str, float]:
        evaluated.append(self.state.global_step)
        return {"tokens_per_round": 1.0, "acceptance_1": 0.5}

    def objective(log_probs: torch.Tensor, labels: torch.Tensor, decay: float) -> torch.Tensor:
        calls.append(1)
        loss = losses.decayed_cross_entropy(log_probs, labels, decay)
        return loss * math.nan if len(calls) == failing else loss

    original = SpecDiffTrainer.train

    def train(self: SpecDiffTrainer, **settings: Any) -> Any:
        self.args.logging_steps = self.state.logging_steps = 1
        return original(self, **settings)

    monkeypatch.setattr(SpecDiffTrainer, "train", train)
    monkeypatch.setattr(SpecDiffTrainer, "evaluate_decoding", decode)
    monkeypatch.setattr(SpecDiffTrainer, "evaluate_windows", lambda self, dataset: {"loss": 1.0})
    monkeypatch.setitem(losses.OBJECTIVES, "decayed_ce", objective)
    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID, "held_out": HeldOut([[5, 6]], make_sequences(4, seed=9))}
    failing = 7
    with pytest.raises(ValueError, match="in step 7"):
        fit_drafter(make_target(), make_sequences(), tmp_path, PLAN, **arguments)
    assert evaluated == [0, 4]
    failing = 0
    capsys.readouterr()
    assert fit_drafter(make_target(), make_sequences(), tmp_path, PLAN, **arguments)
    assert evaluated == [0, 4, 8, 12]
    assert "12 steps, " in capsys.readouterr().err


def test_the_learning_rate_rises_over_a_share_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = SpecDiffTrainer.train

    def train(self: SpecDiffTrainer, **settings: Any) -> Any:
        self.args.logging_steps = 1
        result = original(self, **settings)
        rates.extend(entry["learning_rate"] for entry in self.state.log_history if "learning_rate" in entry)
        return result

    monkeypatch.setattr(SpecDiffTrainer, "train", train)
    fit_drafter(make_target(), make_sequences(), tmp_path, replace(PLAN, warmup=0.25), mask_token_id=MASK_TOKEN_ID)
    assert len(rates) == 12
    assert rates.index(max(rates)) in (2, 3)  # the peak stands behind 3 of 12 steps


def test_a_loss_that_is_no_number_stops_the_run_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps, checkpoints at 4 and 8; the objective fails once, in step 7."""
    calls: list[float] = []

    def objective(log_probs: torch.Tensor, labels: torch.Tensor, decay: float) -> torch.Tensor:
        loss = losses.decayed_cross_entropy(log_probs, labels, decay)
        calls.append(float(loss.detach()))
        return loss * math.nan if len(calls) == 7 else loss

    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID}
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "unbroken", PLAN, **arguments)
    monkeypatch.setitem(losses.OBJECTIVES, "decayed_ce", objective)
    with pytest.raises(
        ValueError, match=r"got a loss of nan in step 7\. The same command goes on from .*checkpoint-4"
    ) as caught:
        fit_drafter(make_target(), make_sequences(), tmp_path / "broken", PLAN, **arguments)
    assert f"goes on from {tmp_path / 'broken' / 'work' / 'checkpoints' / 'checkpoint-4'};" in str(caught.value)
    assert "lower `learning_rate`, now 0.01" in str(caught.value)
    assert checkpoints_of(tmp_path / "broken") == ["checkpoint-4"]
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "broken", PLAN, **arguments)
    assert len(calls) == 7 + 8  # the steps after the checkpoint, and no others
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite and its gradient is not: without a check the checkpoint of step 4 would hold spoilt weights."""
    calls: list[int] = []

    def objective(log_probs: torch.Tensor, labels: torch.Tensor, decay: float) -> torch.Tensor:
        calls.append(1)
        zero = (log_probs.sum() * 0.0).sqrt()  # the root's slope at 0 is infinite
        return losses.cross_entropy(log_probs, labels) + (zero if len(calls) == 4 else 0.0)

    monkeypatch.setitem(losses.OBJECTIVES, "decayed_ce", objective)
    with pytest.raises(ValueError, match=r"got a gradient of (nan|inf) in step 4\. There is no checkpoint yet"):
        fit_drafter(make_target(), make_sequences(), tmp_path, PLAN, mask_token_id=MASK_TOKEN_ID)
    assert not list((tmp_path / "work").rglob("checkpoint-*"))


class FullDisk:
    """A writer that breaks off in the middle of its n-th file."""

    def __init__(self, write: Callable[..., None], number: int) -> None:
        self.write, self.number, self.count = write, number, 0

    def __call__(self, content: Any, path: Any, *arguments: Any, **settings: Any) -> None:
        self.count += 1
        self.write(content, path, *arguments, **settings)
        if self.count == self.number:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_full_while_the_target_continues_loses_no_whole_file(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(regeneration, "save_file", FullDisk(save_file, 2))
    options = ("--num-epochs", "1", "--regenerate-batch-size", "4")
    assert train(*options) == 2
    error = capsys.readouterr().err
    assert f"hf-specdiff: {tmp_path / 'drafter'}: the disk is full" in error
    assert "Traceback" not in error
    work = tmp_path / "drafter" / "work"
    (first,) = (work / "sequences").glob("*.safetensors")  # and nothing of the second
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(regeneration, "save_file", save_file)
    assert train(*options) == 0
    assert first.stat().st_mtime_ns == before
    assert sum(row["num_texts"] for row in regeneration.shares_of(work / "sequences")) == len(TEXTS)
    assert (tmp_path / "drafter" / "model.safetensors").is_file()


def test_a_disk_full_in_a_checkpoint_goes_on_from_the_one_before(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A checkpoint calls torch's writer several times; the fifth call of the run is in the second one."""
    unbroken = tmp_path / "drafter"
    assert train("--as-is", "--num-epochs", "2") == 0
    unbroken = unbroken.rename(tmp_path / "unbroken")
    writer = FullDisk(torch.save, 5)
    monkeypatch.setattr(torch, "save", writer)
    assert train("--as-is", "--num-epochs", "2") == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert "Traceback" not in error
    folder = tmp_path / "drafter" / "work" / "checkpoints"
    assert checkpoints_of(tmp_path / "drafter") == ["checkpoint-4", "checkpoint-8"]
    assert not (folder / "checkpoint-8" / "trainer_state.json").exists()
    assert train("--as-is", "--num-epochs", "2") == 0
    assert last_whole_checkpoint(folder) is not None
    assert_same_weights(unbroken, tmp_path / "drafter")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("writer", ["torch", "python"])
def test_what_is_said_of_a_device_that_is_full_is_understood(writer: str, tmp_path: Path) -> None:
    write = {
        "torch": lambda: torch.save({"a": torch.zeros(300_000)}, "/dev/full"),
        "python": lambda: Path("/dev/full").write_text("a" * 100_000),
    }[writer]
    with pytest.raises(OSError, match="the disk is full") as caught, room_in(tmp_path):
        write()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)


def test_what_each_library_says_of_a_full_disk_is_understood() -> None:
    """Word for word what safetensors and torch raise on a full file system."""
    assert is_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert is_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_full(RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"))


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("shapes differ"), ValueError("no")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, room_in(tmp_path):
        raise error
    assert caught.value is error


def test_prompts_without_room_for_an_answer_are_refused(target: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave room for a continuation within 8 tokens, got none"):
        regenerate(target, tokenizer, TEXTS, tmp_path, max_length=8)


def test_steps_and_memory_are_logged_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainers: list[SpecDiffTrainer] = []
    original = SpecDiffTrainer.train

    def train(self: SpecDiffTrainer, **settings: Any) -> Any:
        trainers.append(self)
        self.args.logging_steps = 5  # 12 steps
        return original(self, **settings)

    monkeypatch.setattr(SpecDiffTrainer, "train", train)
    monkeypatch.setattr(SpecDiffTrainer, "evaluate_decoding", lambda self: {"tokens_per_round": 1.0, "acceptance_1": 0.5})
    held_out = HeldOut([[5, 6]], make_sequences(4, seed=9))
    fit_drafter(make_target(), make_sequences(), tmp_path, PLAN, mask_token_id=MASK_TOKEN_ID, held_out=held_out)
    history, footprint = trainers[0].state.log_history, trainers[0].footprint
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [5, 10]
    assert all(entry["seconds_per_step"] > 0 and entry["peak_memory_bytes"] > 2**20 for entry in logged)
    assert sum(5 * entry["seconds_per_step"] for entry in logged) < footprint.seconds
    assert footprint.num_steps == 12
    whole = next(entry for entry in history if "train_runtime" in entry)
    assert whole["seconds_per_step"] == pytest.approx(footprint.seconds / 12)
    assert footprint.seconds < whole["train_runtime"]  # evaluations and checkpoints are no steps
    assert not any("seconds_per_step" in entry for entry in history if "eval_loss" in entry)
    assert f"12 steps, {footprint.seconds / 12:.3f} s per step, peak memory " in capsys.readouterr().err

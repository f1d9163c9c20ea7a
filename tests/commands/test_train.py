"""`hf-specdiff train` without its work: words to a plan, or to one line that says what is wrong with them."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers import logging

from hf_specdiff.commands.main import main
from hf_specdiff.commands.plan_options import NAMES
from hf_specdiff.commands.plan_options import option_of
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.training.drafter_config import make_drafter_config
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.settings import default_of
from hf_specdiff.training.settings import setting_of
from tests.conftest import make_target


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrainingPlan, dict[str, Any]]]:
    """Return `hf-specdiff train` without its work: words to a plan and what goes with it."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    target = make_target(vocab_size=len(tokenizer))
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    config = make_drafter_config(target, TrainingPlan([0, 1], num_layers=1, block_size=5, has_mask_embedding=True), 9)
    new_drafter(config, 0, target).save_pretrained(tmp_path / "trunk")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    seen: list[Any] = []

    def train(target: Any, tokenizer: Any, corpus: Any, output: Path, plan: TrainingPlan, **settings: Any) -> bool:
        seen[:] = [plan, settings]
        return True

    monkeypatch.setattr("hf_specdiff.commands.train.train_drafter", train)

    def run(*options: str) -> tuple[TrainingPlan, dict[str, Any]]:
        seen.clear()
        words = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["hf-specdiff", "train", str(tmp_path / "target"), *words, *options])
        verbosity = logging.get_verbosity()
        with suppress(SystemExit):
            main()
        logging.set_verbosity(verbosity)
        return seen[0], seen[1]

    return run


def test_a_drafter_to_go_on_from_tells_its_shape(command: Callable[..., Any], tmp_path: Path) -> None:
    plan, settings = command("--init", str(tmp_path / "trunk"), "--train", "head", "--head", "gated", "--draft-vocab", "40")
    assert (plan.num_layers, plan.block_size, plan.target_layer_ids) == (1, 5, [0, 1])
    assert (plan.has_mask_embedding, settings["mask_token_id"]) == (True, 9)
    assert (plan.head, plan.head_rank, plan.trained, plan.draft_vocab_size) == ("gated", 64, "head", 40)
    other = ["--num-layers", "2", "--num-target-layers", "1", "--block-size", "7"]
    plan, settings = command("--init", str(tmp_path / "trunk"), *other)
    assert (plan.num_layers, plan.block_size, plan.target_layer_ids) == (2, 7, [1])
    plan, settings = command("--num-target-layers", "2")
    assert (plan.num_layers, plan.block_size, plan.head, plan.trained, settings["mask_token_id"]) == (3, 16, None, "all", None)


# No setting has its default; `as_is` and `temperature` exclude each other.
ALL = {
    "num_layers": 2,
    "block_size": 7,
    "max_length": 33,
    "num_epochs": 1.5,
    "batch_size": 5,
    "num_anchors": 3,
    "learning_rate": 2e-4,
    "loss_weights": {"ce": 1.0, "streak": 0.5},
    "loss_decay": 4.0,
    "context_weight": 0.25,
    "seed": 6,
    "bf16": False,
    "save_steps": 9,
    "num_eval_prompts": 11,
    "eval_tokens": 12,
    "patience": 13,
    "temperature": 0.5,
    "warmup": 0.125,
    "has_mask_embedding": True,
    "draft_vocab_size": 40,
    "head": "markov",
    "head_rank": 8,
    "predicts_from_anchor": True,
    "trained": "head",
    "from_target": True,
    "lora_rank": 3,
    "lora_layers": ["q_proj", "v_proj"],
}
AS_IS = {"as_is": True, "predicts_from_anchor": False, "has_mask_embedding": False, "bf16": True}


def words_of(settings: dict[str, Any]) -> list[str]:
    """Return the options that name these settings."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            both = setting_of(FIELDS[name]).option.split("/")
            words.append(both[0] if value else both[1])
            continue
        values = [f"{key}:{weight}" for key, weight in value.items()] if isinstance(value, dict) else value
        for each in values if isinstance(values, list) else [values]:
            words += [option_of(name), str(each)]
    return words


def test_the_command_and_python_give_the_same_plan(command: Callable[..., Any]) -> None:
    assert command("--conditioning", "tokens")[0] == TrainingPlan(None)
    plan, settings = command("--num-target-layers", "3")
    assert plan == TrainingPlan([0, 1, 2])
    assert settings["mask_token_id"] is settings["start_from"] is settings["language_model"] is None
    assert set(ALL) | set(AS_IS) == set(NAMES)
    assert not [name for name, value in ALL.items() if value == default_of(FIELDS[name])]
    for settings in (ALL, AS_IS):
        plan, _ = command("--num-target-layers", "1", *words_of(settings))
        assert plan == TrainingPlan([1], **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--head-rank", "8"], "`--head-rank` must be left out without `--head`"),
        (["--train", "trunk"], "`--train` must be all or head, got 'trunk'."),
        (["--batch-size", "0"], "`--batch-size` must be at least 1, got 0."),
        (["--learning-rate", "0"], "`--learning-rate` must be positive, got 0.0."),
        (["--lora", "0"], "`--lora` must be at least 1, got 0. Take 32"),
        (["--eval-prompts", "-1"], "`--eval-prompts` must be at least 0, got -1."),
        (["--conditioning", "both"], "`--conditioning` must be features or tokens, got 'both'."),
        (["--as-is", "--regenerate-at", "0"], "`--regenerate-at` must be left out with `--as-is`, got 0."),
        (["--sequences", "x"], "`--prompts` or `--sequences` must be given, one of them, got both."),
    ],
)
def test_words_that_cannot_be_are_refused_before_any_work(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_specdiff.commands.train.load_model", lambda *arguments, **settings: pytest.fail("it was loaded"))
    monkeypatch.setattr(sys, "argv", ["hf-specdiff", "train", "x", "--prompts", "y", "--output", "z", *options])
    verbosity = logging.get_verbosity()
    with pytest.raises(SystemExit) as end:
        main()
    logging.set_verbosity(verbosity)
    assert end.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())

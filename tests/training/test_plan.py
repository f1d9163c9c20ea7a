"""The settings of a run: what they may be, and that nothing else is taken."""

import inspect
import re
from typing import Any

import pytest

from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.plan import TrainingPlan


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be positive, got nan"),
        ({"num_epochs": float("inf")}, "`num_epochs` must be positive, got inf"),
        ({"warmup": 1.0}, "`warmup` must be from 0 to 0.99, got 1.0"),
        ({"seed": -1}, "`seed` must be from 0 to 4294967295, got -1"),
        ({"head": "rnn"}, "`head` must be markov or gated, got 'rnn'"),
        ({"head_rank": 0}, "`head_rank` must be from 1 to 16384, got 0. Take 64, or 256."),
        ({"lora_rank": 0}, "`lora_rank` must be at least 1, got 0. Take 32"),
        ({"context_weight": -0.1}, "`context_weight` must be at least 0, got -0.1"),
        ({"loss_weights": {"typo": 1.0}}, "`loss_weights` must be positive weights of some of ce, "),
        ({"loss_weights": {}}, "`loss_weights` must be positive weights of some of ce, "),
        ({"loss_weights": {"ce": -1.0}}, "`loss_weights` must be positive weights of some of ce, "),
        ({"loss_weights": ["ce"]}, "`loss_weights` must be positive weights of some of ce, "),
    ],
)
def test_what_a_setting_cannot_be_is_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        TrainingPlan(None, **setting)


@pytest.mark.parametrize("setting", [{"batch_size": 2.5}, {"num_layers": True}, {"bf16": 1}, {"head": 3}, {"seed": None}])
def test_what_is_nothing_of_a_settings_kind_is_refused(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(TypeError, match=rf"^`{name}` must be of type \w+, got {value!r}\.$"):
        TrainingPlan(None, **setting)


def test_every_setting_is_in_the_docstring() -> None:
    lines = str(inspect.getdoc(TrainingPlan)).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("    ") and " (`" in line] == list(FIELDS)
    assert max(map(len, lines)) <= 128
    assert "    head (`str`, *optional*): " in "\n".join(lines)

"""On a CPU, a pass over a draft shares keys and values among the heads of a group, and leaves no trace of it."""

import inspect
import os

import pytest
import torch
from transformers.integrations import sdpa_attention

import hf_specdiff
from hf_specdiff.core.cache import FORCE_GQA
from hf_specdiff.core.cache import grouped_heads
from tests.conftest import make_drafter
from tests.conftest import make_target

KNOWS_SETTING = FORCE_GQA in inspect.getsource(sdpa_attention)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE_GQA, raising=False)


def test_the_setting_is_taken_back_also_after_an_error() -> None:
    seen = []

    def failing() -> None:
        seen.append(os.environ[FORCE_GQA])
        raise KeyError

    with pytest.raises(KeyError), grouped_heads(True, 2):
        failing()
    assert seen == ["1"]
    assert FORCE_GQA not in os.environ
    with grouped_heads(False, 2):
        assert FORCE_GQA not in os.environ
    with grouped_heads(True, 1):  # goes another way, without a copy
        assert FORCE_GQA not in os.environ


def test_loops_within_loops_leave_it_to_the_first() -> None:
    with grouped_heads(True, 2):
        with grouped_heads(True, 2):
            pass
        assert os.environ[FORCE_GQA] == "1"
    assert FORCE_GQA not in os.environ


def test_the_users_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_GQA, "0")
    with grouped_heads(True, 2):
        assert os.environ[FORCE_GQA] == "0"
    assert os.environ[FORCE_GQA] == "0"


@pytest.mark.skipif(not KNOWS_SETTING, reason="this version of transformers always copies under a mask")
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("own", [None, "0"], ids=["ours", "control"])
def test_no_pass_copies_the_cache(shape: str, own: str | None, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = make_target(), make_drafter()  # two heads share one
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = target.generate(prompt, **settings)
    copies = []
    repeat_kv = sdpa_attention.repeat_kv

    def counting(states: torch.Tensor, count: int) -> torch.Tensor:
        copies.append(count)
        return repeat_kv(states, count)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counting)
    if own is not None:
        monkeypatch.setenv(FORCE_GQA, own)
    result = hf_specdiff.generate(target, prompt, assistant_model=drafter, draft_shape=shape, **settings)
    assert torch.equal(result, expected)
    assert bool(copies) == (own is not None)

"""Caches: no pass copies one, no trace of that is left, and a drafter's own holds no more than its windows see."""

import inspect
import os
from typing import Any

import pytest
import torch
from transformers.integrations import sdpa_attention

import hf_specdiff
from hf_specdiff.core.cache import FORCE_GQA
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.cache import WindowLayer
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


WINDOW = 5


@pytest.mark.parametrize("has_two_rows", [False, True], ids=["one row", "two rows"])
def test_a_windowed_layer_keeps_no_more_than_its_window(has_two_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text; the control, which keeps everything, drafts the same tokens."""
    target = make_target()
    drafter = make_drafter(
        [0, 2], layer_types=["sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=WINDOW
    )
    ids = torch.tensor([[1, 5, 9, 4, 7, 7, 3, 8, 2, 6], [1, 8, 3, 3, 6, 2, 5, 4, 4, 9]])[: 1 + has_two_rows]
    kept: list[tuple[int, int]] = []
    keep = RaggedCache.keep

    def watching(cache: RaggedCache, slots: list[list[int]]) -> None:
        keep(cache, slots)
        windowed, full = cache.cache.layers
        size = windowed.keys.untyped_storage().nbytes() // windowed.keys[:, :, :1].nbytes  # a view would hold what it hides
        if len(cache.ends) == 1 + has_two_rows:
            kept.append((size - max(cache.ends) + min(cache.ends), full.keys.shape[2]))

    def run() -> Any:
        kept.clear()
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
        return hf_specdiff.generate(target, ids, assistant_model=drafter, draft_shape="chain", gamma=5, **settings)

    monkeypatch.setattr(RaggedCache, "keep", watching)
    bounded = run()
    assert len(kept) > 20
    assert {size for size, _ in kept} == {WINDOW - 1}
    assert max(length for _, length in kept) > 40
    monkeypatch.setattr(WindowLayer, "drop", lambda layer, end: None)
    growing = run()
    assert max(size for size, _ in kept) > 40
    assert torch.equal(bounded.sequences, growing.sequences)
    assert bounded.speculation.num_accepted == growing.speculation.num_accepted

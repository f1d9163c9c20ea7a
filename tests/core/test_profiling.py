"""Profiles of pairs: measured once, kept, shared where they may be and doubted where rounds do not agree with them."""

import json
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import profiling
from hf_specdiff.core.budget import FIRST_STEPS
from hf_specdiff.core.budget import Budget
from hf_specdiff.core.costs import NUM_CLASSES
from hf_specdiff.core.costs import Profile
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.core.profiling import learn
from hf_specdiff.core.profiling import profile_of
from hf_specdiff.core.speculation import SpeculationConfig
from tests.conftest import make_drafter
from tests.conftest import make_target

CPU = torch.device("cpu")
TREE = SpeculationConfig(5, draft_shape="tree")
MEASURED = Profile([1, 65], [0.010, 0.020], drafter_seconds=0.002)
NEUTRAL = [1.0] * (2 * NUM_CLASSES)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with isolated_profiles(tmp_path):
        yield tmp_path / "profiles"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """What measuring finds, in turn; the last for ever. What was measured is taken off the front."""
    found = [MEASURED] * 9
    monkeypatch.setattr(profiling, "measure_profile", lambda *pair: found.pop(0))
    return found


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module, torch.nn.Module], None]:
    """Let the passes of a pair take what a profile says, 10 ms and next to nothing, whatever the machine does besides."""
    now = [0.0]

    def passes_of(target: torch.nn.Module, drafter: torch.nn.Module) -> None:
        for module, seconds in ((target, 0.010), (drafter, 0.0001)):
            module.register_forward_hook(lambda *_, seconds=seconds: now.__setitem__(0, now[0] + seconds))

    monkeypatch.setattr("hf_specdiff.core.generate.time.perf_counter", lambda: now[0])
    return passes_of


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user reads."""
    written: list[str] = []
    logger = logging.get_logger("hf_specdiff.core.profiling")
    monkeypatch.setattr(logger, "warning", written.append)
    monkeypatch.setattr(logger, "warning_once", written.append)
    return written


def another_process(folder: Path) -> AbstractContextManager[None]:
    """Return a context in which nothing is known but what stands in the files."""
    return isolated_profiles(folder.parent)


def test_a_measured_profile_is_kept_and_read_again(folder: Path, drafter: SpecDiffDrafter, lines: list[str]) -> None:
    target = make_target()
    first = profile_of(target, drafter, TREE, CPU)
    assert first.sizes[0] == 1
    assert first.target_seconds == sorted(first.target_seconds)
    (path,) = folder.iterdir()
    assert len(lines) == 1
    assert "at most 2 seconds or 20 plain steps" in lines[0]
    assert str(path) in lines[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_doubtful": False}))
    with another_process(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "measure_profile", lambda *pair: pytest.fail("measured twice"))
        assert profile_of(target, drafter, TREE, CPU) == replace(first, is_doubtful=False)
        assert profile_of(target, drafter, TREE, CPU, path) == replace(first, is_doubtful=False)


def test_one_profile_serves_every_shape_and_both_ways_to_decode(measured: list[Profile], timed: Callable) -> None:
    target, drafter, ids = make_target(), make_drafter(), torch.tensor([[1, 5, 9]])
    timed(target, drafter)
    for shape in ("chain", "tree"):
        for do_sample in (False, True):
            settings = {"draft_shape": shape, "do_sample": do_sample, "max_new_tokens": 6, "gamma": "auto"}
            hf_specdiff.generate(target, ids, assistant_model=drafter, **settings)
    assert len(measured) == 8


def test_pairs_and_machines_do_not_share_what_was_learnt(
    measured: list[Profile], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafters of equal configs, targets of equal configs, and other numbers of threads."""
    pairs = [(make_target(seed), make_drafter(seed=other)) for seed, other in ((0, 0), (0, 1), (1, 0))]
    for pair in pairs:
        profile_of(*pair, TREE, CPU)
    monkeypatch.setattr(profiling, "machine_of", lambda device: "an abacus")
    profile_of(*pairs[0], TREE, CPU)
    assert len(list(folder.iterdir())) == 4
    monkeypatch.undo()


def test_equal_weights_in_another_object_are_the_same_pair(measured: list[Profile], folder: Path) -> None:
    for _ in range(2):
        profile_of(make_target(), make_drafter(), TREE, CPU)
    assert len(list(folder.iterdir())) == 1


def test_a_damaged_file_is_measured_again_with_one_line(measured: list[Profile], folder: Path, lines: list[str]) -> None:
    pair = (make_target(), make_drafter(), TREE, CPU)
    profile_of(*pair)
    (path,) = folder.iterdir()
    path.write_text("{")
    lines.clear()
    with another_process(folder):
        assert profile_of(*pair) == MEASURED
    assert len(measured) == 7
    assert "cannot be read" in lines[0]
    assert json.loads(path.read_text())["sizes"] == [1, 65]


def test_what_a_call_learns_goes_half_way_and_no_further(measured: list[Profile], folder: Path) -> None:
    measured[0] = replace(MEASURED, factors=[4.0] * len(NEUTRAL))
    pair = (make_target(), make_drafter())
    budget = Budget(profile_of(*pair, TREE, CPU), 1)
    budget.calibration.factors = [4.0] * (len(NEUTRAL) - 1) + [9.0]
    learn(*pair, CPU, budget)
    assert profile_of(*pair, TREE, CPU).factors == [4.0] * (len(NEUTRAL) - 1) + [3.0]
    (path,) = folder.iterdir()
    before = path.read_bytes()
    budget.calibration.factors = [4.0] * (len(NEUTRAL) - 1) + [9.5]
    learn(*pair, CPU, budget)
    assert path.read_bytes() == before  # not by enough
    budget.calibration.factors = [0.25, *[4.0] * (len(NEUTRAL) - 2), 3.0]
    learn(*pair, CPU, budget)
    assert json.loads(path.read_text())["factors"][0] == 0.5


def test_what_drafting_has_saved_is_partly_for_the_next_call_to_lose(measured: list[Profile]) -> None:
    pair = (make_target(), make_drafter())
    for saved, expected in ((-5.0, FIRST_STEPS), (1.0, FIRST_STEPS + 0.8), (100.0, FIRST_STEPS + 2.0)):
        budget = Budget(profile_of(*pair, TREE, CPU), 1)
        budget.allowance.steps = FIRST_STEPS + saved
        learn(*pair, CPU, budget)
        assert profile_of(*pair, TREE, CPU).allowance == pytest.approx(expected)


def test_a_doubtful_profile_is_measured_again_but_not_for_ever(measured: list[Profile]) -> None:
    measured[:] = [replace(MEASURED, is_doubtful=True)] * 9
    pair = (make_target(), make_drafter(), TREE, CPU)
    counts = []
    for _ in range(16):
        profile_of(*pair)
        counts.append(9 - len(measured))
    # At once, then after 1, 2, 4 and 8 more calls.
    assert counts == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]


def test_rounds_that_are_quicker_than_a_profile_have_it_measured_again(
    measured: list[Profile], folder: Path, lines: list[str]
) -> None:
    """What was measured while other programs ran does not poison later calls; the least of both is kept."""
    busy = Profile([1, 65], [0.015, 0.060], 0.001)
    measured[0] = busy
    pair = (make_target(), make_drafter())
    for call in range(3):
        seconds = [0.0]
        budget = Budget(profile_of(*pair, TREE, CPU), 1, clock=lambda now=seconds: now[0])
        for _ in range(12):
            budget.wants_draft(1)
            budget.pace.observe(0.5 if call == 0 else 1.0, is_drafted=False)
        learn(*pair, CPU, budget)
    assert len(measured) == 7
    assert "again" in lines[1]
    profile = profile_of(*pair, TREE, CPU)
    assert (profile.target_seconds, profile.drafter_seconds) == (MEASURED.target_seconds, busy.drafter_seconds)
    with another_process(folder):
        assert profile_of(*pair, TREE, CPU) == profile
    assert len(measured) == 7


def test_the_next_call_goes_on_from_what_was_learnt(
    measured: list[Profile], folder: Path, prompt: torch.Tensor, timed: Callable
) -> None:
    free = Profile([1, 65], [0.010, 0.0101], 0.0001, allowance=4.0)
    measured[0] = free
    target, drafter = make_target(0, eos_token_id=None), make_drafter(eos_token_id=None)  # as good as never accepted
    timed(target, drafter)
    settings = {"do_sample": False, "max_new_tokens": 30, "tree_budget": "auto"}
    for _ in range(12):
        hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings)
    known = profile_of(target, drafter, TREE, CPU)
    assert min(known.factors) < 0.9
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["factors"] == pytest.approx(known.factors, rel=profiling.NOTABLE_CHANGE)
    # A given profile is neither changed nor learnt from.
    hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings, profile=free)
    assert profile_of(target, drafter, TREE, CPU) == known


def test_a_cache_that_cannot_be_written_costs_no_text(
    measured: list[Profile], lines: list[str], monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor
) -> None:
    target, drafter = make_target(), make_drafter()
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = target.generate(prompt, **settings)
    settings["tree_budget"] = "auto"

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    assert torch.equal(hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings), expected)
    lines.clear()
    monkeypatch.setattr(profiling, "write_profile", full_disk)
    monkeypatch.setattr(profiling, "NOTABLE_CHANGE", -1.0)  # anything learnt is to be written
    assert torch.equal(hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings), expected)
    assert len(lines) == 1
    assert "could not be kept" in lines[0]
    lines.clear()
    another = make_drafter(seed=1)
    assert torch.equal(hf_specdiff.generate(target, prompt, assistant_model=another, **settings), expected)
    assert len(lines) == 2  # that it measures, and that the next process has to do so again


def test_profiles_of_a_benchmark_are_its_own(measured: list[Profile], folder: Path, tmp_path: Path) -> None:
    pair = (make_target(), make_drafter())
    profile_of(*pair, TREE, CPU)
    with isolated_profiles(tmp_path / "elsewhere"):
        assert profiling.cache_folder() == tmp_path / "elsewhere" / "profiles"
        profile_of(*pair, TREE, CPU)
        assert len(measured) == 7
    assert profiling.cache_folder() == folder
    profile_of(*pair, TREE, CPU)
    assert len(measured) == 7

"""The benchmark of a step times what it says, in turn, and writes it down; how long that takes is no test's business."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import training_step
from benchmarks.training_step import main
from benchmarks.training_step import make_trainer
from benchmarks.training_step import only_passes
from hf_specdiff.training import footprint
from hf_specdiff.training.data import collate
from hf_specdiff.training.footprint import Footprint
from hf_specdiff.training.footprint import peak_memory

SIZES = {"batch_size": 2, "num_anchors": 2, "num_steps": 3}


@pytest.mark.parametrize("conditioning", training_step.CONDITIONINGS)
def test_passes_are_those_of_the_step(conditioning: str, tmp_path: Path) -> None:
    """Target and drafter run as often alone as in a step and on the same windows, and no gradient is left."""
    trainer = make_trainer(conditioning, tmp_path, **SIZES)
    seen: list[torch.Tensor] = []
    for model in (trainer.target.get_decoder(), trainer.model):
        model.register_forward_hook(lambda module, arguments, output: seen.append(output[0].detach()))
    batch = collate([trainer.train_dataset[i] for i in range(2)])
    trainer.model.train()
    passes = only_passes(trainer, batch)
    assert not seen
    passes()
    alone = seen.copy()
    assert len(alone) == (2 if conditioning == "features" else 1)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    seen.clear()
    trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(seen, alone)


def test_steps_and_passes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    trainer = make_trainer("tokens", tmp_path, **SIZES)
    monkeypatch.setattr(training_step, "only_passes", lambda trainer, batch: lambda: order.append("passes"))
    step = trainer.create_optimizer().step
    monkeypatch.setattr(trainer.optimizer, "step", lambda *arguments: [order.append("step"), step(*arguments)][1])
    trainer.train()
    assert order == ["passes", "step", "step", "passes", "passes", "step"]
    assert len(trainer.whole) == len(trainer.alone) == 3
    assert min(trainer.whole) > 0


def test_rows_are_written_for_both_conditionings(tmp_path: Path) -> None:
    output = tmp_path / "results" / "step.json"
    main(output, **SIZES)
    rows = json.loads(output.read_text())["rows"]
    assert [row["conditioning"] for row in rows] == ["features", "tokens"]
    for row in rows:
        assert row.keys() == {"conditioning", "seconds_per_step", "seconds_of_passes", "ratio", "peak_memory_bytes"}
        assert row["ratio"] > 0


@pytest.mark.parametrize(("platform", "expected"), [("linux", 3072), ("darwin", 3)])
def test_peak_memory_is_in_bytes_whatever_the_system_counts_in(
    platform: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3), RUSAGE_SELF=0)
    monkeypatch.setattr(footprint, "RESOURCE", usage)
    monkeypatch.setattr(footprint, "sys", SimpleNamespace(platform=platform))
    assert peak_memory(torch.device("cpu")) == expected


def test_peak_memory_is_of_this_process() -> None:
    """Whoever has imported torch holds more than 64 MiB, and less than there are."""
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    assert 2**26 < peak < 2**42


def test_a_system_that_does_not_tell_its_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "RESOURCE", None)
    clock = Footprint(torch.device("cpu"))
    assert clock.of_all_steps() == {}
    assert clock.summary() == "0 steps."
    clock.num_steps, clock.seconds = 4, 2.0
    assert clock.since_last_log() == {"seconds_per_step": 0.5}
    assert clock.since_last_log() == {}
    assert clock.summary() == "4 steps, 0.500 s per step."

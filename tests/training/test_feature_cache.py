"""Features on disk are the features that the target would make, and nobody else's."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import Gemma2Config

from hf_specdiff.training import feature_cache
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import collate
from hf_specdiff.training.draft_vocabulary import restrict
from hf_specdiff.training.feature_cache import FeatureCache
from hf_specdiff.training.feature_cache import features_of
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_drafter
from tests.conftest import make_target

from .test_training import make_sequences
from .test_training import make_trainer

LAYERS = [0, 2]
PLAN = TrainingPlan(LAYERS, num_layers=1, block_size=4, max_length=20, num_epochs=1, batch_size=4, bf16=False)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "TOKENS_PER_FILE", 60)


def filled(folder: Path, dataset: SequenceDataset, layers: list[int] = LAYERS, target: Any = None) -> FeatureCache:
    cache = FeatureCache(folder, dataset, target or make_target(), layers)
    cache.fill()
    return cache


@pytest.mark.usefixtures("small_files")
def test_what_is_read_back_is_what_the_target_makes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Sequences of several lengths over several files, some of them cut."""
    dataset, target = SequenceDataset(make_sequences(), 20), make_target()
    cache = filled(tmp_path, dataset, target=target)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert cache.num_bytes == 2 * 2 * 16 * int(dataset.lengths.sum())
    assert cache.num_bytes < sum(path.stat().st_size for path in files) < 1.2 * cache.num_bytes + 200 * len(files)
    told = capsys.readouterr().err
    assert told.startswith("Target's features of 24 sequences in 2 layers: 0.00 GiB")
    assert f"Target's features: {len(files)} of {len(files)}, " in told
    for index in range(len(dataset)):
        with torch.no_grad():
            alone = features_of(target, dataset.sequence(index)["input_ids"][None], LAYERS)[0]
        torch.testing.assert_close(cache[index]["features"].float(), alone, atol=0.05, rtol=0.01)


@pytest.mark.usefixtures("small_files")
def test_cached_features_give_the_loss_of_computed_ones_without_the_target(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", make_drafter(LAYERS), num_anchors=3)
    dataset = trainer.train_dataset
    items = [dataset[i] for i in range(8)]
    assert "features" not in items[0]
    with torch.no_grad():
        computed = float(trainer.compute_loss(trainer.model, collate(items)))
    dataset.features = filled(tmp_path / "cache", dataset, target=trainer.target)
    calls: list[int] = []
    trainer.target.get_decoder().register_forward_hook(lambda *arguments: calls.append(1))
    with torch.no_grad():
        cached = float(trainer.compute_loss(trainer.model, collate([dataset[i] for i in range(8)])))
        # And a control: other sequences' features give another loss.
        batch = collate([dataset[i] for i in range(8)])
        batch["features"] = batch["features"].flip(0)
        other = float(trainer.compute_loss(trainer.model, batch))
    assert not calls
    assert cached == pytest.approx(computed, rel=2e-3)
    assert abs(other - computed) > 10 * abs(cached - computed)


@pytest.mark.usefixtures("small_files")
def test_whole_files_are_kept_and_others_made(tmp_path: Path) -> None:
    dataset, target = SequenceDataset(make_sequences(), 20), make_target()
    before = [filled(tmp_path, dataset, target=target)[index]["features"] for index in range(len(dataset))]
    (tmp_path / "features-00001.safetensors").unlink()
    kept = (tmp_path / "features-00000.safetensors").stat().st_mtime_ns
    calls: list[int] = []
    target.get_decoder().register_forward_hook(lambda *arguments: calls.append(1))
    again = filled(tmp_path, dataset, target=target)
    assert len(calls) == 1
    assert (tmp_path / "features-00000.safetensors").stat().st_mtime_ns == kept
    for index, features in enumerate(before):
        assert torch.equal(again[index]["features"], features)


def test_the_features_of_others_are_refused(tmp_path: Path) -> None:
    dataset = SequenceDataset(make_sequences(), 20)
    filled(tmp_path, dataset)
    for changed in (
        {"layers": [0, 1]},
        {"target": make_target(seed=1)},
        {"target": make_target().to(torch.bfloat16)},
        {"dataset": SequenceDataset(make_sequences(), 19)},
        {"dataset": SequenceDataset(make_sequences(seed=4), 20)},
    ):
        with pytest.raises(ValueError, match=r"`cache_features` must be a fresh folder or hold this target's features"):
            filled(tmp_path, **{"dataset": dataset, **changed})
    filled(tmp_path, dataset)


def test_a_disk_without_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(ValueError, match=r"`cache_features` must be on a disk with room for 0\.00 GiB, got "):
        filled(tmp_path, SequenceDataset(make_sequences(), 20))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_on_cached_features_ends_and_another_one_uses_them_again(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        target = make_target()
        calls: list[int] = []
        target.get_decoder().register_forward_hook(lambda *arguments, calls=calls: calls.append(1))
        plan = replace(PLAN, seed=seed)
        arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID, "cache_features": tmp_path / "cache"}
        assert fit_drafter(target, make_sequences(), tmp_path / name, plan, **arguments)
        assert bool(calls) == (name == "one")
    plan = replace(PLAN, loss_weights={"kl": 1.0})
    with pytest.raises(ValueError, match=r"`cache_features` must be a fresh folder .*'keeps_law': \(False, True\)"):
        fit_drafter(make_target(), make_sequences(), tmp_path / "kl", plan, **arguments)
    with pytest.raises(ValueError, match="must be left out for a token-conditioned drafter"):
        fit_drafter(make_target(), make_sequences(), tmp_path / "tokens", TrainingPlan(None, block_size=4), **arguments)


@pytest.mark.parametrize("kept", [None, [2, 3, 5, 8, 13, 21]])
@pytest.mark.parametrize("objective", ["tv", "kl", "dpace_kl"])
def test_a_cached_law_gives_the_loss_of_a_computed_one_without_the_target(
    objective: str, kept: list[int] | None, tmp_path: Path
) -> None:
    drafter = make_drafter(LAYERS)
    if kept is not None:
        restrict(drafter, torch.tensor(kept))
    trainer = make_trainer(tmp_path / "run", drafter, num_anchors=3, loss_weights={objective: 1.0})
    dataset = trainer.train_dataset
    with torch.no_grad():
        computed = float(trainer.compute_loss(trainer.model, collate([dataset[i] for i in range(8)])))
    dataset.features = FeatureCache(tmp_path / "cache", dataset, trainer.target, LAYERS, keeps_law=True)
    dataset.features.fill()
    calls: list[int] = []
    trainer.target.get_decoder().register_forward_hook(lambda *arguments: calls.append(1))
    with torch.no_grad():
        batch = collate([dataset[i] for i in range(8)])
        cached = float(trainer.compute_loss(trainer.model, batch))
        # And a control: the law of other texts gives another loss.
        batch["states"] = batch["states"].flip(0)
        other = float(trainer.compute_loss(trainer.model, batch))
    assert not calls
    assert cached == pytest.approx(computed, rel=5e-3)
    assert abs(other - computed) > 2 * abs(cached - computed)


def test_a_cache_with_the_law_serves_runs_that_do_not_need_it(tmp_path: Path) -> None:
    dataset, target = SequenceDataset(make_sequences(), 20), make_target()
    with_law = FeatureCache(tmp_path, dataset, target, LAYERS, keeps_law=True)
    with_law.fill()
    assert with_law.num_bytes == (2 * 3 * 16 + 4) * int(dataset.lengths.sum())
    again = filled(tmp_path, dataset, target=target)
    assert torch.equal(again[3]["states"], with_law[3]["states"])


def test_the_law_of_a_target_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma2Config(**shape, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    target = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="must be left out for objectives that read this target's law: it does more"):
        FeatureCache(tmp_path, SequenceDataset(make_sequences(), 20), target, LAYERS, keeps_law=True)
    FeatureCache(tmp_path, SequenceDataset(make_sequences(), 20), target, LAYERS)

"""Weights come from safetensors files of their own folder, and are finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.weights import is_safe_name
from tests.conftest import make_drafter


class Unpickled(Exception):
    """Raised by the pickle that must never be read."""


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Unpickled, ("the pickle was read",)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder whose weights lie in several files."""
    make_drafter().save_pretrained(tmp_path / "drafter", max_shard_size="4KB")
    assert (tmp_path / "drafter" / "model.safetensors.index.json").is_file()
    return tmp_path / "drafter"


def point_index_at(folder: Path, file: str) -> None:
    place = folder / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file)
    place.write_text(json.dumps(index))


def test_sharded_weights_load(sharded: Path) -> None:
    loaded = SpecDiffDrafter.from_pretrained(sharded)
    for name, tensor in make_drafter().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors.bin", "weights.pt"])
def test_an_index_that_names_a_pickle_is_refused(sharded: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"norm.weight": torch.zeros(16), "bomb": Bomb()}, sharded / file)
    point_index_at(sharded, file)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="must name safetensors files in its own folder"):
        SpecDiffDrafter.from_pretrained(sharded)


@pytest.mark.parametrize("up", ["../", "/", "sub/", "..\\"])
def test_an_index_that_leaves_its_folder_is_refused(sharded: Path, up: str) -> None:
    make_drafter(seed=1).save_pretrained(sharded.parent / "other")
    file = f"{sharded.parent}/other/model.safetensors" if up == "/" else f"{up}other/model.safetensors"
    point_index_at(sharded, file)
    with pytest.raises(ValueError, match="in its own folder"):
        SpecDiffDrafter.from_pretrained(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": [], "metadata": {}}', '{"weight_map": {"a": 1}, "metadata": {}}']
)
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"`model.safetensors.index.json` must"):
        SpecDiffDrafter.from_pretrained(sharded)


def test_a_deeply_nested_index_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"`model.safetensors.index.json` must"):
        SpecDiffDrafter.from_pretrained(sharded)


def test_safe_names() -> None:
    assert is_safe_name("model-00001-of-00002.safetensors")
    assert not any(map(is_safe_name, ["a.bin", "a/b.safetensors", "..\\b.safetensors", "C:b.safetensors", None, 3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layers", [None, [0]])
def test_weights_that_are_not_finite_are_refused(value: float, layers: list[int] | None, tmp_path: Path) -> None:
    drafter = make_drafter(layers)
    with torch.no_grad():
        drafter.norm.weight[3] = value
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finite weights.*norm\.weight"):
        SpecDiffDrafter.from_pretrained(tmp_path)

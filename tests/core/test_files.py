"""Files are whole or absent, whatever stops their writer; weights are read from safetensors of their own folder, and finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.files import PARTIAL
from hf_specdiff.core.files import is_safe_name
from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.files import write_whole
from tests.conftest import make_drafter


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no room")

    path = tmp_path / "file.json"
    with pytest.raises(OSError, match="no room"):
        write_whole(path, fail)
    assert not list(tmp_path.iterdir())
    write_whole(path, lambda beside: beside.write_text("whole"))
    with pytest.raises(OSError, match="no room"):
        write_whole(path, fail)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_leaves_behind_is_told_from_the_files_of_a_folder(tmp_path: Path) -> None:
    """Whoever looks for files by their suffix must not find half a one."""
    seen = []
    write_whole(tmp_path / "weights.safetensors", lambda path: (seen.append(path), path.touch()))
    assert [path.suffix for path in seen] == [PARTIAL]
    assert seen[0].parent == tmp_path


def test_a_text_is_written_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_text_whole(path, "na\u00efve\n")
    assert path.read_bytes() == "na\u00efve\n".encode()


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

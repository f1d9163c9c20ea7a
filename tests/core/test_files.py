"""Files are whole or absent, whatever stops their writer."""

from pathlib import Path

import pytest

from hf_specdiff.core.files import PARTIAL
from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.files import write_whole


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

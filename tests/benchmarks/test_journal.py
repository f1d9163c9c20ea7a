"""A run's folder is its own."""

from pathlib import Path

import pytest

from hf_specdiff.benchmarks.journal import Journal


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a", {"seed": 1, "x": 2})
    with pytest.raises(ValueError, match="where seed differs"):
        Journal(tmp_path / "a", {"seed": 2, "x": 2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        Journal(tmp_path / "b", {})
    with pytest.raises(ValueError, match="which is a file"):
        Journal(tmp_path / "b" / "thesis.txt", {})

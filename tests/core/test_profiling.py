"""Profiles of a machine."""

from pathlib import Path

from hf_specdiff.core import profiling
from hf_specdiff.core.budget import Profile


def test_profiles_of_a_benchmark_are_its_own(tmp_path: Path) -> None:
    before = profiling.cache_folder()
    profiling._KNOWN["mine"] = Profile([1, 2], [0.1, 0.2], 0.1)
    with profiling.isolated_profiles(tmp_path):
        assert profiling.cache_folder() == tmp_path / "profiles"
        assert "mine" not in profiling._KNOWN
        profiling._KNOWN["other"] = Profile([1, 2], [0.1, 0.2], 0.1)
    assert profiling.cache_folder() == before
    assert profiling._KNOWN.pop("mine")
    assert "other" not in profiling._KNOWN

"""Pictures need no more than there is."""

from pathlib import Path

from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block

from .conftest import CHAIN
from .conftest import prompts


def test_pictures_need_no_samples_and_no_profile(models: Models, tmp_path: Path) -> None:
    block = Block("math", prompts(1), [Method(PLAIN, {}), CHAIN], max_new_tokens=6)
    journal = Journal()
    run_block(models, block, journal)
    paths = plot_all({"rows": rows_of(block, models, journal), "profile": None}, tmp_path)
    assert {path.name for path in paths} == {"ratio.png", "rounds.png", "acceptance.png", "time.png"}

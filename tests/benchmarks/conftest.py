"""The bundled pair with everyone who drafts for it."""

import pytest

import hf_specdiff
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours

CHAIN = ours("features", "chain", draft_shape="chain")


@pytest.fixture(scope="session")
def models() -> Models:
    return standard.bundled_models()


def prompts(count: int, task: str = "math") -> list[str]:
    return [str(record["prompt"]) for record in hf_specdiff.load_prompts(task)[:count]]

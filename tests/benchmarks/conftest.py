"""The bundled pair with everyone who drafts for it."""

import pytest
from transformers import CompileConfig

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


def traced_only() -> CompileConfig:
    """Compile without a compiler: what inductor takes a minute for is traced in a second."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config

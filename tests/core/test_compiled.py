"""Compiled, targets of many architectures write what plain `generate` writes, and nothing is compiled after the second call.

`pytest -m slow tests/core/test_compiled.py` does it with inductor, which takes minutes; the default run traces one of them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import hf_specdiff
from hf_specdiff.core.static_target import StaticTarget
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle
from tests.core.tiny_models import make_config
from tests.core.tiny_models import make_model

TYPES = ["llama", "qwen2", "qwen3", "mistral", "olmo2", "granite", "gpt_neox", "gemma", "qwen3_moe"]
TRACED = ["gpt_neox"]
SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"draft_shape": "chain", "gamma": 6},
    "tree": {"draft_shape": "tree", "tree_budget": 6},  # as wide as the chain: what is compiled serves both
    "batch of 4": {"draft_shape": "chain", "gamma": 6},
}
LENGTHS = {1: (9,), 4: (9, 4, 7, 1)}
GREEDY = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}


def make_target(model_type: str) -> Any:
    """Return a model of one layer, which sees all of the text."""
    full: dict[str, Any] = {"num_hidden_layers": 1, "sliding_window": None}
    if hasattr(make_config(model_type), "layer_types"):
        full["layer_types"] = ["full_attention"]
    return make_model(model_type, **full)


def prompts(num_rows: int, seed: int, most: int = 99) -> dict[str, torch.Tensor]:
    """Return prompts of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, most, (size,), generator=generator) for size in LENGTHS[num_rows]]
    ids = torch.stack([torch.nn.functional.pad(row, (LENGTHS[num_rows][0] - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def settings_of(backend: str) -> dict[str, Any]:
    config = CompileConfig() if backend == "inductor" else CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True  # else the host compiles on GPUs only
    return {"cache_implementation": "static", "compile_config": config}


def check(target: Any, drafter: Any, backend: str, limit: int = 99) -> None:
    """Call every shape (for tracing alone the first two) three times, each with other prompts and other ends."""
    counters.clear()
    graphs, shapes = [], list(SHAPES.items())[: None if backend == "inductor" else 2]
    for seed in range(3):
        for name, shape in shapes:
            inputs = prompts(4 if "batch" in name else 1, seed, limit)
            plain = target.generate(**inputs, **GREEDY)
            ends = {**GREEDY, "eos_token_id": plain[0, -10 + seed].item()}
            plain = target.generate(**inputs, **ends)
            with oracle(plain):
                ours = hf_specdiff.generate(target, **inputs, assistant_model=drafter, **shape, **ends, **settings_of(backend))
            assert torch.equal(ours, plain), (name, seed)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 2  # of both models
    assert graphs[1] == graphs[2], graphs


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The widths of passes; all of them are compiled."""
    torch._dynamo.reset()
    seen: set[int] = set()
    verify = StaticTarget.verify

    def watched(self: StaticTarget, text: Any, draft: Any) -> torch.Tensor:
        assert self.is_compiled
        seen.update(self.widths)
        return verify(self, text, draft)

    monkeypatch.setattr(StaticTarget, "verify", watched)
    yield seen
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        *[(kind, "eager") for kind in TRACED],
        *[pytest.param(kind, "inductor", marks=pytest.mark.slow) for kind in TYPES],
    ],
)
def test_architectures_write_what_plain_generate_writes(model_type: str, backend: str, widths: set[int]) -> None:
    target = make_target(model_type)
    check(target, drafter_for(target, [0]), backend)
    assert widths == {7}  # drafted tokens and their anchor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torch")
def test_the_bundled_pair_writes_what_plain_generate_writes(widths: set[int]) -> None:
    target, drafter, _ = hf_specdiff.load_demo()
    check(target, drafter, "inductor", target.config.vocab_size - 4)
    assert widths == {7}

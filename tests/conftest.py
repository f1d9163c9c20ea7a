"""Tiny models that every test may use; none of them is ever changed."""

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may one leave measured profiles or data sets in the user's cache.
os.environ["HF_SPECDIFF_CACHE"] = tempfile.mkdtemp(prefix="hf_specdiff-tests-")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf_specdiff-tests-")

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import measuring

# Tiny models are all overhead: more threads only get in each other's way.
torch.set_num_threads(1)

VOCAB_SIZE = 31
MASK_TOKEN_ID = 30
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_target(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Return a random Llama whose greedy text does not settle into one token at once."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.6,
        **SPECIAL_IDS,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


def shared_target(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return `make_target`'s model, made once: also what the loop tries of a model is tried once. Not to be changed.

    As with `make_target`, random numbers begin anew.
    """
    target = _target(seed, tuple(sorted(overrides.items())))
    torch.manual_seed(seed)
    return target


@cache
def _target(seed: int, overrides: tuple[tuple[str, Any], ...]) -> LlamaForCausalLM:
    return make_target(seed, **dict(overrides))


_TEXTS: dict[str, torch.Tensor] = {}


def plain_text(target: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Return what plain greedy `generate` of a model that outlives the test writes; each text is written once."""
    name = f"{id(target)} {ids.tolist()} {sorted(settings.items(), key=lambda item: item[0])}"
    if name not in _TEXTS:
        _TEXTS[name] = target.generate(ids, do_sample=False, **settings)
    return _TEXTS[name]


def make_drafter(target_layer_ids: list[int] | None = None, seed: int = 0, **overrides: object) -> SpecDiffDrafter:
    """Return a random drafter for `make_target`'s models, published with a size, so that rounds are whole and read no clock."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "block_size": 6,
        "mask_token_id": MASK_TOKEN_ID,
        "initializer_range": 0.3,
        "target_layer_ids": target_layer_ids,
        **SPECIAL_IDS,
        **overrides,
    }
    drafter = SpecDiffDrafter(SpecDiffConfig(**fields)).eval()
    drafter.generation_config.tree_budget = 32
    return drafter


@pytest.fixture(autouse=True, scope="session")
def short_measuring() -> Iterator[None]:
    """Sizes that follow the machine are measured in a few passes, not in two seconds: no test asks what passes cost here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "MOST_SECONDS", 0.0)
        patch.setattr(measuring, "MOST_STEPS", 4)
        yield


@pytest.fixture(scope="session")
def tiny_target() -> LlamaForCausalLM:
    return shared_target()


@pytest.fixture(scope="session")
def token_drafter() -> SpecDiffDrafter:
    return make_drafter()


@pytest.fixture(scope="session")
def feature_drafter() -> SpecDiffDrafter:
    return make_drafter([0, 2])


@pytest.fixture(params=["tokens", "features"])
def drafter(request: pytest.FixtureRequest) -> SpecDiffDrafter:
    return request.getfixturevalue("token_drafter" if request.param == "tokens" else "feature_drafter")


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 4, 7, 7, 3]])

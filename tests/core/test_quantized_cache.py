"""Caches that round keys and values: greedy text is plain's over the same cache, and so is what the cache holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache
from transformers import cache_utils
from transformers.cache_utils import QuantizedLayer

import hf_specdiff
from hf_specdiff.core.target import Target
from tests.conftest import make_target
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle

NUM_NEW = 40
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": None}
HAS_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")


class RoundedLayer(QuantizedLayer):
    """The host's layer over a rounding of our own: coarse, so that what is rounded when decides what is written."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 2).round()

    def _dequantize(self, qtensor: torch.Tensor) -> torch.Tensor:
        return qtensor / 2


def rounded(residual_length: int) -> Callable[[], Cache]:
    return lambda: Cache(layers=[RoundedLayer(residual_length=residual_length) for _ in range(3)])


def fp8() -> Cache:
    return Cache(layers=[cache_utils.Fp8QuantizedLayer() for _ in range(3)])


CACHES = [
    *[pytest.param(rounded(size), id=f"rounded-{size}") for size in (1, 7, 16, 128)],
    pytest.param(fp8, marks=pytest.mark.skipif(not HAS_FP8, reason="this transformers knows no fp8 cache")),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_target(vocab_size=128, max_position_embeddings=256)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(3, 99, (1, 12), generator=torch.Generator().manual_seed(0))


def ours(model: Any, prompt: torch.Tensor, layer_ids: list[int] | None = None, **settings: Any) -> Any:
    settings = {**GREEDY, "return_dict_in_generate": True, "draft_shape": "chain", **settings}
    return hf_specdiff.generate(model, prompt, assistant_model=drafter_for(model, layer_ids), **settings)


def held(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what each layer would hand to attention beside an empty pass."""
    nothing = [torch.zeros(1, 1, 0, 8)] * 2
    return [layer.update(*nothing) for layer in cache.layers]


@pytest.mark.parametrize("make_cache", CACHES)
@pytest.mark.parametrize("layer_ids", [None, [0, 2]])
def test_greedy_text_and_cache_are_plains(
    make_cache: Callable[[], Cache], layer_ids: list[int] | None, model: Any, prompt: torch.Tensor
) -> None:
    cache, other = make_cache(), make_cache()
    plain = model.generate(prompt, past_key_values=other, **GREEDY)
    with oracle(plain):
        output = ours(model, prompt, layer_ids, past_key_values=cache)
    assert output.sequences.tolist() == plain.tolist()
    assert cache.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(held(cache), held(other), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    accepted = output.speculation.tokens_per_round
    assert accepted == 1 if make_cache is CACHES[0].values[0] else accepted > 1.5


def test_without_a_cut_tokens_would_be_rounded_that_have_to_go(
    model: Any, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    plain = model.generate(prompt, past_key_values=rounded(7)(), **GREEDY)
    monkeypatch.setattr(Target, "cut", lambda self, draft: draft)
    with oracle(plain), pytest.raises(IndexError, match="too many indices"):
        ours(model, prompt, past_key_values=rounded(7)())


@pytest.mark.parametrize("make_cache", CACHES[1:])
def test_turns_of_a_chat_go_on_from_one_cache(make_cache: Callable[[], Cache], model: Any, prompt: torch.Tensor) -> None:
    cache, other, text, plain = make_cache(), make_cache(), prompt, prompt
    for turn in range(3):
        settings = {**GREEDY, "max_new_tokens": 9 + turn}
        plain = model.generate(plain, past_key_values=other, **settings)
        with oracle(plain):
            text = ours(model, text, past_key_values=cache, **settings).sequences
        assert text.tolist() == plain.tolist()
        text = plain = torch.cat([text, prompt[:, :5]], dim=1)


@pytest.mark.skipif(not HAS_FP8, reason="this transformers knows no fp8 cache")
@pytest.mark.parametrize("acceptance", ["match", "ratio", "block"])
def test_the_hosts_own_argument_gives_one(acceptance: str, model: Any, prompt: torch.Tensor) -> None:
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    plain = model.generate(prompt, **GREEDY, **settings)
    with oracle(plain):
        output = ours(model, prompt, acceptance=acceptance, draft_shape="auto", **settings)
    assert output.sequences.tolist() == plain.tolist()
    assert output.speculation.draft_shape == "chain"
    (layer, *_) = output.past_key_values.layers
    assert not any(tensor.is_inference() for tensor in layer._quantized_keys)


def test_a_kind_of_quantized_layer_that_nobody_knows_is_refused(model: Any, prompt: torch.Tensor) -> None:
    class QuantizedSomehow(cache_utils.DynamicLayer):
        pass

    with pytest.raises(ValueError, match=r"tokens can be taken back, got Cache with layers \['QuantizedSomehow'\]"):
        ours(model, prompt, past_key_values=Cache(layers=[QuantizedSomehow() for _ in range(3)]))


def test_trees_over_a_quantized_cache_are_refused(model: Any, prompt: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`draft_shape` must be 'chain' here, got 'tree': the cache is quantized"):
        ours(model, prompt, past_key_values=rounded(16)(), draft_shape="tree")

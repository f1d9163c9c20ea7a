"""What is found out of a language model by trying: whether it is one for drafting, and how it is to be read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM

import hf_specdiff
from hf_specdiff.core.masked_target import additive
from hf_specdiff.diffusion.trials import Reading
from hf_specdiff.diffusion.trials import best_reading
from hf_specdiff.diffusion.trials import text_of
from tests.conftest import make_target

MASK = 31


def make_body(seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.4,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**fields, **overrides})).eval()


class Deaf(Qwen2ForCausalLM):
    """A body with a mask of its own, whatever it is told: causal, or open to all."""

    kind = "causal"

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        size = input_ids.shape[1]
        seen = torch.ones(1, 1, size, size, dtype=torch.bool)
        hidden = ~(seen.tril() if self.kind == "causal" else seen)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("causal", "whose logits ignore them under a mask that shows everything"), ("open", "which sees more")],
)
def test_a_body_that_ignores_later_tokens_or_its_mask_is_refused(kind: str, message: str) -> None:
    body = Deaf(make_body().config).eval()
    body.load_state_dict(make_body().state_dict())
    body.kind = kind
    with pytest.raises(ValueError, match=message):
        hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK)


def test_control_the_same_weights_in_a_body_that_obeys_are_taken() -> None:
    assert hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK).config.max_gamma == 15


class Knowing(nn.Module):
    """A stand-in for a trained body: it knows a text by heart, and recalls it well under the mask it was trained with."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, text: torch.Tensor, trained: Reading) -> None:
        super().__init__()
        self.text, self.trained = text, trained

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        size = input_ids.shape[1]
        seen = (attention_mask[0, 0] == 0).expand(size, size)
        is_own = torch.equal(seen, self.trained.seen(size, seen.device))
        logits = torch.randn(1, size, 32, generator=torch.Generator().manual_seed(int(seen.sum())))
        places = torch.arange(1, size)
        logits[0, places + self.trained.logit_offset, self.text[0, 1:]] += 6 if is_own else 2
        return SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1))


READINGS = [Reading(0), Reading(-1), Reading(0, "block_causal", 4), Reading(-1, "block_causal", 4)]


@pytest.mark.parametrize("trained", READINGS)
def test_the_reading_that_predicts_masked_words_best_is_taken(trained: Reading) -> None:
    text = text_of(make_target(eos_token_id=None))
    assert text.shape == (1, 65)
    assert best_reading(Knowing(text, trained), text, MASK, READINGS) == trained


def trained_body(text: torch.Tensor, reading: Reading) -> Qwen2ForCausalLM:
    """Return a body that has learnt to fill in the gaps of a text `(1, L)`, read in one way."""
    body, generator = make_body(hidden_size=32, initializer_range=0.1).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(body.parameters(), lr=1e-2)
    mask = additive(reading.seen(text.shape[1], text.device)[None], torch.float32)
    for _ in range(50):
        is_hidden = (torch.rand(4, text.shape[1], generator=generator) < 0.15) & (torch.arange(text.shape[1]) > 0)
        ids = text.expand(4, -1).masked_fill(is_hidden, MASK)
        rows, places = is_hidden.nonzero(as_tuple=True)
        logits = body(input_ids=ids, attention_mask=mask, use_cache=False).logits[rows, places + reading.logit_offset]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, text[0, places]).backward()
        optimizer.step()
    return body.eval()


@pytest.mark.parametrize("trained", READINGS[:3], ids=["own rows", "shifted", "blocks"])
def test_weights_that_were_really_trained_in_one_way_are_read_in_it(trained: Reading) -> None:
    text = text_of(make_target(eos_token_id=None))
    assert best_reading(trained_body(text, trained), text, MASK, READINGS) == trained


def test_a_text_of_unknown_words_tells_nothing() -> None:
    with pytest.raises(ValueError, match="a target's text without words that the language model knows"):
        best_reading(make_body(), torch.tensor([[3]]), MASK, READINGS)


def test_weights_that_do_better_without_later_words_are_a_causal_models() -> None:
    text = text_of(make_target(eos_token_id=None))
    with pytest.raises(ValueError, match="Is it a causal language model"):
        best_reading(Knowing(text, Reading(-1, "causal")), text, MASK, READINGS)


def test_readings_that_tell_nothing_are_not_chosen_among() -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        best_reading(make_body(initializer_range=0.01), text_of(make_target(eos_token_id=None)), MASK, READINGS)


def test_the_targets_text_leaves_the_generators_alone() -> None:
    target, before = make_target(), torch.random.get_rng_state()
    text_of(target)
    assert torch.equal(torch.random.get_rng_state(), before)

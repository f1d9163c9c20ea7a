"""Batches of models that read one text at a time: each row is what plain decoding writes in the batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers import StoppingCriteria

import hf_specdiff
from hf_specdiff.core.rowwise_target import why_not_divided
from hf_specdiff.core.trial import why_not_masked
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle
from tests.core.tiny_models import make_model

NUM_NEW = 20
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "eos_token_id": -1}
# Delta rule, all state, convolutions, and order told by slopes.
TYPES = ["qwen3_5", "mamba2", "lfm2", "bloom"]
_MODELS: dict[str, Any] = {}


def model_of(model_type: str) -> Any:
    if model_type not in _MODELS:
        _MODELS[model_type] = make_model(model_type)
    return _MODELS[model_type]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three prompts of different lengths, padded on the left, and their mask."""
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor([[0], [7], [3]])).long()
    return ids * mask, mask


def ours(model: Any, layer_ids: list[int] | None = None, **settings: Any) -> Any:
    ids, mask = prompts()
    settings = {"attention_mask": mask, "return_dict_in_generate": True, **GREEDY, **settings}
    return hf_specdiff.generate(model, ids, assistant_model=drafter_for(model, layer_ids), **settings)


def plainly(model: Any, **settings: Any) -> Any:
    ids, mask = prompts()
    return model.generate(ids, attention_mask=mask, **{**GREEDY, "return_dict_in_generate": True, **settings})


def an_end(texts: torch.Tensor) -> int:
    """Return a token that ends the first row early, and nothing that stands in all of them."""
    first, *others = texts[:, 12:].tolist()
    return next(token for token in first[3:12] if not any(token in other for other in others))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("layer_ids", [None, [0, 1]])
def test_rows_are_plains_and_may_end_apart(model_type: str, layer_ids: list[int] | None) -> None:
    model = model_of(model_type)
    assert why_not_masked(model, torch.device("cpu"), has_padding=True) is not None
    plain = plainly(model).sequences
    with oracle(plain):
        output = ours(model, layer_ids)
        assert output.sequences.tolist() == plain.tolist()
        assert output.speculation.tokens_per_round > 1.5
        end = {"eos_token_id": an_end(plain)}
        assert ours(model, layer_ids, **end).sequences.tolist() == plainly(model, **end).sequences.tolist()
    wrong = ours(model, layer_ids, max_new_tokens=8)  # drafts of a random drafter
    assert wrong.sequences.tolist() == plain[:, : 12 + 8].tolist()


class EndsWith(StoppingCriteria):
    """Ends a row behind a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("model_type", ["qwen3_5", "bloom"])
def test_scores_logits_and_states_are_plains_also_where_a_row_has_ended(model_type: str) -> None:
    model = model_of(model_type)
    names = ("scores", "logits", "hidden_states")
    settings: dict[str, Any] = {f"output_{name}": True for name in names}
    texts = plainly(model).sequences
    settings |= {"stopping_criteria": [EndsWith(an_end(texts))], "repetition_penalty": 1.05}
    plain = plainly(model, **settings)
    with oracle(texts):
        output = ours(model, [0, 1], **settings)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert (output.sequences[0, -4:] == 0).all()
    assert output.past_key_values is None
    for name in names:
        mine, other = getattr(output, name), getattr(plain, name)
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            for x, y in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
                assert x.shape == y.shape
                assert torch.allclose(x, y, atol=5e-3), name


@pytest.mark.parametrize("rule", ["match", "ratio", "block"])
def test_sampled_rows_come_in_the_hosts_shape(rule: str) -> None:
    model = model_of("qwen3_5")
    output = ours(model, do_sample=True, acceptance=rule, num_return_sequences=2, max_new_tokens=7)
    assert output.sequences.shape == (6, 19)
    assert output.speculation.draft_shape == "chain"


def test_a_cache_of_all_rows_is_refused() -> None:
    model = model_of("qwen3_5")
    with pytest.raises(ValueError, match=r"one sequence.*running state.*`past_key_values` that were passed hold all rows"):
        ours(model, past_key_values=DynamicCache(config=model.config.get_text_config()))


def test_inputs_that_nobody_can_divide_are_named() -> None:
    config = SimpleNamespace()
    assert why_not_divided(config, {"attention_mask": torch.ones(2, 3), "use_cache": True}, None) is None
    assert "`pixel_values` cannot be divided" in str(why_not_divided(config, {"pixel_values": torch.ones(5, 3)}, None))
    assert "`pictures` cannot be divided" in str(why_not_divided(config, {"pictures": object()}, None))
    assert "equal ones" in str(why_not_divided(SimpleNamespace(keep_window_size=16), {}, None))

"""Nothing that leaves `generate` is tied to the mode that the loop runs in, and nobody else's code runs in it."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers import LogitsProcessor
from transformers import LogitsProcessorList
from transformers import RepetitionPenaltyLogitsProcessor
from transformers import StoppingCriteria
from transformers import StoppingCriteriaList

import hf_specdiff
from hf_specdiff.inference import inference

from .conftest import make_drafter
from .conftest import make_target

EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, DynamicCache):
        return [tensor for layer in value.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    if isinstance(value, dict | tuple | list):
        return [tensor for each in (value.values() if isinstance(value, dict) else value) for tensor in tensors_of(each)]
    return []


class Watcher:
    """Notes in which mode it is called, and takes a gradient as guidance by a classifier would."""

    def __init__(self) -> None:
        self.modes: set[bool] = set()

    def watch(self) -> None:
        self.modes.add(torch.is_inference_mode_enabled())
        with torch.enable_grad():
            free = torch.ones(3, requires_grad=True)
            (free * torch.ones(3)).sum().backward()


class WatchingProcessor(Watcher, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.watch()
        return scores


class WatchingCriterion(Watcher, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.watch()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class WatchingStreamer(Watcher):
    def put(self, value: torch.Tensor) -> None:
        self.watch()

    def end(self) -> None:
        self.watch()


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("rows", [1, 2])
def test_everything_returned_can_be_part_of_a_graph(shape: str, rows: int, prompt: torch.Tensor) -> None:
    target, drafter = make_target(), make_drafter([0, 2])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "draft_shape": shape, **EVERYTHING}
    output = hf_specdiff.generate(target, prompt.repeat(rows, 1), assistant_model=drafter, **settings)
    found = tensors_of(dict(output))
    assert len(found) > 20
    assert not any(tensor.is_inference() for tensor in found)
    weight = torch.nn.Embedding(31, 4)
    weight(output.sequences).sum().backward()  # saves the ids for the backward pass
    assert weight.weight.grad is not None


def test_a_cache_that_was_passed_in_stays_an_ordinary_one(prompt: torch.Tensor) -> None:
    target, cache = make_target(), DynamicCache()
    ids = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), past_key_values=cache, max_new_tokens=9)
    assert isinstance(ids, torch.Tensor)
    assert not ids.is_inference()
    assert not any(tensor.is_inference() for tensor in tensors_of(cache))
    target(ids[:, -1:], past_key_values=cache).logits.sum().backward()


def test_the_loop_itself_runs_in_inference_mode(prompt: torch.Tensor) -> None:
    """Control: what the other tests look for in vain is there."""
    target, modes = make_target(), set()
    target.lm_head.register_forward_hook(lambda *arguments: modes.add(torch.is_inference_mode_enabled()))
    hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=9, draft_shape="chain")
    assert True in modes


@pytest.mark.parametrize(
    ("kind", "wrap", "watcher"),
    [
        ("logits_processor", LogitsProcessorList, WatchingProcessor),
        ("stopping_criteria", StoppingCriteriaList, WatchingCriterion),
        ("streamer", lambda watchers: watchers[0], WatchingStreamer),
    ],
)
def test_the_code_of_others_runs_in_the_callers_mode(kind: str, wrap: Any, watcher: Any, prompt: torch.Tensor) -> None:
    watching = watcher()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "draft_shape": "chain", kind: wrap([watching])}
    hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), **settings)
    assert watching.modes == {False}


def test_a_caller_in_inference_mode_stays_in_it(prompt: torch.Tensor) -> None:
    with torch.inference_mode():
        ids = hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), max_new_tokens=9, do_sample=False)
    assert torch.equal(ids, make_target().generate(prompt, max_new_tokens=9, do_sample=False))


def test_gradients_stay_off_where_the_mode_is_not_taken(prompt: torch.Tensor) -> None:
    target, seen = make_target(), set()
    target.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.requires_grad))
    settings: dict[str, Any] = {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([WatchingCriterion()])}
    hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), **settings)
    assert seen == {False}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile loads parts of torch that others deprecate
def test_models_that_are_compiled_or_not_in_memory_are_left_alone() -> None:
    def mode_of(model: torch.nn.Module, *callbacks: Any) -> bool:
        with inference([model], callbacks):
            return torch.is_inference_mode_enabled()

    target = make_target()
    assert mode_of(target, None, RepetitionPenaltyLogitsProcessor(1.2))
    assert not mode_of(target, WatchingProcessor())
    offloaded = make_target()
    offloaded.lm_head.to("meta")
    assert not mode_of(offloaded)
    assert not mode_of(torch.compile(target))
    target.compile()
    assert not mode_of(target)

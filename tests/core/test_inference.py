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
from hf_specdiff.core.inference import inference
from hf_specdiff.core.target import Target
from hf_specdiff.core.trial import why_not_chained
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import shared_target

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
    target, drafter = shared_target(), make_drafter([0, 2])
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


def test_the_loop_itself_runs_in_inference_mode(prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what the other tests look for in vain is there."""
    modes: set[bool] = set()
    verify = Target.verify

    def watch(self: Target, *arguments: Any) -> torch.Tensor:
        modes.add(torch.is_inference_mode_enabled())
        return verify(self, *arguments)

    target = make_target()
    assert why_not_chained(target, prompt.device) is None  # once for each model, and not in inference mode
    monkeypatch.setattr(Target, "verify", watch)
    hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=9, draft_shape="chain")
    assert modes == {True}


def test_what_a_hook_keeps_can_be_part_of_a_graph(prompt: torch.Tensor) -> None:
    target, seen = make_target(), []
    target.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    ids = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=9, do_sample=False)
    torch.nn.Linear(16, 1)(seen[-1]).sum().backward()
    assert torch.equal(ids, shared_target().generate(prompt, max_new_tokens=9, do_sample=False))


def test_a_users_function_inside_a_host_processor_runs_in_the_callers_mode(prompt: torch.Tensor) -> None:
    modes: set[bool] = set()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        modes.add(torch.is_inference_mode_enabled())
        return list(range(3, 20))

    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    hf_specdiff.generate(shared_target(), prompt, assistant_model=make_drafter(), **settings)
    assert modes == {False}


def test_a_cache_is_ordinary_after_an_interrupt(prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, verify, calls = DynamicCache(), Target.verify, []

    def interrupt(self: Target, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return verify(self, *arguments)

    monkeypatch.setattr(Target, "verify", interrupt)
    settings: dict[str, Any] = {"max_new_tokens": 20, "draft_shape": "chain", "past_key_values": cache}
    with pytest.raises(KeyboardInterrupt):
        hf_specdiff.generate(shared_target(), prompt, assistant_model=make_drafter(), **settings)
    assert tensors_of(cache)
    assert not any(tensor.is_inference() for tensor in tensors_of(cache))


def test_frequencies_that_a_model_keeps_are_ordinary(prompt: torch.Tensor) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    target = make_target(max_position_embeddings=64, rope_parameters=rope)
    short = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=20, do_sample=False)
    assert torch.equal(short, target.generate(prompt, max_new_tokens=20, do_sample=False))
    with pytest.raises(ValueError, match="rotary frequencies change"):
        hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=60, do_sample=False)
    assert not any(buffer.is_inference() for buffer in target.buffers())
    with inference([target], []):
        target.model.rotary_emb.inv_freq = target.model.rotary_emb.inv_freq * 1
        assert target.model.rotary_emb.inv_freq.is_inference()
    assert not any(buffer.is_inference() for buffer in target.buffers())


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
    hf_specdiff.generate(shared_target(), prompt, assistant_model=make_drafter(), **settings)
    assert watching.modes == {False}


def test_a_caller_in_inference_mode_stays_in_it(prompt: torch.Tensor) -> None:
    with torch.inference_mode():
        ids = hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), max_new_tokens=9, do_sample=False)
    assert torch.equal(ids, shared_target().generate(prompt, max_new_tokens=9, do_sample=False))


def test_gradients_stay_off_where_the_mode_is_not_taken(prompt: torch.Tensor) -> None:
    target, seen = make_target(), set()
    target.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.requires_grad))
    hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=9)
    assert seen == {False}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile loads parts of torch that others deprecate
def test_models_that_are_compiled_or_not_in_memory_are_left_alone() -> None:
    def mode_of(model: torch.nn.Module, *callbacks: Any) -> bool:
        with inference([model], list(callbacks)):
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

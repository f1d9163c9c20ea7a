"""`attach` changes one object's `generate`, for our drafters only, until `detach`."""

import pytest
import torch

import hf_specdiff
from hf_specdiff import SpecDiffDrafter

from .conftest import make_target

SETTINGS = {"do_sample": False, "max_new_tokens": 15}


def test_attached_generate_runs_the_full_loop(drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = make_target()
    expected = target.generate(prompt, **SETTINGS)
    assert hf_specdiff.attach(target) is target
    result = target.generate(prompt, assistant_model=drafter, return_dict_in_generate=True, **SETTINGS)
    assert torch.equal(result.sequences, expected)
    assert result.speculation.num_rounds > 0
    # Positional and named arguments mean what they mean in the host's `generate`.
    config = target.generation_config.__class__(**SETTINGS, eos_token_id=2, pad_token_id=0)
    assert torch.equal(target.generate(prompt, config, assistant_model=drafter), expected)
    assert torch.equal(target.generate(input_ids=prompt, gamma=2, assistant_model=drafter, **SETTINGS), expected)


def test_attached_generate_leaves_other_calls_alone(drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = hf_specdiff.attach(hf_specdiff.attach(make_target()))
    plain = target.generate(prompt, return_dict_in_generate=True, **SETTINGS)
    assert not hasattr(plain, "speculation")
    assert torch.equal(target.generate(prompt, assistant_model=make_target(1), **SETTINGS), plain.sequences)
    if drafter.config.is_feature_conditioned:
        native = target.generate(prompt, assistant_model=drafter, speculation_type="dflash", **SETTINGS)
        assert torch.equal(native, plain.sequences)
    assert "generate" not in vars(hf_specdiff.detach(target))
    assert not hasattr(target.generate(prompt, return_dict_in_generate=True, **SETTINGS), "speculation")
    assert hf_specdiff.detach(target) is target


def test_a_generate_of_the_objects_own_is_given_back(drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = make_target()
    own = target.generate = lambda *args, **kwargs: "own"
    hf_specdiff.detach(target)
    assert target.generate is own
    hf_specdiff.attach(target)
    assert target.generate(prompt) == "own"
    assert torch.is_tensor(target.generate(prompt, assistant_model=drafter, **SETTINGS))
    assert hf_specdiff.detach(target).generate is own


def test_attach_refuses_what_cannot_generate() -> None:
    with pytest.raises(TypeError, match="can generate"):
        hf_specdiff.attach(torch.nn.Linear(2, 2))

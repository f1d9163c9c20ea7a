"""Criteria are asked as plain decoding asks them, and what they answer is understood alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers import StoppingCriteria
from transformers import StoppingCriteriaList

import hf_specdiff
from hf_specdiff import SpecDiffDrafter


@pytest.mark.parametrize("answer", [bool, torch.tensor, lambda is_done: torch.tensor([is_done]), int])
def test_a_criterion_may_answer_in_every_form_that_the_host_takes(
    answer: Callable[[bool], Any], tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    class Ends(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            return answer(input_ids.shape[-1] >= 20)

    settings = {"do_sample": False, "max_length": 24, "eos_token_id": -1, "stopping_criteria": StoppingCriteriaList([Ends()])}
    plain = tiny_target.generate(prompt, **settings)
    assert plain.shape[1] == 20
    assert torch.equal(hf_specdiff.generate(tiny_target, prompt, assistant_model=drafter, **settings), plain)

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


class EndsBehind(StoppingCriteria):
    """Ends every row behind token 14, each at its own time."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == 14


def test_rows_that_write_on_after_their_end_are_refused(tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter) -> None:
    """Without an end token the host does not pad; with one that never comes it does, and so do we."""
    ends_apart = 0
    for seed in range(6):
        torch.manual_seed(seed)
        ids = torch.randint(3, 26, (3, 6))
        settings = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 0, "stopping_criteria": [EndsBehind()]}
        with pytest.raises(ValueError, match="`eos_token_id` must be given"):
            hf_specdiff.generate(tiny_target, ids, assistant_model=drafter, eos_token_id=None, **settings)
        plain = tiny_target.generate(ids, eos_token_id=-1, **settings)
        ends_apart += len({row.index(14) if 14 in row else -1 for row in plain[:, 6:].tolist()}) > 1
        assert torch.equal(hf_specdiff.generate(tiny_target, ids, assistant_model=drafter, eos_token_id=-1, **settings), plain)
        one = tiny_target.generate(ids[:1], eos_token_id=None, **settings)
        assert torch.equal(
            hf_specdiff.generate(tiny_target, ids[:1], assistant_model=drafter, eos_token_id=None, **settings), one
        )
    assert ends_apart

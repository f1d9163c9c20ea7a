"""Where greedy texts part: at a place where the target is undecided, or not."""

import pytest
import torch

from hf_specdiff.benchmarks.near_ties import count_near_ties
from hf_specdiff.benchmarks.near_ties import gap_between
from hf_specdiff.benchmarks.near_ties import rounding_at
from tests.conftest import make_target


def test_a_text_that_parts_at_a_tie_is_told_from_one_that_does_not() -> None:
    model = make_target(tie_word_embeddings=False)
    ids = torch.tensor([[0, 3, 11, 5]])  # padded in front
    mask = (ids != 0).long()
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, **settings)
    assert count_near_ties(model, mask, plain, plain) == 0
    token, place = int(plain[0, 6]), plain[0].tolist().index(int(plain[0, 6]), 4)
    twin = next(other for other in range(3, 29) if other not in plain[0])
    parted = plain.clone()
    parted[0, place] = twin
    assert count_near_ties(model, mask, parted, plain) == 0
    with torch.no_grad():  # now the two are equally good wherever they stand
        model.lm_head.weight[twin] = model.lm_head.weight[token]
    assert count_near_ties(model, mask, parted, plain) == 1
    assert count_near_ties(model, mask.repeat(2, 1), parted.repeat(2, 1), torch.cat([plain, parted])) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_data_type(dtype: torch.dtype) -> None:
    model = make_target(seed=1).to(dtype)
    ids = torch.tensor([[3, 11, 5, 9, 4, 20, 8, 7, 6, 2, 13]])
    rounding = rounding_at(model, ids)
    largest = float(model(ids).logits[0, -1].abs().max())
    eps = torch.finfo(dtype).eps
    assert 2 * eps * largest <= rounding < 200 * eps * largest
    tokens = model(ids).logits[0, -1].float().topk(2).indices.tolist()
    assert gap_between(model, ids, [tokens[0], tokens[0]]) == 0
    assert gap_between(model, ids, tokens) > 0

"""The mask is an id that the target never writes, found without being named."""

from typing import Any

import pytest

import hf_specdiff
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.mask_token import check_mask_token
from hf_specdiff.training.mask_token import find_mask_token


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    target, _, tokenizer = hf_specdiff.load_demo()
    return target, tokenizer


def text_of(*ids: int) -> Sequences:
    return Sequences.from_lists([[5, 6, *ids]], [1])


def test_the_tokenizers_mask_comes_first_unless_the_target_writes_it(pair: tuple[Any, Any]) -> None:
    target, tokenizer = pair
    assert find_mask_token(target, tokenizer, text_of(7)) == tokenizer.mask_token_id
    with pytest.raises(ValueError, match="got none: each special token stands in its text"):
        find_mask_token(target, tokenizer, text_of(tokenizer.mask_token_id))


def test_without_one_a_reserved_token_serves_and_none_that_is_written_or_ends_text() -> None:
    target, _, tokenizer = hf_specdiff.load_demo()
    tokenizer.mask_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<file>", "<reserved_1>", "<reserved_2>"]})
    plain, first, second = tokenizer.convert_tokens_to_ids(["<file>", "<reserved_1>", "<reserved_2>"])
    target.resize_token_embeddings(len(tokenizer) + 2)
    padding = {len(tokenizer), len(tokenizer) + 1}
    old = {index for index in tokenizer.added_tokens_decoder if index < plain}
    found: list[int] = []
    for _ in range(5 + len(old - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id})):
        found.append(find_mask_token(target, tokenizer, text_of(*found)))
    with pytest.raises(ValueError, match="`mask_token_id` must be an id that the target never writes, got none"):
        find_mask_token(target, tokenizer, text_of(*found))
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} & set(found)
    named = [index for index in found if index in (first, second)]
    assert named == [first, second]
    assert set(found) - old == {first, second, plain} | padding
    assert found.index(second) < min(map(found.index, padding)) < found.index(plain)


def test_a_mask_that_the_target_writes_is_refused(pair: tuple[Any, Any]) -> None:
    target, _ = pair
    check_mask_token(3, target, text_of(7))
    with pytest.raises(ValueError, match="`mask_token_id` must not end the target's text, got 2"):
        check_mask_token(2, target, text_of(7))
    with pytest.raises(ValueError, match=r"must be an id that the target never writes, got 7, which stands in its text"):
        check_mask_token(7, target, text_of(7))

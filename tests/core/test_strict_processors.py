"""Processors that fail on texts which plain `generate` never shows them: a draft may leave those, the call may not fail."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import hf_specdiff
from tests.conftest import make_drafter
from tests.conftest import shared_target

PROMPT = [1, 5, 9, 4]
WORDS = [[7, 8, 9, 10, 11, 2], [7, 8, 12, 13, 2], [14, 15, 16, 2], [7, 9, 9, 2], [20, 21, 22, 23, 24, 25, 2]]
SHAPES = ("chain", "tree", "samples")


def off_the_trie(raises: bool) -> Any:
    """Return the usual `prefix_allowed_tokens_fn` of a trie, which knows its own texts alone."""

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        text = ids.tolist()[len(PROMPT) :]
        tokens = sorted({word[len(text)] for word in WORDS if word[: len(text)] == text and len(word) > len(text)})
        if raises and not tokens:
            raise KeyError(f"{text} is not in the trie")
        return tokens

    return allowed


class Done(LogitsProcessor):
    """Forbids everything once the text has ended."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        has_ended = (input_ids[:, len(PROMPT) :] == 2).any(dim=1)
        scores[has_ended] = -torch.inf
        scores[~has_ended, 2] += 4
        return scores


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_trie_of_allowed_tokens_writes_its_words(layers: list[int] | None, shape: str, raises: bool) -> None:
    target, drafter = shared_target(), make_drafter(layers)
    settings = {"max_new_tokens": 10, "prefix_allowed_tokens_fn": off_the_trie(raises)}
    ids = torch.tensor([PROMPT])
    plain = target.generate(ids, do_sample=False, **settings)
    assert torch.equal(
        hf_specdiff.generate(target, ids, assistant_model=drafter, draft_shape=shape, do_sample=False, **settings), plain
    )
    for seed in range(4):
        torch.manual_seed(seed)
        text = hf_specdiff.generate(target, ids, assistant_model=drafter, draft_shape=shape, do_sample=True, **settings)
        assert text[0, len(PROMPT) :].tolist() in WORDS


@pytest.mark.parametrize("raises", [True, False])
def test_a_trie_in_the_hosts_loop_is_followed_or_refused(raises: bool) -> None:
    target, drafter = shared_target(), make_drafter()
    settings = {"max_new_tokens": 10, "prefix_allowed_tokens_fn": off_the_trie(raises)}
    ids = torch.tensor([PROMPT])
    plain = target.generate(ids, do_sample=False, **settings)
    assert torch.equal(target.generate(ids, assistant_model=drafter, do_sample=False, **settings), plain)
    refusals = []
    for seed in range(6):
        torch.manual_seed(seed)
        try:
            text = target.generate(ids, assistant_model=drafter, do_sample=True, **settings)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert text[0, len(PROMPT) :].tolist() in WORDS
    assert refusals
    assert all(words.startswith("`logits_processor` must take drafted texts") for words in refusals)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_processor_that_forbids_all_behind_the_end_is_asked_in_vain(layers: list[int] | None, shape: str) -> None:
    target, drafter = shared_target(), make_drafter(layers)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    settings = {"max_new_tokens": 12, "logits_processor": [Done()]}
    plain = target.generate(ids, do_sample=False, **settings)
    assert torch.equal(
        hf_specdiff.generate(target, ids, assistant_model=drafter, draft_shape=shape, do_sample=False, **settings), plain
    )
    for seed in range(4):
        torch.manual_seed(seed)
        hf_specdiff.generate(target, ids, assistant_model=drafter, draft_shape=shape, do_sample=True, **settings)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_fails_on_committed_text_fails_as_in_plain_generate(shape: str, prompt: torch.Tensor) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > prompt.shape[1] + 3:
                raise RuntimeError("four tokens are too many")
            return scores

    target, settings = shared_target(), {"do_sample": False, "max_new_tokens": 3, "logits_processor": [Broken()]}
    ours = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), draft_shape=shape, **settings)
    assert torch.equal(ours, target.generate(prompt, **settings))
    for call in (
        target.generate,
        lambda ids, **kwargs: hf_specdiff.generate(target, ids, assistant_model=make_drafter(), **kwargs),
    ):
        with pytest.raises(RuntimeError, match="four tokens"):
            call(prompt, **{**settings, "max_new_tokens": 9, "eos_token_id": None})


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_drafter_that_gives_no_numbers_is_refused(
    do_sample: bool, shape: str, layers: list[int] | None, prompt: torch.Tensor
) -> None:
    drafter = make_drafter(layers)
    with torch.no_grad():
        drafter.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="`assistant_model` must give numbers"):
        hf_specdiff.generate(
            shared_target(), prompt, assistant_model=drafter, do_sample=do_sample, max_new_tokens=9, draft_shape=shape
        )

"""A reduced draft vocabulary: drafts are of its tokens, texts are the target's, in law and token for token."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import LogitsProcessorList

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.conditioning import lent_head
from hf_specdiff.core.conditioning import make_drafter as put_around
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.features import Features
from hf_specdiff.core.rules import make_rule
from hf_specdiff.core.sampling import Scores
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import shared_target
from tests.core.test_lossless import all_runs

KEPT = [0, 2, 5, 7, 9, 14, 20, 28]
EXACT = 1e-12


def reduced(kept: list[int], **overrides: Any) -> SpecDiffDrafter:
    """Return a feature-conditioned drafter that writes some tokens only, by the target's head."""
    drafter = make_drafter([0, 2], draft_vocab_size=len(kept), **overrides)
    drafter.d2t.copy_(torch.tensor(kept) - torch.arange(len(kept)))
    return drafter


def whole(drafter: SpecDiffDrafter) -> SpecDiffDrafter:
    """Return the same network with every token to draft."""
    other = make_drafter([0, 2])
    other.load_state_dict({name: weight for name, weight in drafter.state_dict().items() if name != "d2t"})
    return other


@pytest.fixture(scope="module")
def pair() -> tuple[Any, SpecDiffDrafter]:
    return shared_target(), reduced(KEPT)


def test_logits_are_the_whole_heads_at_the_tokens_that_are_drafted(pair: tuple[Any, SpecDiffDrafter]) -> None:
    target, drafter = pair
    states = torch.randn(2, 3, 16)
    logits = drafter.window_logits(states, lent_head(target, drafter.drafted_ids))
    everything = whole(drafter).window_logits(states, lent_head(target, None))
    torch.testing.assert_close(logits[..., KEPT], everything[..., KEPT])
    others = [token for token in range(31) if token not in KEPT]
    assert torch.equal(torch.softmax(logits, -1)[..., others], torch.zeros(2, 3, len(others)))


def test_a_head_with_a_bias_and_one_without_rows_are_lent_too() -> None:
    """What is no plain matrix, a quantized head for one, is computed whole."""
    target, ids, states = make_target(), torch.tensor(KEPT), torch.randn(4, 16)
    head = torch.nn.Linear(16, 31)
    plain = head(states)[:, KEPT]
    for kind in (head, type("Other", (torch.nn.Linear,), {})(16, 31)):
        kind.load_state_dict(head.state_dict())
        target.set_output_embeddings(kind)
        torch.testing.assert_close(lent_head(target, ids)(states), plain)


@pytest.mark.parametrize(
    "scheme",
    [{"draft_shape": "chain"}, {"draft_shape": "tree", "tree_budget": 12}, {"draft_shape": "samples", "num_drafts": 3}],
    ids=lambda scheme: scheme["draft_shape"],
)
@pytest.mark.parametrize("has_head", [False, True], ids=["marginals", "order 1"])
def test_greedy_text_is_the_targets(scheme: dict, has_head: bool) -> None:
    target, drafter = shared_target(), reduced(KEPT, markov_rank=4 if has_head else 0)
    ids = torch.tensor([[1, 5, 9, 4, 7, 7, 3], [0, 0, 1, 6, 8, 2, 11]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    for inputs, attention_mask in ((ids[:1], mask[:1]), (ids, mask)):
        settings = {"attention_mask": attention_mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
        plain = target.generate(inputs, **settings)
        ours = hf_specdiff.generate(target, inputs, assistant_model=drafter, **settings, **scheme)
        assert torch.equal(ours, plain)
    assert set(plain[:, 7:].flatten().tolist()) - set(KEPT)  # the target writes more than can be drafted


@pytest.mark.parametrize("acceptance", ["ratio", "block", "match"])
def test_drawn_text_has_the_targets_law(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert total_variation(acceptance, monkeypatch, told="own") < EXACT


@pytest.mark.parametrize("acceptance", ["ratio", "block"])
def test_control_the_whole_vocabularys_law_in_place_of_the_drafts_is_seen(
    acceptance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert total_variation(acceptance, monkeypatch, told="whole") > 1e-3


def total_variation(acceptance: str, monkeypatch: pytest.MonkeyPatch, *, told: str) -> float:
    """Return how far the law of a round's tokens is from the target's, by all runs of a real pair in float64."""
    monkeypatch.setattr("hf_specdiff.core.drafters.to_float", lambda logits: logits.double())
    monkeypatch.setattr("hf_specdiff.core.sampling.to_float", lambda logits: logits.double())
    size, gamma, kept, layers = 5, 2, [0, 2], [0, 2]
    prompt = torch.tensor([[1, 2]])
    target = make_target(vocab_size=size).double()
    network = reduced(kept, vocab_size=size, mask_token_id=4, block_size=gamma + 1).double()
    with torch.no_grad():
        states = target(prompt[:, :-1], output_hidden_states=True).hidden_states
    features = Features(torch.cat([states[layer + 1] for layer in layers], dim=-1), [prompt.shape[1] - 1])

    def law(path: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return target(torch.cat([prompt, torch.tensor([path]).long()], dim=1)).logits[0, -1]

    laws = {path: law(path) for length in range(gamma + 1) for path in product(range(size), repeat=length)}
    other = put_around(whole_of(network, size, gamma), target, SpeculationConfig(gamma), LogitsProcessorList())
    marginals = other.draft(Text.of_prompt(prompt), features).probs

    def call() -> torch.Tensor:
        drafter = put_around(network, target, SpeculationConfig(gamma, acceptance=acceptance), LogitsProcessorList())
        draft = drafter.draft(Text.of_prompt(prompt), features)
        assert set(draft.tokens.flatten().tolist()) <= set(kept)
        if told == "whole":
            draft = Draft(draft.tokens, marginals, has_prefix_law=True)
        tokens = draft.tokens[0].tolist()
        scores = torch.stack([laws[tuple(tokens[:i])] for i in range(gamma + 1)])[None]
        accepted = make_rule(acceptance, do_sample=True)(
            draft, Scores(LogitsProcessorList(), Text.of_prompt(prompt), draft.tokens, scores)
        )
        return torch.tensor(accepted.tokens)

    found: Counter = Counter()
    for written, probability in all_runs(call, monkeypatch):
        for rest in product(range(size), repeat=gamma + 1 - len(written)):
            text, weight = tuple(written), probability
            for token in rest:
                weight *= float(torch.softmax(laws[text], 0)[token])
                text = (*text, token)
            found[text] += weight
    distance = 0.0
    for text in product(range(size), repeat=gamma + 1):
        p = 1.0
        for i, token in enumerate(text):
            p *= float(torch.softmax(laws[text[:i]], 0)[token])
        distance += abs(p - found[text]) / 2
    return distance


def whole_of(network: SpecDiffDrafter, size: int, gamma: int) -> SpecDiffDrafter:
    other = make_drafter([0, 2], vocab_size=size, mask_token_id=4, block_size=gamma + 1).double()
    other.load_state_dict({name: weight for name, weight in network.state_dict().items() if name != "d2t"})
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_drafter_drafts_the_same_tokens(dtype: torch.dtype, tmp_path: Path) -> None:
    target, drafter = shared_target(), reduced(KEPT).to(dtype)
    drafter.save_pretrained(tmp_path)
    back = SpecDiffDrafter.from_pretrained(tmp_path, dtype=dtype)
    assert back.d2t.dtype == torch.int64
    assert back.drafted_ids is not None
    assert back.drafted_ids.tolist() == KEPT
    assert back.norm.weight.dtype == dtype
    settings = {"max_new_tokens": 12, "do_sample": False, "draft_shape": "chain", "gamma": 5, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 5, 9]])
    ours, theirs = (hf_specdiff.generate(target, ids, assistant_model=each, **settings) for each in (back, drafter))
    assert ours.speculation.num_accepted == theirs.speculation.num_accepted


def test_a_table_that_leaves_the_vocabulary_or_names_a_token_twice_is_refused(tmp_path: Path) -> None:
    reduced(KEPT).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for wrong in (tensors["d2t"] + 3, tensors["d2t"] * 0 - torch.arange(len(KEPT))):
        save_file(tensors | {"d2t": wrong}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="`d2t`"):
            SpecDiffDrafter.from_pretrained(tmp_path)


def test_it_is_refused_of_tokens_alone_and_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="`draft_vocab_size` must be left out for a token-conditioned"):
        make_drafter(draft_vocab_size=8)
    with pytest.raises(ValueError, match="`draft_vocab_size` must be at most `vocab_size` 31"):
        make_drafter([0, 2], draft_vocab_size=32)

"""A confidence head says how much is drafted: never by what was drawn, and more of what is accepted for the same budget."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import hf_specdiff
from hf_specdiff import Profile
from hf_specdiff.core.conditional import conditional_tree
from hf_specdiff.core.conditional import likeliest_chains
from hf_specdiff.core.draft import Conditionals
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.sampling import draw
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.tree import TreeShape
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.core.test_conditional import EXACT
from tests.core.test_conditional import G
from tests.core.test_conditional import V
from tests.core.test_conditional import conditionals
from tests.core.test_conditional import drafter_logits
from tests.core.test_conditional import in_any_order
from tests.core.test_conditional import nodes_of
from tests.core.test_conditional import output_law
from tests.core.test_conditional import target_logits
from tests.core.test_conditional import total_variation
from tests.core.test_lossless import PROFILE
from tests.core.test_lossless import distance
from tests.core.test_lossless import law_of


@pytest.fixture(autouse=True)
def tables_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_specdiff.core.sampling.to_float", lambda logits: logits.double())


def confidence(index: Any, rows: Any, previous: torch.Tensor) -> torch.Tensor:
    """Return numbers that hang on the token before, so that whoever looks at a drawn one can be seen."""
    return torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)[(previous + index) % V]


def confident(*, is_free: bool = False) -> Conditionals:
    return replace(in_any_order() if is_free else conditionals(), confidence=confidence)


def worth(shapes: list[TreeShape]) -> int:
    """Choose as a budget does, by the nodes' values alone."""
    return sum(value > 0.15 for value in shapes[0].values)


@pytest.mark.parametrize("is_free", [False, True], ids=["in order", "in any order"])
@pytest.mark.parametrize("budget", [3, 8])
@pytest.mark.parametrize("acceptance", ["match", "ratio"])
def test_trees_keep_the_law(budget: int, acceptance: str, is_free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=budget, acceptance=acceptance)
    laws = confident(is_free=is_free)
    tree, plain = (conditional_tree(each, speculation, worth) for each in (laws, conditionals()))
    assert isinstance(tree, DraftTree)
    assert isinstance(plain, DraftTree)
    assert tree.values != plain.values  # the head is heard
    assert total_variation(output_law(lambda: conditional_tree(laws, speculation, worth), acceptance, monkeypatch)) < EXACT


def test_trees_of_laws_in_any_order_are_the_same() -> None:
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=9, acceptance="match")
    in_order, free = (nodes_of(conditional_tree(confident(is_free=is_free), speculation))[0] for is_free in (False, True))
    assert in_order.keys() == free.keys()
    assert all(free[path] == pytest.approx(in_order[path], abs=1e-9) for path in free)


def chain(*, looks: bool) -> Draft:
    """Draw a chain left to right, as long as its values say; or (a control) as long as the head is sure of what was drawn."""
    laws, previous, tokens, probs = confident(), torch.tensor([0]), [], []
    for index in range(G):
        probs.append(torch.softmax(laws.step(index, [0], previous, None)[0], -1))
        previous = draw(probs[-1])
        tokens.append(previous)
    draft = Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1), has_prefix_law=True)
    if not looks:
        return draft.first(worth(likeliest_chains(laws)))
    is_sure = [float(confidence(index, [0], token)) > 0.4 for index, token in enumerate(tokens)]
    return draft.first(is_sure.index(False) if False in is_sure else G)


@pytest.mark.parametrize("acceptance", ["match", "ratio", "block"])
def test_chains_keep_the_law(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < worth(likeliest_chains(confident())) <= worth(likeliest_chains(conditionals()))
    assert total_variation(output_law(lambda: chain(looks=False), acceptance, monkeypatch)) < EXACT


@pytest.mark.parametrize("acceptance", ["ratio", "block"])
def test_control_a_chain_cut_by_what_was_drawn_is_seen(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert total_variation(output_law(lambda: chain(looks=True), acceptance, monkeypatch)) > 1e-3


def test_the_likeliest_chain_is_that_of_the_conditional_laws() -> None:
    previous, value, values = 0, 1.0, []
    for index in range(G):
        law = torch.softmax(drafter_logits(index, previous), 0)
        said = float(confidence(index, [0], torch.tensor([previous]))[0])
        value *= float(law.max()) * min(1.0, said / float(law.square().sum()))
        previous = int(law.argmax())
        values.append(value)
    assert likeliest_chains(confident())[0].values == pytest.approx(values)


def accepted_tokens(tree: DraftTree) -> float:
    """Return how many of a tree's tokens the target accepts by the match rule, in the mean."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0], strict=True):
        paths.append((*paths[parent], token))
    total = 0.0
    for path in paths[1:]:
        value = 1.0
        for place, token in enumerate(path):
            value *= float(torch.softmax(target_logits(path[:place]), 0)[token])
        total += value
    return total


@pytest.mark.parametrize("offset", range(4))
def test_a_head_that_is_right_brings_more_for_the_same_budget(offset: int) -> None:
    """After one token the drafter is sure of nonsense; where the head knows, no node is spent there."""
    wrong = offset % V

    def step(index: int, rows: list[int], previous: torch.Tensor, memory: Any) -> tuple[torch.Tensor, None]:
        logits = torch.stack([target_logits(() if index == 0 else (token,)) for token in previous.tolist()])
        for place, token in enumerate(previous.tolist()):
            if index > 0 and token == wrong:
                logits[place] = torch.full((V,), -9.0).index_fill(0, logits[place].argmin(), 0.0)
        return logits, None

    def overlap(index: int, rows: list[int], previous: torch.Tensor) -> torch.Tensor:
        laws = torch.softmax(step(index, rows, previous, None)[0], -1)
        right = [torch.softmax(target_logits(() if index == 0 else (token,)), -1) for token in previous.tolist()]
        return torch.minimum(laws, torch.stack(right)).sum(-1)

    brought = []
    for head in (None, overlap):
        laws = Conditionals(step, torch.tensor([0]), G, confidence=head)
        for budget in range(1, 8):
            speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=budget, acceptance="match")
            tree = conditional_tree(laws, speculation)
            assert isinstance(tree, DraftTree)
            brought.append(accepted_tokens(tree))
    without, with_head = brought[:7], brought[7:]
    assert all(more >= less - 1e-9 for more, less in zip(with_head, without, strict=True))
    assert sum(with_head) > sum(without) + 0.01


def test_the_likeliest_path_of_a_tree_is_its_first_nodes() -> None:
    """Where it is accepted, keys and values lie where they belong."""
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=6, acceptance="match")
    tree = conditional_tree(conditionals(), speculation)
    assert isinstance(tree, DraftTree)
    assert tree.parents[0][:G] == list(range(G))
    best = max(product(range(V), repeat=G), key=lambda path: _value(path))
    assert tuple(tree.tokens[0, :G].tolist()) == best


def _value(path: tuple[int, ...]) -> float:
    value = 1.0
    for index, token in enumerate(path):
        value *= float(torch.softmax(drafter_logits(index, path[index - 1] if index else 0), 0)[token])
    return value


def with_confidence(bias: float | None, **fields: Any) -> Any:
    """Return a drafter whose head says the same of every slot; `None`: what its random weights say."""
    drafter = make_drafter([0], seed=5, enable_confidence_head=True, pad_token_id=0, **fields)
    for name, parameter in drafter.named_parameters():
        if "markov" in name or "confidence" in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0)
    if bias is not None:
        drafter.confidence_head.proj.weight.data.zero_()
        drafter.confidence_head.proj.bias.data.fill_(bias)
    drafter.generation_config.tree_budget = None
    return drafter


MARKOV: dict[str, Any] = {"markov_rank": 2, "confidence_head_with_markov": True}


@pytest.mark.parametrize("fields", [MARKOV, {}], ids=["with the token before", "alone"])
@pytest.mark.parametrize("shape", [{"draft_shape": "tree", "tree_budget": "auto"}, {"draft_shape": "chain", "gamma": "auto"}])
def test_the_budget_goes_by_the_head(shape: dict[str, Any], fields: dict[str, Any]) -> None:
    target, prompt = make_target(), torch.tensor([[1, 5, 9]])
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
    cheap = Profile([1, 65], [0.010, 0.011], drafter_seconds=0.0001)
    drafted, text = {}, target.generate(prompt, **settings)
    for bias in (-9.0, 9.0):
        output = hf_specdiff.generate(
            target,
            prompt,
            assistant_model=with_confidence(bias, **fields),
            profile=cheap,
            return_dict_in_generate=True,
            **settings,
            **shape,
        )
        assert torch.equal(output.sequences, text)
        drafted[bias] = output.speculation.num_drafted_tokens
    assert drafted[-9.0] < 0.5 * drafted[9.0]


@pytest.mark.parametrize(
    "scheme",
    [
        {"draft_shape": "chain", "acceptance": "ratio", "gamma": "auto"},
        {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": "auto"},
    ],
    ids=["chain", "tree"],
)
def test_the_whole_loop_keeps_the_law(scheme: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(vocab_size=4, initializer_range=0.5)
    drafter = with_confidence(None, vocab_size=4, mask_token_id=3, block_size=3, **MARKOV)
    prompt = torch.tensor([[1, 2]])
    common: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 0}

    def ours() -> Callable[[], torch.Tensor]:
        return lambda: hf_specdiff.generate(target, prompt, assistant_model=drafter, profile=PROFILE, **common, **scheme)

    plain = law_of(lambda: target.generate(prompt, **common), monkeypatch)
    assert distance(plain, law_of(ours(), monkeypatch)) < 2e-6

"""Heads that know the token before: the output's law by exact enumeration on tables, with controls that must fail.

Tables in float64: the target's law of each token given all before it, and the drafter's given the one before it. All runs of a
round are walked through: every draw goes through an oracle that replays choices and multiplies their probabilities.
"""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList

import hf_specdiff
from hf_specdiff.core.conditional import conditional_tree
from hf_specdiff.core.conditional import sample_drafts
from hf_specdiff.core.copies import Copies
from hf_specdiff.core.draft import Conditionals
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.rules import make_rule
from hf_specdiff.core.sampling import Scores
from hf_specdiff.core.sampling import draw
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from tests.conftest import make_drafter
from tests.conftest import shared_target
from tests.core.test_lossless import all_runs
from tests.core.test_lossless import distance
from tests.core.test_lossless import law_of

V, G = 3, 2
EXACT = 1e-12


@pytest.fixture(autouse=True)
def tables_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_specdiff.core.sampling.to_float", lambda logits: logits.double())


def law(*prefix: int, seed: int) -> torch.Tensor:
    """Return a table's row: logits `(V,)` that hang on the whole prefix."""
    generator = torch.Generator().manual_seed(seed + 7 * len(prefix) + sum(31**i * (t + 1) for i, t in enumerate(prefix)))
    return 1.5 * torch.randn(V, generator=generator, dtype=torch.float64)


def target_logits(path: tuple[int, ...]) -> torch.Tensor:
    return law(*path, seed=1)


def drafter_logits(index: int, previous: int) -> torch.Tensor:
    return law(index, previous, seed=1000)


def conditionals() -> Conditionals:
    def step(index: int, rows: list[int], previous: torch.Tensor, memory: Any) -> tuple[torch.Tensor, None]:
        return torch.stack([drafter_logits(index, token) for token in previous.tolist()]), None

    return Conditionals(step, torch.tensor([0]), G)


def in_any_order() -> Conditionals:
    """Return the same laws as ones that may be asked for in any order, some of them guessed beforehand."""

    def step(index: Any, rows: Any, previous: torch.Tensor, memory: Any) -> tuple[torch.Tensor, None]:
        positions = torch.as_tensor(index).expand(len(previous)).tolist()
        table = [drafter_logits(*asked) for asked in zip(positions, previous.tolist(), strict=True)]
        return torch.stack(table), None

    marginals = torch.stack([drafter_logits(index, 0) for index in range(G)])[None]
    return Conditionals(step, torch.tensor([0]), G, marginals)


def scores_of(draft: Draft | DraftTree) -> Scores:
    """Return the target's scores after the anchor and after each drafted token, by the path that leads there."""
    tokens = draft.tokens[0].tolist()
    parents = list(range(len(tokens))) if isinstance(draft, Draft) else draft.parents[0]
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[max(parent, 0)], token))
    logits = torch.stack([target_logits(path) for path in paths])[None]
    return Scores(LogitsProcessorList(), Text.of_prompt(torch.tensor([[0]]), None), draft.tokens, logits)


def output_law(
    make: Callable[[], Draft | DraftTree], acceptance: str, monkeypatch: pytest.MonkeyPatch, length: int = G + 1
) -> dict:
    """Return the law of the next tokens, G + 1 or more: those of a round, and behind them the target's own."""
    rule = make_rule(acceptance, do_sample=True)

    def call() -> torch.Tensor:
        draft = make()
        accepted = rule(draft, scores_of(draft))
        return torch.tensor(accepted.tokens)

    found: Counter = Counter()
    for written, probability in all_runs(call, monkeypatch):
        for rest in product(range(V), repeat=length - len(written)):
            text, weight = written, probability
            for token in rest:
                weight *= float(torch.softmax(target_logits(text), 0)[token])
                text = (*text, token)
            found[text] += weight
    return found


def total_variation(found: dict) -> float:
    distance, (length,) = 0.0, {len(text) for text in found}
    for text in product(range(V), repeat=length):
        p = 1.0
        for i, token in enumerate(text):
            p *= float(torch.softmax(target_logits(text[:i]), 0)[token])
        distance += abs(p - found.get(text, 0.0)) / 2
    return distance


def chain(*, hand_over: str) -> Draft:
    """Draw a chain left to right; hand over the laws it was drawn from, or (a control) those of another token before."""
    laws, previous, tokens, probs = conditionals(), torch.tensor([0]), [], []
    for index in range(G):
        drawn_from = torch.softmax(laws.step(index, [0], previous, None)[0], -1)
        before = torch.tensor([0]) if hand_over == "wrong" else previous
        probs.append(torch.softmax(laws.step(index, [0], before, None)[0], -1))
        if hand_over == "marginals" and index > 0:
            first = torch.softmax(drafter_logits(0, 0), 0)
            each = torch.stack([torch.softmax(drafter_logits(1, token), 0) for token in range(V)])
            probs[-1] = (first @ each)[None]
        previous = draw(drawn_from)
        tokens.append(previous)
    return Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1), has_prefix_law=True)


@pytest.mark.parametrize("acceptance", ["match", "ratio", "block"])
def test_chains_keep_the_law(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert total_variation(output_law(lambda: chain(hand_over="own"), acceptance, monkeypatch)) < EXACT


@pytest.mark.parametrize("hand_over", ["marginals", "wrong"])
@pytest.mark.parametrize("acceptance", ["ratio", "block"])
def test_control_other_laws_handed_over_are_seen(hand_over: str, acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert total_variation(output_law(lambda: chain(hand_over=hand_over), acceptance, monkeypatch)) > 1e-3


@pytest.mark.parametrize(
    ("budget", "temperature", "make_laws"),
    [*((budget, 1.0, conditionals) for budget in (1, 3, 5, 8)), (5, 0.5, conditionals)]
    + [(budget, 0.5, in_any_order) for budget in (1, 3, 5, 8)],
)
@pytest.mark.parametrize("acceptance", ["match", "ratio"])
def test_trees_keep_the_law(
    budget: int,
    acceptance: str,
    temperature: float,
    make_laws: Callable[[], Conditionals],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=budget, acceptance=acceptance)

    def temper(laws: torch.Tensor) -> torch.Tensor:
        return torch.softmax(laws.log() / temperature, dim=-1)

    make = lambda: conditional_tree(make_laws(), speculation, temper=temper)  # noqa: E731
    assert total_variation(output_law(make, acceptance, monkeypatch)) < EXACT


def test_control_a_tree_whose_children_were_drawn_given_another_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws of the second position are those of one token before, whichever was drawn."""
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=6, acceptance="ratio")

    def make() -> Draft | DraftTree:
        tree = conditional_tree(conditionals(), speculation)
        assert isinstance(tree, DraftTree)
        assert tree.sampled is not None
        laws = tree.sampled.laws.clone()
        assert len(laws) > 1
        laws[1:] = torch.softmax(drafter_logits(1, 0), 0)
        return DraftTree(
            tree.tokens, tree.parents, sampled=type(tree.sampled)(laws, tree.sampled.row_of, tree.sampled.child_of)
        )

    assert total_variation(output_law(make, "ratio", monkeypatch)) > 1e-3


@pytest.mark.parametrize("acceptance", ["match", "self_selection"])
def test_joint_samples_keep_the_law(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speculation = SpeculationConfig(G, draft_shape="samples", num_drafts=2, acceptance=acceptance)
    assert total_variation(output_law(lambda: sample_drafts(conditionals(), speculation), acceptance, monkeypatch)) < EXACT


def test_a_tree_holds_the_most_probable_prefixes_given_their_own_tokens() -> None:
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=6, acceptance="match")
    tree = conditional_tree(conditionals(), speculation)
    assert isinstance(tree, DraftTree)
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0], strict=True):
        paths.append((*paths[parent], token))
    values = {}
    for length in range(1, G + 1):
        for path in product(range(V), repeat=length):
            value = 1.0
            for index, token in enumerate(path):
                value *= float(torch.softmax(drafter_logits(index, path[index - 1] if index else 0), 0)[token])
            values[path] = value
    assert set(paths[1:]) == set(sorted(values, key=lambda path: -values[path])[:6])


def tables_of(num_rows: int, gamma: int, vocab_size: int, seed: int, *, is_free: bool) -> Conditionals:
    """Return random laws of several rows, in order of the tokens or (`is_free`) in any order."""
    generator = torch.Generator().manual_seed(seed)
    laws = 2 * torch.randn(num_rows, gamma, vocab_size, vocab_size, generator=generator, dtype=torch.float64)

    def step(index: Any, rows: Any, previous: torch.Tensor, memory: Any) -> tuple[torch.Tensor, None]:
        return laws[torch.as_tensor(rows), index, previous], None

    anchors = torch.arange(num_rows) % vocab_size
    return Conditionals(step, anchors, gamma, laws.logsumexp(dim=2) if is_free else None)


def nodes_of(draft: Draft | DraftTree) -> list[dict[tuple[int, ...], tuple[float, bool]]]:
    """Return for each row the path of each node with its value and whether it was copied."""
    assert isinstance(draft, DraftTree)
    found = []
    for row, parents in enumerate(draft.parents):
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(draft.tokens[row].tolist(), parents, strict=False):
            paths.append((*paths[parent], token))
        copied = set() if draft.copied is None else set(draft.copied[row])
        assert draft.values is not None
        found.append(
            {
                path: (value, node in copied)
                for node, (path, value) in enumerate(zip(paths[1:], draft.values[row], strict=True), 1)
            }
        )
    return found


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize(("budget", "is_copying"), [(4, False), (25, False), (25, True), (60, True)])
def test_tables_find_the_tree_that_is_found_depth_by_depth(
    budget: int, is_copying: bool, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 tokens, three rows, also where laws were not foreseen and a node has more children than are read first."""
    monkeypatch.setattr("hf_specdiff.core.conditional.TABLE_SHARE", share)
    monkeypatch.setattr("hf_specdiff.core.conditional.FEW_RANKS", 5)
    speculation = SpeculationConfig(4, draft_shape="tree", tree_budget=budget)
    drafts = []
    for is_free in (False, True):
        copies = None
        if is_copying:
            copies = Copies(6, 2, 40)
            copies.look(Text.of_prompt(torch.tensor([[1, 5, 7, 9, 2, 3, 1, 5], [4] * 8, [9, 8, 7, 6, 5, 4, 3, 2]])), None)
        drafts.append(nodes_of(conditional_tree(tables_of(3, 4, 40, budget, is_free=is_free), speculation, copies=copies)))
    for in_order, free in zip(*drafts, strict=True):
        assert len(in_order) == budget
        assert free.keys() == in_order.keys()
        assert all(free[path] == pytest.approx(in_order[path], abs=1e-9) for path in free)
    assert any(copied for _, copied in drafts[0][0].values()) == is_copying


class Operations(TorchDispatchMode):
    """Counts what is asked of torch, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("share", "most"), [(2, 40), (0, 150)])
def test_a_tree_takes_few_operations(share: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no law but the anchor's was foreseen: others are asked for several at a time."""
    monkeypatch.setattr("hf_specdiff.core.conditional.TABLE_SHARE", share)
    laws = tables_of(1, 4, 40, 1, is_free=True)
    with Operations() as operations:
        draft = conditional_tree(laws, SpeculationConfig(4, draft_shape="tree", tree_budget=15))
    assert len(nodes_of(draft)[0]) == 15
    assert operations.count <= most


@pytest.mark.parametrize("num_candidates", [1, 8])
def test_greedy_chains_by_tables_are_those_written_one_by_one(num_candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_specdiff.core.draft.NUM_CANDIDATES", num_candidates)
    target, drafter = shared_target(), make_drafter([0, 2], markov_rank=4)
    torch.nn.init.normal_(drafter.markov_head.markov_w1.weight)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    settings = {"do_sample": False, "max_new_tokens": 14, "draft_shape": "chain", "gamma": 5, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 5, 9], [4, 4, 8]])
    # A processor that reads the text and changes nothing: the tokens are then drafted one by one.
    runs = [
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **more)
        for more in ({}, {"no_repeat_ngram_size": 14}, {"prompt_lookup_num_tokens": 3})
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert torch.equal(runs[0].sequences, runs[2].sequences)
    assert runs[0].speculation.num_accepted == runs[1].speculation.num_accepted


_LAWS: dict[str, Counter] = {}


def plain_law(target: Any, prompt: torch.Tensor, **settings: Any) -> Counter:
    """Return the law of a shared target's plain `generate`; many tests compare with the same one."""
    name = f"{id(target)} {prompt.tolist()} {sorted(settings.items())}"
    if name not in _LAWS:
        with pytest.MonkeyPatch.context() as patch:
            _LAWS[name] = law_of(lambda: target.generate(prompt, **settings), patch)
    return _LAWS[name]


HEADS: list[dict[str, Any]] = [
    {"markov_rank": 2},
    {"markov_rank": 2, "markov_head_type": "rnn", "predicts_from_anchor": True, "block_size": 2},
    {"selector_rank": 2, "selector_top_k": 2},
]


@pytest.mark.parametrize("fields", HEADS, ids=lambda fields: next(iter(fields)) + fields.get("markov_head_type", ""))
@pytest.mark.parametrize(
    "scheme",
    [
        {"draft_shape": "chain", "acceptance": "block"},
        {"draft_shape": "chain", "acceptance": "ratio", "repetition_penalty": 1.3},
        {"draft_shape": "tree", "tree_budget": 3, "acceptance": "ratio", "top_k": 2},
    ],
    ids=lambda scheme: scheme["draft_shape"] + scheme["acceptance"],
)
def test_the_whole_loop_keeps_the_law(fields: dict[str, Any], scheme: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = shared_target(vocab_size=4, initializer_range=0.5)
    settings = {"vocab_size": 4, "mask_token_id": 3, "block_size": 3, "pad_token_id": 0, **fields}
    drafter = make_drafter([0], seed=5, **settings)
    for name, parameter in drafter.named_parameters():
        if "markov" in name or "selector" in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0)
    prompt = torch.tensor([[1, 2]])
    common = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 0}
    common |= {name: scheme[name] for name in ("repetition_penalty", "top_k") if name in scheme}
    plain = plain_law(target, prompt, **common)
    ours = law_of(lambda: hf_specdiff.generate(target, prompt, assistant_model=drafter, **{**common, **scheme}), monkeypatch)
    assert distance(plain, ours) < 2e-6

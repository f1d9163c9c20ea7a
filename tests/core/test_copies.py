"""Copied branches: the index against a search, the law by exact enumeration with controls that must fail, the whole loop."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_specdiff
from hf_specdiff import Profile
from hf_specdiff import SpecDiffCandidateGenerator
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import copies as module
from hf_specdiff.core.conditional import conditional_tree
from hf_specdiff.core.conditional import sample_drafts
from hf_specdiff.core.copies import Copies
from hf_specdiff.core.copies import Copy
from hf_specdiff.core.copies import Places
from hf_specdiff.core.copies import Trust
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.draft import SampledChildren
from hf_specdiff.core.sampling import draw
from hf_specdiff.core.shapes import DraftShaper
from hf_specdiff.core.shapes import draft_tree
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from hf_specdiff.core.tree import COPIED
from hf_specdiff.core.tree import Copied
from hf_specdiff.core.tree import best_first
from hf_specdiff.core.tree import last_children
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import plain_text
from tests.conftest import shared_target
from tests.core.test_conditional import EXACT
from tests.core.test_conditional import G
from tests.core.test_conditional import V
from tests.core.test_conditional import conditionals
from tests.core.test_conditional import drafter_logits
from tests.core.test_conditional import output_law
from tests.core.test_conditional import plain_law
from tests.core.test_conditional import tables_in_float64  # noqa: F401  (a fixture that every test here gets)
from tests.core.test_conditional import total_variation
from tests.core.test_lossless import distance
from tests.core.test_lossless import law_of


def searched(tokens: list[int], max_size: int, count: int) -> tuple[list[int], int]:
    """Return what `Places.find` promises, by looking at the whole text."""
    end = len(tokens)
    for size in range(min(max_size, end - 1), 0, -1):
        for place in range(end - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[end - size :]:
                match = size
                while match < min(place, size + 2 * count) and tokens[place - match - 1] == tokens[end - match - 1]:
                    match += 1
                copied = list(tokens)
                for step in range(count):
                    copied.append(copied[place + step])
                return copied[end:], match
    return [], 0


@pytest.mark.parametrize("max_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_what_a_search_finds_while_the_text_grows(seed: int, max_size: int) -> None:
    generator = random.Random(seed)
    places, text = Places(max_size), []
    for _ in range(60):
        added = [generator.randrange(3) for _ in range(generator.randrange(1, 4))]
        text += added
        places.extend(added)
        assert places.find(5) == searched(text, max_size, 5)


def test_a_copy_that_meets_the_end_of_the_text_goes_on_with_itself() -> None:
    places = Places(2)
    places.extend([7, 1, 2, 3, 1, 2])
    assert places.find(7) == ([3, 1, 2, 3, 1, 2, 3], 2)


def test_rows_keep_their_places_while_others_end_and_padding_is_no_text() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    text = Text.of_prompt(torch.tensor([[5, 6, 5, 6], [0, 0, 8, 9], [0, 4, 3, 4]]), mask)
    finder = Copies(2, 2, 10)
    assert [copy.tokens for copy in finder.look(text, None)] == [[5, 6], [], [3, 4]]
    text = text.extended([[1], [0, 8], [3, 4]]).select([1, 2])
    # The 0 of the second row is a token, and its padding is none.
    assert [copy.tokens for copy in finder.look(text, None)] == [[9, 0], [3, 4]]
    assert [copy.tokens for copy in finder.look(text, 8)] == [[9], [3]]


def test_no_token_that_the_target_lacks_is_copied() -> None:
    assert Copies(3, 2, 6).look(Text.of_prompt(torch.tensor([[1, 2, 7, 1]])), None)[0].tokens == [2]


def test_trust_follows_what_stands() -> None:
    for truth, expected in ((0.9, 0.9), (0.1, 0.1)):
        trust, generator = Trust(0.0), random.Random(0)
        for _ in range(2000):
            trust.learn(trust.rate(2, -1.0), stands=generator.random() < truth)
        assert trust.rate(2, -1.0) == pytest.approx(expected, abs=0.1)
    assert Trust(0.0).rate(8) > Trust(0.0).rate(2) > Trust(0.0).rate(2, -1.0)


def test_what_is_learnt_ends_with_the_first_token_that_does_not_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(module.Trust, "learn", lambda self, rate, *, stands: seen.append(stands))
    finder = Copies(4, 1, 10)
    finder.look(Text.of_prompt(torch.tensor([[1, 2, 3, 4, 5, 1]])), None)
    draft = Draft.nothing(torch.tensor([[1]]))
    finder.observe(Outcome(draft, [[2, 3, 9, 5]], [[0, 1, 2, 3]], [False]))
    assert seen == [True, True, False]  # by the text alone: no drafter was asked
    finder.observe(Outcome(draft, [[2]], [[0]], [False]))  # a round without room for a draft looks nothing up
    assert len(seen) == 3


@pytest.mark.parametrize("budget", [1, 2, 4, 7, 12])
def test_a_tree_with_a_copy_holds_the_most_probable_prefixes(budget: int) -> None:
    """Against all prefixes, each worth the product of its conditionals: the copy's own where the path is copied so far."""
    ranked = [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]
    copied = [Copied(0.5, 1, 0.6), Copied(0.8, None, 0.2), Copied(0.9, None, 0.0)]
    values: dict[tuple[int, ...], float] = {}

    def grow(path: tuple[int, ...], value: float) -> None:
        depth = len(path)
        beside = copied[depth] if depth < 3 and all(rank == COPIED for rank in path) else None
        children = (
            {} if depth >= 2 else {rank: value * p * (beside.scale if beside else 1.0) for rank, p in enumerate(ranked[depth])}
        )
        if beside is not None:
            children = {rank: v for rank, v in children.items() if rank != beside.rank} | {COPIED: value * beside.rate}
        for rank, child in children.items():
            values[*path, rank] = child
            grow((*path, rank), child)

    grow((), 1.0)
    shape = best_first(ranked, budget, 0.0, copied)
    paths: list[tuple[int, ...]] = [()]
    for parent, rank in zip(shape.parents, shape.ranks, strict=True):
        paths.append((*paths[parent], rank))
    assert {path: values[path] for path in paths[1:]} == pytest.approx(dict(zip(paths[1:], shape.values, strict=True)))
    assert sorted(shape.values) == pytest.approx(sorted(values.values())[-budget:])
    assert [paths[node] for node in shape.copied()] == [(COPIED,) * (i + 1) for i in range(len(shape.copied()))]


def test_a_copied_child_is_not_the_drawn_one() -> None:
    assert last_children([0, 0, 2, 0], [4]) == [False, True, True, False]


def found(tokens: list[int]) -> Copies:
    """Return copies that have looked up these tokens."""
    finder = Copies(len(tokens), 1, V)
    finder.found = [Copy(tokens, 2, [0.7] * len(tokens), [0.7] * len(tokens))]
    return finder


def marginals() -> torch.Tensor:
    return torch.stack([drafter_logits(index, 0) for index in range(G)])[None]


# A window of two: merged with the likeliest path, beside it, and longer than the window.
COPIES = [[0, 1], [1], [2, 2], [2, 0, 1]]


@pytest.mark.parametrize("tokens", COPIES, ids=str)
@pytest.mark.parametrize("budget", [2, 6])
@pytest.mark.parametrize("acceptance", ["match", "ratio"])
@pytest.mark.parametrize("make_tree", ["marginals", "conditionals"])
def test_trees_with_a_copied_branch_keep_the_law(
    make_tree: str, acceptance: str, budget: int, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    speculation = SpeculationConfig(G, draft_shape="tree", tree_budget=budget, acceptance=acceptance)
    num_copied = []

    def make() -> Draft | DraftTree:
        if make_tree == "marginals":
            tree = draft_tree(marginals(), speculation, copies=found(tokens))
        else:
            tree = conditional_tree(conditionals(), speculation, copies=found(tokens))
        assert isinstance(tree, DraftTree)
        assert tree.copied is not None
        own = [tree.tokens[0, node - 1].item() for node in tree.copied[0]]
        assert own == tokens[: len(own)]
        assert len(tree.children()[0]) == tree.num_tokens <= budget  # siblings differ
        num_copied.append(len(own))
        return tree

    assert total_variation(output_law(make, acceptance, monkeypatch, length=4)) < EXACT
    assert len(set(num_copied)) == 1  # settled before anything is drawn
    assert num_copied[0] > 0


@pytest.mark.parametrize("what", ["copied as if it were drawn", "drawn from less than is handed over"])
def test_control_a_copied_child_that_is_taken_for_a_drawn_one_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.softmax(marginals()[0, 0], 0)
    without = torch.where(torch.arange(V) == 2, 0.0, full)
    without = without / without.sum()

    def make() -> DraftTree:
        if what == "copied as if it were drawn":
            return DraftTree(torch.tensor([[2]]), [[0]], sampled=SampledChildren(full[None], [{0: 0}], [{0: 1}]))
        token = int(draw(without[None]))
        return DraftTree(torch.tensor([[2, token]]), [[0, 0]], sampled=SampledChildren(full[None], [{0: 0}], [{0: 2}]))

    assert total_variation(output_law(make, "ratio", monkeypatch)) > 1e-3


@pytest.mark.parametrize("acceptance", ["match", "self_selection"])
def test_joint_samples_and_a_copy_keep_the_law(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speculation = SpeculationConfig(G, draft_shape="samples", num_drafts=1, acceptance=acceptance)
    make = lambda: sample_drafts(conditionals(), speculation, found([2, 0, 1]))  # noqa: E731
    assert total_variation(output_law(make, acceptance, monkeypatch)) < EXACT


def chain(tokens: list[int], *, chosen_by: str = "plan") -> Draft:
    """Return a chain as the loop makes it; a control gives a draft up for the copy because of the token that was drawn."""
    scores, shaper = marginals(), DraftShaper(SpeculationConfig(G), None, found(tokens))
    count, _, copied = shaper.chain_plan(scores)
    assert count == G
    assert copied is not None
    probs = torch.softmax(scores, -1)
    drawn = draw(probs)
    if chosen_by == "what was drawn":
        copied = [tokens[:G]] if drawn[0, 0] == 0 else [[]]
    for depth, token in enumerate(copied[0]):
        drawn[0, depth] = token
        probs[0, depth] = torch.nn.functional.one_hot(torch.tensor(token), V)
    return Draft(drawn, probs, has_prefix_law=True)


@pytest.mark.parametrize("tokens", [[1], [2, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("acceptance", ["match", "ratio", "block"])
def test_chains_that_begin_with_a_copy_keep_the_law(
    acceptance: str, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert total_variation(output_law(lambda: chain(tokens), acceptance, monkeypatch)) < EXACT


@pytest.mark.parametrize("acceptance", ["ratio", "block"])
def test_control_a_copy_that_is_chosen_by_what_was_drawn_is_seen(acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: chain([2, 2], chosen_by="what was drawn")  # noqa: E731
    assert total_variation(output_law(make, acceptance, monkeypatch)) > 1e-3


# A pass of the drafter costs next to nothing; or a hundred steps, so that copies are drafted alone.
CHEAP, DEAR = (Profile([1, 65], [0.010, 0.020], drafter_seconds=seconds) for seconds in (0.0005, 1.0))
WHOLE: dict[str, dict[str, Any]] = {
    "tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": 3, "gamma": 2},
    "tree-match": {"draft_shape": "tree", "acceptance": "match", "tree_budget": 3},
    "chain-block": {"draft_shape": "chain", "acceptance": "block"},
    "chain-ratio-penalty": {"draft_shape": "chain", "acceptance": "ratio", "repetition_penalty": 1.3},
    "samples-match": {"draft_shape": "samples", "num_drafts": 1, "gamma": 2},
    "adaptive-tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": "auto", "profile": CHEAP},
    "alone-tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": "auto", "profile": DEAR},
    "alone-chain-block": {"draft_shape": "chain", "acceptance": "block", "gamma": "auto", "profile": DEAR},
}


@pytest.mark.parametrize("scheme", WHOLE)
def test_the_whole_loop_keeps_the_law(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = shared_target(vocab_size=4, initializer_range=0.5)
    drafter = make_drafter([0], seed=5, vocab_size=4, mask_token_id=3, block_size=3, pad_token_id=0)
    prompt = torch.tensor([[1, 2, 1]])
    common = {"do_sample": True, "max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 0, "top_k": 2}
    ours = {**common, "prompt_lookup_num_tokens": 4, **WHOLE[scheme]}
    if "repetition_penalty" in ours:
        common["repetition_penalty"] = ours["repetition_penalty"]
    plain = plain_law(target, prompt, **common)
    assert (
        distance(plain, law_of(lambda: hf_specdiff.generate(target, prompt, assistant_model=drafter, **ours), monkeypatch))
        < 2e-6
    )


LOOPING = torch.tensor([[1, 5, 9, 4, 7, 5, 9, 4, 7, 5, 9]])


@pytest.mark.parametrize("arguments", [{}, {"draft_shape": "chain"}, {"draft_shape": "samples"}, {"tree_budget": 3}], ids=str)
def test_greedy_text_stays_the_targets_and_copies_stand_in_it(arguments: dict[str, Any], drafter: SpecDiffDrafter) -> None:
    target = shared_target()
    settings = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, "eos_token_id": None}
    plain = plain_text(target, LOOPING, max_new_tokens=40, eos_token_id=None)
    call = {"assistant_model": drafter, **settings, **arguments}
    output = hf_specdiff.generate(target, LOOPING, prompt_lookup_num_tokens=12, **call)
    assert output.sequences.tolist() == plain.tolist()
    stats, without = output.speculation, hf_specdiff.generate(target, LOOPING, **call).speculation
    assert 0 < stats.num_copied_tokens <= sum(map(sum, stats.num_accepted))
    assert without.num_copied_tokens == 0
    # A random drafter is never right, and a greedy text of a tiny model soon repeats itself.
    assert stats.tokens_per_round > 1.25 * without.tokens_per_round


@pytest.mark.parametrize(
    "arguments", [{"tree_budget": "auto"}, {"draft_shape": "chain", "gamma": "auto"}], ids=["tree", "chain"]
)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_where_no_pass_pays_copies_are_drafted_alone(
    num_rows: int, arguments: dict[str, Any], drafter: SpecDiffDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pass(*args: object, **kwargs: object) -> None:
        raise AssertionError("the drafter is too dear")

    monkeypatch.setattr(SpecDiffDrafter, "forward", no_pass)
    target, ids = shared_target(), LOOPING.expand(num_rows, -1)
    settings = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, "eos_token_id": None}
    call = {"assistant_model": drafter, "profile": DEAR, "prompt_lookup_num_tokens": 12, **arguments}
    output = hf_specdiff.generate(target, ids, **settings, **call)
    assert output.sequences.tolist() == target.generate(ids, **settings).sequences.tolist()
    assert output.speculation.num_copied_tokens == sum(map(sum, output.speculation.num_accepted)) > 0


@pytest.mark.parametrize("arguments", [{}, {"draft_shape": "chain"}], ids=["tree", "chain"])
def test_rows_of_a_batch_copy_from_themselves(arguments: dict[str, Any], drafter: SpecDiffDrafter) -> None:
    target = shared_target()
    ids = torch.cat([LOOPING, torch.tensor([[0, 0, 0, 0, 8, 3, 8, 3, 8, 3, 8]]), torch.tensor([[0] * 9 + [6, 11]])])
    settings = {"attention_mask": (ids != 0).long(), "do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}
    plain = target.generate(ids, **settings)
    output = hf_specdiff.generate(target, ids, assistant_model=drafter, prompt_lookup_num_tokens=9, **settings, **arguments)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert output.speculation.num_copied_tokens > 0


def test_the_hosts_names_are_read_wherever_the_host_reads_them(token_drafter: SpecDiffDrafter) -> None:
    target = make_target()
    settings = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}

    def num_copied(call: Callable[..., Any], **arguments: Any) -> int:
        return call(LOOPING, assistant_model=token_drafter, **arguments).speculation.num_copied_tokens

    def named(**arguments: Any) -> int:
        return num_copied(lambda ids, **more: hf_specdiff.generate(target, ids, **more), **settings, **arguments)

    expected = named(prompt_lookup_num_tokens=6, max_matching_ngram_size=3)
    assert expected > 0
    config = GenerationConfig(prompt_lookup_num_tokens=6, max_matching_ngram_size=3, eos_token_id=2, pad_token_id=0, **settings)
    assert named(generation_config=config) == expected
    assert config.prompt_lookup_num_tokens == 6  # the caller's own object stays as it was
    hf_specdiff.attach(target)
    assert num_copied(target.generate, prompt_lookup_num_tokens=6, max_matching_ngram_size=3, **settings) == expected


def test_a_drafters_own_default_is_used_and_yields_where_it_cannot_be(prompt: torch.Tensor) -> None:
    target, drafter = shared_target(), make_drafter()
    drafter.generation_config.prompt_lookup_num_tokens = 6
    settings = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "assistant_model": drafter}
    assert hf_specdiff.generate(target, LOOPING, **settings).speculation.num_copied_tokens > 0
    for more in ({"num_denoising_steps": 2}, {"prompt_lookup_num_tokens": 0}):
        without = hf_specdiff.generate(target, LOOPING, **more, **settings)
        assert without.speculation.num_copied_tokens == 0


def test_other_ways_to_draft_refuse_copies(prompt: torch.Tensor, token_drafter: SpecDiffDrafter) -> None:
    class Own:
        target_layer_ids = None

        def draft(self, text: Text, features: Any) -> Draft:
            return Draft.nothing(text.tokens)

    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` must be left out with a drafter of your own, got 5"):
        hf_specdiff.generate(shared_target(), prompt, assistant_model=Own(), prompt_lookup_num_tokens=5, max_new_tokens=3)
    with pytest.raises(ValueError, match="must leave out `prompt_lookup_num_tokens`, got 5"):
        SpecDiffCandidateGenerator(token_drafter, GenerationConfig(), speculation={"prompt_lookup_num_tokens": 5})

"""Drafters of the user's own: an object with `draft` and `target_layer_ids` in the whole loop, and what is refused of it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import pipeline

import hf_specdiff
from hf_specdiff import Draft
from hf_specdiff import DraftTree
from hf_specdiff import Features
from hf_specdiff import Outcome
from hf_specdiff import Text
from hf_specdiff.core.draft import SampledChildren
from hf_specdiff.core.own_drafter import shallow
from tests.conftest import VOCAB_SIZE
from tests.conftest import shared_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_drafter.py"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
PROMPT = torch.tensor([[1, 5, 9, 4, 7, 7, 3]])


class Scripted:
    """Drafts what a function makes of the text, and keeps what it is told."""

    def __init__(self, draft: Any, target_layer_ids: Any = None) -> None:
        self._draft = draft
        self.target_layer_ids = target_layer_ids
        self.outcomes: list[Outcome] = []
        self.features: list[Features | None] = []

    def draft(self, text: Text, features: Features | None) -> Any:
        self.features.append(features)
        return self._draft(text)

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class OfRows(Scripted):
    """The same for batches."""

    rows: list[list[int]]

    def select_rows(self, rows: list[int]) -> None:
        self.rows = [*getattr(self, "rows", []), rows]


def chain(text: Text) -> Draft:
    """Propose the same three tokens again and again: mostly wrong."""
    return Draft(torch.tensor([[5, 9, 4]]).expand(text.num_rows, -1), None, has_prefix_law=True)


def right(words: torch.Tensor, count: int = 4) -> Any:
    """Propose what the target will write."""
    return lambda text: Draft(words[:, text.lengths[0] : text.lengths[0] + count], None, has_prefix_law=True)


def tree(text: Text) -> DraftTree:
    """Propose four tokens after the anchor and two after the first of them."""
    rows = torch.tensor([[3, 5, 9, 4, 3, 5]]).expand(text.num_rows, -1)
    return DraftTree(rows, [[0, 0, 0, 0, 1, 1]] * text.num_rows)


def samples(text: Text) -> DraftTree:
    return DraftTree(torch.tensor([[3, 5, 9]]), [[0, 1, 0]], [[[1, 2], [3]]])


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the example defines; test_examples.py looks at what it prints."""
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("way", ["generate", "attach", "pipeline"])
def test_the_example_runs_in_every_way_and_by_every_rule(way: str, example: dict[str, Any]) -> None:
    target, tokenizer, drafter = example["target"], example["tokenizer"], example["CopyingDrafter"]()
    prompt = hf_specdiff.load_prompts("math")[1]["prompt"]
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    plain = target.generate(**ids, **GREEDY)
    if way == "generate":
        for shape, rule in ((None, "auto"), ("chain", "match"), (None, "ratio"), ("chain", "block")):
            scheme = {"assistant_model": drafter, "draft_shape": shape, "acceptance": rule}
            assert torch.equal(hf_specdiff.generate(target, **ids, **scheme, **GREEDY), plain)
            drawn = hf_specdiff.generate(target, **ids, **scheme, do_sample=True, max_new_tokens=12)
            assert drawn.shape[1] <= ids.input_ids.shape[1] + 12
        return
    hf_specdiff.attach(target)
    try:
        if way == "attach":
            output = target.generate(**ids, assistant_model=drafter, **GREEDY, return_dict_in_generate=True)
            assert torch.equal(output.sequences, plain)
            assert output.speculation.num_drafted_tokens > 0
        else:
            write = pipeline("text-generation", model=target, tokenizer=tokenizer)
            text = write(prompt, assistant_model=drafter, **GREEDY)[0]["generated_text"]
            assert text == tokenizer.decode(plain[0], skip_special_tokens=True)
    finally:
        hf_specdiff.detach(target)


@pytest.mark.parametrize("draft", [chain, tree, samples], ids=["chain", "tree", "samples"])
@pytest.mark.parametrize("layers", [None, [0, 2], (1,)], ids=["none", "two", "one"])
def test_greedy_text_is_the_targets_and_every_outcome_is_told(draft: Any, layers: Any) -> None:
    target = shared_target(eos_token_id=None)
    drafter = Scripted(draft, layers)
    plain = target.generate(PROMPT, **GREEDY)
    output = hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    assert len(drafter.outcomes) == output.speculation.num_rounds
    told = [token for outcome in drafter.outcomes for token in outcome.tokens[0]]
    assert told == plain[0, PROMPT.shape[1] + 1 :].tolist()  # the first token is the prompt's own
    for outcome, accepted in zip(drafter.outcomes, output.speculation.num_accepted, strict=True):
        assert [len(outcome.nodes[0]) - 1] == accepted
        for node, token in zip(outcome.nodes[0][1:], outcome.tokens[0], strict=False):
            assert int(outcome.draft.tokens[0, node - 1]) == token
    assert [outcome.is_done[0] for outcome in drafter.outcomes] == [False] * (len(drafter.outcomes) - 1) + [True]
    states = [features for features in drafter.features if features is not None]
    assert bool(states) == (layers is not None)
    if layers is not None:
        assert states[0].states.shape == (1, PROMPT.shape[1], 16 * len(layers))


@pytest.mark.parametrize("draft", [chain, tree])
def test_rows_of_a_batch_are_those_of_plain_generate(draft: Any) -> None:
    target = shared_target(2)
    ids = torch.tensor([[1, 5, 9, 4], [1, 8, 3, 3], [1, 20, 6, 11]])
    drafter = OfRows(draft)
    assert torch.equal(hf_specdiff.generate(target, ids, assistant_model=drafter, **GREEDY), target.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="`select_rows` for 3 sequences"):
        hf_specdiff.generate(target, ids, assistant_model=Scripted(draft), **GREEDY)


@pytest.mark.parametrize("limit", range(1, 8))
def test_no_draft_reaches_past_the_end(limit: int) -> None:
    """A model with learned positions has none behind its last one."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=32, vocab_size=VOCAB_SIZE, eos_token_id=None)
    target = GPT2LMHeadModel(config).eval()
    settings = {"do_sample": False, "max_new_tokens": limit}
    prompt = torch.arange(32 - limit)[None] % 29
    plain = target.generate(prompt, **settings)
    for draft in (chain, tree, samples):
        assert torch.equal(hf_specdiff.generate(target, prompt, assistant_model=Scripted(draft), **settings), plain)


def test_a_shallow_tree_keeps_its_paths_and_its_laws() -> None:
    laws = torch.eye(4)[[1, 3, 2]]
    sampled = SampledChildren(laws, [{0: 0, 1: 1, 3: 2}], [{0: 2, 1: 3, 3: 4}])
    deep = DraftTree(torch.tensor([[0, 1, 3, 2]]), [[0, 0, 1, 3]], [[[1, 3, 4], [2]]], sampled)
    cut = shallow(deep, 2)
    assert (cut.tokens.tolist(), cut.parents, cut.drafts) == ([[0, 1, 3]], [[0, 0, 1]], [[[1, 3], [2]]])
    assert cut.sampled.row_of == [{0: 0, 1: 1}]
    assert cut.sampled.child_of == [{0: 2, 1: 3}]
    assert shallow(deep, 3) is deep


def of(tokens: list[list[int]], probs: Any = None, has_prefix_law: Any = True) -> Any:
    return lambda text: Draft(torch.tensor(tokens), probs, has_prefix_law)


def tree_of(tokens: list[list[int]], parents: Any, **rest: Any) -> Any:
    return lambda text: DraftTree(torch.tensor(tokens), parents, **rest)


LAW = torch.full((1, 2, VOCAB_SIZE), 1 / VOCAB_SIZE)
CERTAIN = torch.nn.functional.one_hot(torch.tensor([[5, 6]]), VOCAB_SIZE).float()


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (of([[5, VOCAB_SIZE]]), "ids of the target, 0 to 30, got 31"),
        (of([[-1, 5]]), "got -1"),
        (of([[5, 6], [5, 6]]), r"shape \(1, drafted tokens\), got torch.int64 \(2, 2\)"),
        (of([[0.5]]), "must be an int64 tensor"),
        (lambda text: Draft([5, 6], None, has_prefix_law=True), "got list"),
        (lambda text: [5, 6], "must return a Draft or a DraftTree, got list"),
        (lambda text: None, "got NoneType"),
        (of([[5, 6]], has_prefix_law=None), "has_prefix_law` must be True or False"),
        (of([[5, 6]], LAW[..., :-1]), r"of shape \(1, 2, 31\)"),
        (of([[5, 6]], LAW[:, :1]), r"of shape \(1, 2, 31\)"),
        (of([[5, 6]], LAW.half()), "must be the float32 probabilities"),
        (of([[5, 6]], LAW.log()), "Are these logits"),
        (of([[5, 6]], LAW * 2), "sum to 1"),
        (of([[5, 6]], LAW * torch.nan), "sum to 1"),
        (of([[6, 5]], CERTAIN), "token of probability 0"),
        (tree_of([[5, 6]], [[0, 2]]), "one before it"),
        (tree_of([[5, 6]], [[0, -1]]), "one before it"),
        (tree_of([[5, 6]], [[0, 0, 1]]), "at most 2 nodes"),
        (tree_of([[5, 6]], [[0], [0]]), "a list for each of the 1 rows"),
        (tree_of([[5, 5]], [[0, 0]]), "differ among siblings"),
        (tree_of([[5, 6]], [[0, 1]], drafts=[[[2]]]), "paths from the anchor"),
        (tree_of([[5, 40]], [[0, 1]]), "got 40"),
        (
            tree_of([[5, 6]], [[0, 0]], sampled=SampledChildren(LAW[0, :1], [{0: 0}], [{0: 2}])),
            "0 on the siblings",
        ),
        (
            tree_of([[5, 6]], [[0, 1]], sampled=SampledChildren(LAW[0, :1], [{0: 0}], [{0: 2}])),
            "a child of each of its nodes",
        ),
        (
            tree_of([[5, 6]], [[0, 1]], sampled=SampledChildren(LAW[0], [{0: 0}], [{0: 1}])),
            "each of the 2 laws once",
        ),
    ],
)
def test_what_is_no_draft_is_refused_before_the_target_sees_it(draft: Any, message: str) -> None:
    target = shared_target(eos_token_id=None)
    with pytest.raises((TypeError, ValueError), match=message):
        hf_specdiff.generate(target, PROMPT, assistant_model=Scripted(draft), do_sample=True, max_new_tokens=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 3}, "`gamma` must be left out with a drafter of your own, got 3"),
        ({"tree_budget": "auto"}, "`tree_budget` must be left out"),
        ({"num_denoising_steps": 2}, "`num_denoising_steps` must be left out"),
        ({"draft_temperature": 0.5}, "`draft_temperature` must be left out"),
        ({"profile": "profile.json"}, "`profile` must be None"),
        ({"draft_shape": "tree"}, "the `draft_shape` 'tree' that was asked for, got 'chain'"),
        ({"draft_shape": "star"}, "`draft_shape` must be one of"),
        ({"acceptance": "self_selection"}, "for drafts of the shape 'chain', got 'self_selection'"),
        ({"acceptance": "block", "draft_shape": "tree"}, "`acceptance` must be one of match, ratio"),
    ],
)
def test_arguments_that_it_cannot_honour_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_specdiff.generate(
            shared_target(), PROMPT, assistant_model=Scripted(chain), do_sample=True, max_new_tokens=9, **arguments
        )


def test_a_rule_that_a_tree_is_not_made_for_is_refused() -> None:
    for rule, draft in (("block", tree), ("self_selection", tree), ("ratio", samples)):
        with pytest.raises(ValueError, match="for drafts of the shape"):
            hf_specdiff.generate(
                shared_target(), PROMPT, assistant_model=Scripted(draft), do_sample=True, max_new_tokens=9, acceptance=rule
            )


@pytest.mark.parametrize("layers", [[3], [-1], [], "all", [True], 2])
def test_layers_that_are_none_are_refused(layers: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="target_layer_ids"):
        hf_specdiff.generate(shared_target(), PROMPT, assistant_model=Scripted(chain, layers), **GREEDY)


def test_what_is_no_drafter_is_refused() -> None:
    for candidate in (object(), shared_target(), lambda text: None):
        with pytest.raises(TypeError, match="an object with `draft` and `target_layer_ids`"):
            hf_specdiff.generate(shared_target(), PROMPT, assistant_model=candidate)


def test_a_drafter_that_is_right_makes_few_rounds() -> None:
    target = shared_target(eos_token_id=None)
    words = target.generate(PROMPT, **GREEDY)
    settings = {**GREEDY, "return_dict_in_generate": True}
    output = hf_specdiff.generate(target, PROMPT, assistant_model=Scripted(right(words)), **settings)
    assert output.speculation.tokens_per_round > 4
    assert not output.sequences.is_inference()

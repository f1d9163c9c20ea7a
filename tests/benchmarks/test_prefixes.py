"""What is expected is the mean over all runs of the rules, by enumeration; and a walk along a text sees what decoding sees."""

from collections.abc import Callable

import pytest
import torch

from hf_specdiff.benchmarks.figures import expected_of
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.prefixes import NUM_PLACES
from hf_specdiff.benchmarks.prefixes import accepted_along
from hf_specdiff.benchmarks.prefixes import expected_accepted
from hf_specdiff.benchmarks.prefixes import parts_of
from hf_specdiff.benchmarks.runner import Along
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.tables import prefix_tables
from hf_specdiff.core.conditional import conditional_tree
from hf_specdiff.core.conditional import sample_drafts
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.rules import make_rule
from hf_specdiff.core.rules import selected_draft
from hf_specdiff.core.sampling import to_probs
from hf_specdiff.core.speculation import SpeculationConfig
from tests.core.test_conditional import EXACT
from tests.core.test_conditional import G
from tests.core.test_conditional import chain
from tests.core.test_conditional import conditionals
from tests.core.test_conditional import scores_of
from tests.core.test_lossless import all_runs

from .conftest import prompts

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SHAPES: dict[str, Callable[[str], Draft | DraftTree]] = {
    "chain": lambda rule: chain(hand_over="own"),
    "tree": lambda rule: conditional_tree(
        conditionals(), SpeculationConfig(G, draft_shape="tree", tree_budget=4, acceptance=rule)
    ),
    "samples": lambda rule: sample_drafts(
        conditionals(), SpeculationConfig(G, draft_shape="samples", num_drafts=2, acceptance=rule)
    ),
}
CASES = [
    ("chain", "match"),
    ("chain", "ratio"),
    ("chain", "block"),
    ("tree", "match"),
    ("tree", "ratio"),
    ("samples", "match"),
    ("samples", "self_selection"),
]


@pytest.fixture
def tables_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_specdiff.core.sampling.to_float", lambda logits: logits.double())


def expectation(call: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the mean of a figure over all runs of a call."""
    runs = all_runs(lambda: torch.tensor([[call()]], dtype=torch.float64), monkeypatch)
    return sum(value * probability for (value,), probability in runs)


def computed(shape: str, rule: str, as_rule: str) -> float:
    draft = SHAPES[shape](rule)
    scores = scores_of(draft)
    if rule == "self_selection" and as_rule == rule:
        assert isinstance(draft, DraftTree)
        draft = selected_draft(draft, scores, set(), do_sample=True)
    return expected_accepted(draft, to_probs(scores.window()), as_rule)


def drawn(shape: str, rule: str) -> float:
    draft = SHAPES[shape](rule)
    return len(make_rule(rule, do_sample=True)(draft, scores_of(draft)).tokens[0]) - 1.0


@pytest.mark.usefixtures("tables_in_float64")
@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_what_is_expected_is_the_mean_over_all_runs_of_the_rule(shape: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = expectation(lambda: drawn(shape, rule), monkeypatch)
    assert expectation(lambda: computed(shape, rule, rule), monkeypatch) == pytest.approx(mean, abs=EXACT)
    if rule in ("ratio", "block"):
        # The control: another rule's expectation is another number.
        assert abs(expectation(lambda: computed(shape, rule, "match"), monkeypatch) - mean) > 1e-3


def test_what_is_drafted_behind_an_end_does_not_count() -> None:
    """Three tokens, the target sure of each: with the second an end token, two of them are the text's."""
    draft = Draft(torch.tensor([[1, 2, 1]]), None, has_prefix_law=True)
    sure = torch.nn.functional.one_hot(torch.tensor([[1, 2, 1, 0]]), 3).double()
    for rule in ("match", "ratio", "block"):
        assert expected_accepted(draft, sure, rule) == 3
        assert expected_accepted(draft, sure, rule, {2}) == 2


def test_a_text_is_cut_into_parts_of_about_one_length() -> None:
    assert parts_of(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert parts_of([5, 6], 16) == [[5], [6]]
    assert parts_of([], 16) == []


@pytest.mark.parametrize("kind", ["features", "tokens"])
def test_a_place_in_the_middle_is_as_it_is_with_the_text_so_far_as_a_prompt(kind: str, models: Models) -> None:
    """Cached keys, features and the drafter's context are those of the text that was walked along."""
    ids = models.tokenizer(prompts(1), return_tensors="pt").input_ids
    written = models.target.generate(ids, do_sample=False, max_new_tokens=2 * NUM_PLACES)[0, ids.shape[1] :].tolist()
    method = ours(kind, "chain", draft_shape="chain", gamma=15, draft_temperature=0, acceptance="match")
    found = accepted_along(method, models, ids, written, **SAMPLED)
    assert found.drafted == [15] * NUM_PLACES
    half = len(written) // 2
    longer = torch.cat([ids, torch.tensor([written[:half]])], dim=1)
    again = accepted_along(method, models, longer, written[half:], **SAMPLED)
    # Half as long a text has as many places, every second of them the longer one's.
    assert again.expected[1::2] == pytest.approx(found.expected[NUM_PLACES // 2 :], abs=1e-4)
    assert max(found.expected) > 1


def test_bench_computes_rows_along_common_texts(models: Models) -> None:
    methods = [Method(PLAIN, {})] + [
        ours("features", name, draft_shape="tree", tree_budget=7, acceptance=name) for name in ("match", "ratio")
    ]
    block = Block("math", prompts(2), methods, max_new_tokens=12, temperature=1.0, num_detailed=0)
    journal = Journal()
    run_block(models, block, journal)
    plain, *rows = rows_of(block, models, journal)
    assert "expected_tokens_per_round" not in plain
    assert [row["num_places"] for row in rows] == [24, 24]
    assert all(1 <= row["expected_tokens_per_round"] <= 8 and row["expected_drafted"] == 7 for row in rows)
    table = prefix_tables(rows)
    assert table.startswith("### math, temperature 1, batch 1: common texts")
    assert table.count("\n| features, ") == 2


def test_means_are_over_places_and_intervals_over_texts() -> None:
    notes = [Along("b", "m", number, [1.0, float(number)], [7, 3]) for number in range(5)]
    found = expected_of([*notes, Along("b", "m", 5, [], [])])
    assert found["expected_tokens_per_round"] == pytest.approx(1 + 15 / 10)
    assert found["expected_drafted"] == 5
    assert 1.5 <= found["expected_low"] < 2.5 < found["expected_high"] <= 3.5
    assert expected_of([]) == {}

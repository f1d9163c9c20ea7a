"""Draft sizes that follow the machine: what is chosen, when nothing is drafted, and what that may cost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.budget import FIRST_PAUSE
from hf_specdiff.core.budget import FIRST_STEPS
from hf_specdiff.core.budget import LEAST_ROOM
from hf_specdiff.core.budget import MOST_ADVANCE
from hf_specdiff.core.budget import Allowance
from hf_specdiff.core.budget import Budget
from hf_specdiff.core.budget import Pauses
from hf_specdiff.core.budget import best_count
from hf_specdiff.core.costs import NUM_CLASSES
from hf_specdiff.core.costs import Calibration
from hf_specdiff.core.costs import Profile
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.core.tree import TreeShape
from hf_specdiff.core.tree import last_children
from tests.conftest import make_drafter
from tests.conftest import plain_text
from tests.conftest import shared_target

from .test_batches import batch_of

FREE = Profile([1, 65], [0.010, 0.0101], drafter_seconds=0.001, allowance=9.0)  # tokens of a pass cost next to nothing
STEEP = Profile([1, 65], [0.010, 0.330], drafter_seconds=0.001, allowance=99.0)  # each costs half of a whole pass
DEAR = Profile([1, 65], [0.010, 0.0101], drafter_seconds=1.0, allowance=1e3)  # the drafter costs a hundred passes
# Two targets on two CPU cores: one of 8 layers with a drafter of 2, and SmolLM2-135M.
SHALLOW = Profile([1, 8, 16, 32, 64], [0.0064, 0.0073, 0.0081, 0.0097, 0.0134], 0.0028)
SMOLLM2 = Profile([1, 8, 16, 32, 64], [0.061, 0.084, 0.092, 0.121, 0.178], 0.010)
# The bundled target with its feature-conditioned drafter: a pass over 1 / 16 / 32 tokens takes 7.2 / 10.4 / 12.4 ms.
BUNDLED = Profile([1, 16, 32, 64], [0.0076, 0.0108, 0.0128, 0.0174], 0.0045, node_seconds=0.00003)
# Texts of that target, word problems and code: for each place the path probabilities of the drafter's tree of 32, per mille and
# likeliest first, and which of its nodes, counted from 1, stand in the text.
GAINS = Path(__file__).parent / "data" / "gains.json"
NEUTRAL = [1.0] * (2 * NUM_CLASSES)
AUTO = {"tree": {"tree_budget": "auto"}, "chain": {"draft_shape": "chain", "gamma": "auto"}}


def chain(values: list[float]) -> TreeShape:
    """Return a chain with these path probabilities."""
    size = len(values)
    return TreeShape(list(range(size)), list(range(1, size + 1)), [0] * size, values)


def outcome_of(values: list[float], num_accepted: int, num_rows: int = 1) -> Outcome:
    """Return a round in which each row drafted a chain and accepted so much of it."""
    tokens = torch.full((num_rows, len(values)), 5)
    draft = Draft(tokens, None, has_prefix_law=True, values=[values] * num_rows)
    path = list(range(num_accepted + 1))
    return Outcome(draft, [[5] * (num_accepted + 1)] * num_rows, [path] * num_rows, [False] * num_rows)


@dataclass
class World:
    """Chains of a drafter that claims one probability a token, and is right with another one.

    Args:
        claimed (`float`): probability of each token, given that those before it are right, as the drafter says.
        true (`list[float]`): what it is, for each stretch of 20 tokens in turn.
        seed (`int`): of the draws.
    """

    claimed: float
    true: list[float]
    seed: int = 0

    def rounds(self, budget: Budget, costs: Profile, num_tokens: int) -> Iterator[tuple[int, float]]:
        """Yield the tokens and seconds of each round, up to so many tokens."""
        random, written = Random(self.seed), 0
        while written < num_tokens:
            is_drafted, values = budget.wants_draft(1), list(accumulate([self.claimed] * 15, mul))
            count = budget.choose([chain(values)]) if is_drafted else 0
            rate = self.true[written // 20 % len(self.true)]
            accepted = next((i for i in range(count) if random.random() > rate), count)
            written += accepted + 1
            yield accepted + 1, costs.round_cost(count + 1, is_drafted=is_drafted)
            budget.observe(outcome_of(values[:count], accepted))

    def speed(self, budget: Budget, costs: Profile, num_tokens: int) -> float:
        """Return tokens per second over plain decoding's."""
        tokens, seconds = (sum(column) for column in zip(*self.rounds(budget, costs, num_tokens), strict=True))
        return tokens / seconds * costs.target_cost(1)


@dataclass
class Recording:
    """Greedy texts with the trees that were drafted at each of their places; every decoding begins at a place of its own.

    Args:
        task (`str`): `"math"` or `"code"`.
    """

    task: str

    def texts(self) -> list[list[tuple[list[float], list[int]]]]:
        """Return path probabilities and standing nodes, place by place."""
        texts = json.loads(GAINS.read_text(encoding="utf-8"))[self.task]
        return [
            [([value / 1000 for value in values], nodes) for values, nodes in text[start:]]
            for text in texts
            for start in range(16)
        ]

    def fixed(self, size: int) -> float:
        """Return the speed over plain decoding's of trees of one size."""
        tokens = seconds = 0.0
        for text in self.texts():
            place = 0
            while place < len(text):
                accepted = sum(node <= size for node in text[place][1])
                tokens, place = tokens + accepted + 1, place + accepted + 1
                seconds += BUNDLED.round_cost(size + 1, is_drafted=True, num_nodes=size)
        return tokens / seconds * BUNDLED.target_cost(1)

    def adaptive(self, profile: Profile) -> float:
        """Return the same of sizes that a budget chooses by a profile; rounds take what `BUNDLED` says in any case."""
        tokens, clock = 0.0, Clock()
        for text in self.texts():
            budget, place = Budget(profile, 1, clock=clock), 0
            while place < len(text):
                is_drafted, (values, nodes) = budget.wants_draft(1), text[place]
                room, least = budget.room, budget.smallest_value
                size = budget.choose([chain([value for value in values[:room] if value > least])]) if is_drafted else 0
                path = [0, *(node for node in nodes if node <= size)]
                tokens, place = tokens + len(path), place + len(path)
                clock.now += BUNDLED.round_cost(size + 1, is_drafted=is_drafted, num_nodes=room)
                draft = Draft(torch.zeros(1, size, dtype=torch.long), None, has_prefix_law=True, values=[values[:size]])
                budget.observe(Outcome(draft, [[5] * len(path)], [path], [place >= len(text)]))
        return tokens / clock.now * BUNDLED.target_cost(1)


class Clock:
    """A clock that shows what rounds have taken so far."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_best_count_is_the_best_of_all() -> None:
    gains, costs = [0.95, 0.9, 0.85, 0.8, 0.75, 0.1], [1.0, 1.5, 1.6, 2.5, 2.6, 4.0, 4.1]
    for rate in (0.1, 0.5, 0.9, 1.5, 3.0):
        worth = [sum(gains[:n]) - rate * cost for n, cost in enumerate(costs)]
        assert best_count(gains, costs, rate) == max(range(7), key=worth.__getitem__)
        assert best_count(gains, costs[:4], rate) == max(range(4), key=worth.__getitem__)
        assert best_count(gains, costs, rate, fewest=2) == max(range(2, 7), key=worth.__getitem__)
    assert best_count([], [1.0], 1.0, fewest=1) == 0


def test_more_is_drafted_where_tokens_are_cheap_and_likely() -> None:
    likely, unlikely = [0.9**i for i in range(1, 31)], [0.3**i for i in range(1, 31)]
    counts = {
        (name, kind): Budget(profile, 1).choose([chain(values)])
        for name, profile in (("free", FREE), ("steep", STEEP))
        for kind, values in (("likely", likely), ("unlikely", unlikely))
    }
    assert counts["free", "likely"] == 30
    assert counts["free", "likely"] > counts["steep", "likely"] > counts["steep", "unlikely"]


def test_the_first_round_is_the_best_by_itself_and_later_ones_what_the_time_brings_elsewhere() -> None:
    budget, values = Budget(STEEP, 1), [0.95, 0.9, 0.85, 0.8, 0.75, 0.1]
    rates = [(1 + sum(values[:n])) / STEEP.round_cost(n + 1, is_drafted=True) for n in range(7)]
    budget.wants_draft(1)
    first = budget.choose([chain(values)])
    assert first == max(range(7), key=rates.__getitem__)
    budget.observe(outcome_of([], 0))
    budget.wants_draft(1)
    costs = [STEEP.round_cost(n + 1, is_drafted=True) for n in range(7)]
    assert budget.choose([chain(values)]) == best_count(values, costs, budget.rate)


def test_nodes_that_are_worth_more_than_they_say_are_not_left_out() -> None:
    plain = Budget(STEEP, 1).smallest_value
    assert Budget(replace(STEEP, factors=[1.0] * 15 + [4.0]), 1).smallest_value == pytest.approx(plain / 4)
    assert Budget(replace(STEEP, factors=[0.1] * 16), 1).smallest_value == pytest.approx(plain)


def test_a_pass_is_filled_to_where_the_next_tile_begins() -> None:
    tiles = Profile([1, 8, 9, 16, 17, 32], [0.010, 0.0101, 0.020, 0.0201, 0.040, 0.0401], 0.001, allowance=9.0)
    values = [0.8**i for i in range(1, 31)]
    assert Budget(tiles, 1).choose([chain(values)]) == 7


def test_a_pass_of_a_few_widths_is_filled_to_the_next_of_them() -> None:
    profile = Profile([1, 33], [0.010, 0.050], 0.001, allowance=9.0)
    values = [0.8**i for i in range(1, 31)]
    assert Budget(profile, 1).choose([chain(values)]) == 5
    assert Budget(profile, 1, widths=[1, 8, 16, 31]).choose([chain(values)]) == 7
    assert Budget(profile, 2, widths=[4, 8]).plain_seconds == profile.target_cost(8)


def test_a_drawn_child_is_worth_what_it_has_been_and_its_sibling_by_rank_again() -> None:
    factors = list(NEUTRAL)
    factors[NUM_CLASSES + 1] = 2.0  # drawn, probability between 1/4 and 1/2
    budget = Budget(replace(FREE, factors=factors), 1, draws_children=True)
    # The second node takes the drawing over from the first, which then counts by its rank.
    assert budget.gains(TreeShape([0, 0], [1, 1], [0, 1], [0.4, 0.3])) == pytest.approx([0.8, 0.6 + 0.4 - 0.8])
    assert Budget(budget.profile, 1).gains(TreeShape([0, 0], [1, 1], [0, 1], [0.4, 0.3])) == pytest.approx([0.4, 0.3])


def test_a_copy_that_is_sure_enough_saves_the_pass() -> None:
    costs = Profile([1, 65], [0.010, 0.012], drafter_seconds=0.003)
    budget, sure, unsure = Budget(costs, 1), [[0.999] * 8], [[0.6, 0.3]]
    budget.wants_draft(1)
    assert budget.choose_copied(sure) == 0  # nothing is known of drafts yet
    for _ in range(20):
        budget.wants_draft(1)
        budget.choose([chain([0.9] * 5)])
        budget.observe(outcome_of([0.9] * 5, 3))
    assert budget.wants_draft(1)
    assert budget.choose_copied(unsure) == 0
    assert budget.choose_copied([]) == 0
    # A draft brings three tokens more, and a pass costs what one brings: worth saving where the copy stands in most cases.
    rate = budget.rate
    assert budget.choose_copied(sure) == 8
    budget.observe(outcome_of([0.999] * 8, 8))
    assert budget.rate == rate  # of drafted rounds
    assert budget.wants_draft(1)
    assert budget.choose_copied([[0.7]]) == int(rate * costs.drafter_seconds > 0.3 * 3)
    dear = Budget(Profile([1, 65], [0.010, 0.012], drafter_seconds=1.0), 2)
    assert not dear.wants_draft(2)
    assert dear.choose_copied([[0.9] * 4, [0.5]]) == 4  # without a draft a copy only has to beat plain decoding
    assert dear.choose_copied([[0.001], [0.001]]) == 0


def test_pauses_grow_while_drafting_does_not_pay() -> None:
    pauses, tried = Pauses(), []
    for step in range(40):
        if not pauses.is_on():
            tried.append(step)
            pauses.judge(1.0, 2.0, plain_rate=1.0)
            pauses.observe(1.0, 2.0)
    assert tried == [0, FIRST_PAUSE + 1, 3 * FIRST_PAUSE + 2, 7 * FIRST_PAUSE + 3]


def test_one_place_that_is_hard_to_foresee_is_no_reason_to_pause() -> None:
    pauses = Pauses()
    for _ in range(3):
        pauses.judge(8.0, 2.0, plain_rate=1.0)
        pauses.observe(8.0, 2.0)
    paused = []
    for _ in range(30):
        paused.append(pauses.is_on())
        if not paused[-1]:
            pauses.judge(1.0, 2.0, plain_rate=1.0)
            pauses.observe(1.0, 2.0)
    assert not any(paused[:4])
    assert any(paused)  # but many of them are


def test_what_drafting_may_lose_is_what_it_has_saved_and_a_share_of_the_time() -> None:
    allowance = Allowance(1.0)
    allowance.settle(saved=-0.5, spent=1.5)
    assert allowance.steps == pytest.approx(0.5 + 0.015)
    allowance.promise(3.0)
    allowance.settle(saved=2.0, spent=1.0)
    assert allowance.steps == pytest.approx(2.5 + 0.015 + 0.02)
    # A drafter that nothing is known of is lent what it promises, once.
    for promised, advance in ((-1.0, 0.0), (0.5, 0.5), (9.0, MOST_ADVANCE)):
        unknown = Allowance(None)
        unknown.promise(promised)
        unknown.promise(promised)
        assert unknown.steps == pytest.approx(FIRST_STEPS + advance)


@pytest.mark.parametrize("calls", ["first", "later"])
@pytest.mark.parametrize("dearer", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("claimed", [0.0, 0.1])
@pytest.mark.parametrize("costs", [SHALLOW, SMOLLM2], ids=["shallow", "smollm2"])
def test_an_untrained_drafter_costs_three_percent_at_most(costs: Profile, claimed: float, dearer: float, calls: str) -> None:
    """On answers of 40 tokens, whatever its passes cost; less on longer ones."""
    costs = replace(costs, drafter_seconds=dearer * costs.drafter_seconds)
    profile = costs if calls == "first" else replace(costs, allowance=FIRST_STEPS, factors=[0.7] * len(NEUTRAL))
    world = World(claimed, [0.0])
    assert world.speed(Budget(profile, 1), costs, 39) >= 0.97
    assert world.speed(Budget(profile, 1), costs, 1000) >= 0.985


@pytest.mark.parametrize("task", ["math", "code"])
def test_no_fixed_size_is_clearly_better(task: str) -> None:
    """On what a real drafter promised and a real target wrote; the best size is another one for each task."""
    recording = Recording(task)
    best = max(map(recording.fixed, (8, 15, 24, 32)))
    assert recording.adaptive(BUNDLED) >= 0.97 * best
    # Who takes a token of the target's pass for ten times as dear drafts too little.
    misled = replace(BUNDLED, target_seconds=[0.0076, 0.0396, 0.0596, 0.1056])
    assert recording.adaptive(misled) < 0.9 * best


def test_a_tree_is_made_little_larger_than_what_is_verified_of_it() -> None:
    budget, rooms = Budget(replace(BUNDLED, allowance=9.0), 1), []
    for values in [[0.99] * 64] * 4 + [[0.001]] * 3:
        budget.wants_draft(1)
        rooms.append(budget.room)
        budget.choose([chain(values[: budget.room])])
    assert rooms[0] == LEAST_ROOM
    assert rooms[:5] == sorted(set(rooms[:5]))  # it grows while all of it is taken
    assert rooms[-1] == LEAST_ROOM


def test_a_dearer_node_is_taken_more_rarely() -> None:
    values = [0.85**i for i in range(1, 31)]
    cheap, dear = (replace(BUNDLED, allowance=9.0, node_seconds=seconds) for seconds in (0.0, 0.001))
    assert Budget(cheap, 1).choose([chain(values)]) > Budget(dear, 1).choose([chain(values)])
    drawn = replace(cheap, drawn_seconds=0.001)
    counts = [Budget(drawn, 1, draws_children=draws).choose([chain(values)]) for draws in (False, True)]
    assert counts[0] > counts[1]


def test_a_drafter_that_was_published_with_a_measured_size_need_not_wait() -> None:
    dear = replace(BUNDLED, drafter_seconds=0.010)  # more than a plain step
    assert not Budget(dear, 1).wants_draft(1)
    assert Budget(dear, 1, is_vouched_for=True).wants_draft(1)
    known = replace(dear, allowance=FIRST_STEPS)  # it has not kept its promise
    assert not Budget(known, 1, is_vouched_for=True).wants_draft(1)


@pytest.mark.parametrize("costs", [SHALLOW, SMOLLM2], ids=["shallow", "smollm2"])
def test_a_drafter_that_is_sure_of_nonsense_costs_little_more(costs: Profile) -> None:
    world = World(0.95, [0.0])
    # Once the advance, and two percent.
    assert world.speed(Budget(costs, 1), costs, 39) >= 0.92
    later = replace(costs, allowance=FIRST_STEPS)
    assert world.speed(Budget(later, 1), costs, 39) >= 0.96
    assert world.speed(Budget(later, 1), costs, 1000) >= 0.975


@pytest.mark.parametrize("costs", [SHALLOW, SMOLLM2], ids=["shallow", "smollm2"])
@pytest.mark.parametrize(("true", "kept"), [(0.6, 0.95), (0.8, 0.995), (0.95, 0.995)])
def test_a_drafter_that_is_worth_it_loses_next_to_nothing(true: float, kept: float, costs: Profile) -> None:
    """Against a budget without any bound, over many texts that a pair is new to."""
    worlds = [World(true, [true], seed) for seed in range(40)]
    free = [1 / world.speed(Budget(replace(costs, allowance=1e9), 1), costs, 120) for world in worlds]
    bound = [1 / world.speed(Budget(costs, 1), costs, 120) for world in worlds]
    assert sum(free) / sum(bound) >= kept


def test_a_drafter_that_failed_is_tried_again_and_can_recover() -> None:
    """Also where an earlier call has left so little trust that no node seems worth its cost."""
    profile = Profile([1, 65], [0.010, 0.090], 0.003, factors=[0.31] * len(NEUTRAL), allowance=FIRST_STEPS)
    budget = Budget(profile, 1)
    nonsense = list(World(0.9, [0.0]).rounds(budget, profile, 400))
    recovered = list(World(0.9, [1.0]).rounds(budget, profile, 4000))
    assert max(tokens for tokens, _ in nonsense) == 1
    late = recovered[-100:]
    assert sum(tokens for tokens, _ in late) / sum(seconds for _, seconds in late) > 3 / profile.target_cost(1)


def test_a_text_that_changes_is_followed() -> None:
    """Stretches that are easy and stretches that cannot be foreseen at all."""
    world = World(0.9, [0.95, 0.0])
    assert world.speed(Budget(SMOLLM2, 1), SMOLLM2, 400) > 1.3


def test_rounds_correct_what_a_profile_says() -> None:
    """A drafter pass costs ten times as much as was measured: with a clock the budget sees that it does not pay."""
    costs, world = replace(SMOLLM2, drafter_seconds=0.1), World(0.5, [0.5])
    speeds = []
    for has_clock in (False, True):
        clock, tokens = Clock(), 0
        budget = Budget(replace(SMOLLM2, allowance=FIRST_STEPS), 1, clock=clock if has_clock else None)
        for new, taken in world.rounds(budget, costs, 1000):
            clock.now += taken
            tokens += new
        speeds.append(tokens / clock.now * costs.target_cost(1))
    assert speeds[0] < 0.8
    assert speeds[1] > 0.93


def test_without_a_clock_nothing_is_compared() -> None:
    budget = Budget(SMOLLM2, 1)
    list(World(0.9, [0.9]).rounds(budget, SMOLLM2, 100))
    assert budget.pace.ratio(is_drafted=True) == budget.pace.ratio(is_drafted=False) == 1


def test_the_rate_to_beat_is_that_of_the_rows_that_are_left() -> None:
    steep = Profile([1, 65], [0.0057, 0.0133], drafter_seconds=0.002, allowance=99.0)
    values = [0.8**i for i in range(1, 16)]
    shrunk = Budget(steep, 16)
    for _ in range(3):
        shrunk.wants_draft(16)
        shrunk.choose([chain(values)] * 16)
        shrunk.observe(outcome_of(values[:4], 4, num_rows=16))
    shrunk.wants_draft(1)
    alone = Budget(steep, 1)
    alone.calibration = shrunk.calibration
    assert shrunk.choose([chain(values)]) == alone.choose([chain(values)])


def test_what_stands_of_unequal_rows() -> None:
    tree = DraftTree(torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]), [[0, 0, 2, 3], [0, 1]])
    outcome = Outcome(tree, [[6, 7, 3], [4]], [[0, 2, 3], [0]], [False, False])
    assert outcome.stands() == [[False, True, True, False], [False, False]]
    chains = Draft(torch.tensor([[1, 2, 3], [4, 5, 6]]), None, has_prefix_law=True)
    outcome = Outcome(chains, [[1, 2, 9], [4, 5, 6, 7]], [[0, 1, 2], [0, 1, 2, 3]], [False, False])
    assert outcome.stands() == [[True, True, False], [True] * 3]
    assert last_children([0, 0, 2, 3]) == [False, True, True, True]
    assert last_children([0, 1]) == [True, True]


def test_a_row_that_has_ended_teaches_nothing() -> None:
    """What was cut off with its end may have been accepted."""
    budget = Budget(FREE, 2)
    chains = Draft(torch.tensor([[1, 2], [4, 5]]), None, has_prefix_law=True, values=[[0.9, 0.8], [0.9, 0.8]])
    budget.observe(Outcome(chains, [[1], [4]], [[0], [0]], [True, True]))
    assert budget.calibration.factors == NEUTRAL
    budget.observe(Outcome(chains, [[1], [4]], [[0], [0]], [True, False]))
    assert budget.calibration.factors != NEUTRAL


@pytest.mark.parametrize("shape", AUTO)
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_outcome_that_is_learnt_from_is_what_was_accepted(
    shape: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch, drafter: SpecDiffDrafter
) -> None:
    target, (ids, mask) = shared_target(2), batch_of([6])
    learnt: list[int] = []
    learn = Calibration.learn

    def recording(self: Calibration, values: list[float], drawn: list[bool], outcome: list[bool]) -> None:
        assert len(values) == len(drawn) == len(outcome)
        assert any(drawn) == bool(do_sample and shape == "tree" and values)
        learnt.append(sum(outcome))
        learn(self, values, drawn, outcome)

    monkeypatch.setattr(Calibration, "learn", recording)
    gains, kinds = Budget.gains, set()

    def noting(self: Budget, shape: TreeShape) -> list[float]:
        kinds.add(self.draws_children)
        return gains(self, shape)

    monkeypatch.setattr(Budget, "gains", noting)
    torch.manual_seed(0)
    settings = {"do_sample": do_sample, "max_new_tokens": 40, "attention_mask": mask, "return_dict_in_generate": True}
    rule = {"acceptance": "ratio", "draft_shape": shape} if do_sample else {"draft_shape": shape}
    output = hf_specdiff.generate(target, ids, assistant_model=drafter, **(settings | AUTO[shape] | rule), profile=FREE)
    stats = output.speculation
    accepted = [row[0] for row, size in zip(stats.num_accepted, stats.num_drafted, strict=True) if size[0] > 0]
    # The last round says nothing: what it accepted may have been cut off with the end of the text.
    assert learnt == accepted[: len(learnt)]
    assert len(learnt) >= max(len(accepted) - 1, 1)
    assert kinds == {do_sample and shape == "tree"}


@pytest.mark.parametrize("profile", [FREE, STEEP, DEAR], ids=["free", "steep", "dear"])
@pytest.mark.parametrize("shape", AUTO)
@pytest.mark.parametrize("lengths", [[5], [4, 7, 2]], ids=["one", "batch"])
def test_greedy_text_stays_the_targets(shape: str, lengths: list[int], profile: Profile, drafter: SpecDiffDrafter) -> None:
    """Also after pauses, when the drafter has to read what it has missed."""
    for seed in range(2):
        target = shared_target(seed)
        ids, mask = batch_of(lengths, seed)
        settings = {"max_new_tokens": 30, "attention_mask": mask}
        more = {"do_sample": False, "profile": profile, "return_dict_in_generate": True, **settings, **AUTO[shape]}
        # With a given profile nothing depends on a clock.
        results = [hf_specdiff.generate(target, ids, assistant_model=drafter, **more) for _ in range(2 - seed)]
        assert torch.equal(results[0].sequences, plain_text(target, ids, **settings))
        assert results[0].speculation.num_drafted == results[-1].speculation.num_drafted


def test_features_of_paused_rounds_reach_the_drafter() -> None:
    """After a pause the drafter's context is what it would have been without one."""
    target, drafter = shared_target(0, eos_token_id=None), make_drafter([0, 2], eos_token_id=None)
    contexts = []
    network_call = SpecDiffDrafter.forward

    def recording(self: SpecDiffDrafter, *args: object, **kwargs: object) -> object:
        output = network_call(self, *args, **kwargs)
        contexts.append(output.past_key_values.layers[0].keys[:, :, : -kwargs["noise_embeds"].shape[1]].clone())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecDiffDrafter, "forward", recording)
        settings = {"do_sample": False, "max_new_tokens": 24, "draft_shape": "chain"}
        ids, _ = batch_of([6])
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, gamma="auto", profile=DEAR)
        paused = {context.shape[2]: context for context in contexts}
        contexts.clear()
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings)
        steady = {context.shape[2]: context for context in contexts}
    common = sorted(paused.keys() & steady.keys())
    assert len(common) >= 2
    for length in common:
        torch.testing.assert_close(paused[length], steady[length], atol=1e-5, rtol=1e-4)


def test_bad_profiles_and_bad_autos_are_refused(
    tmp_path: Path, tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    cases = [
        ({"tree_budget": "auto", "profile": tmp_path / "none.json"}, "`profile` must be a Profile or a file"),
        ({"tree_budget": "auto", "profile": {"sizes": 1}}, "`profile` must be a Profile or a file"),
        ({"profile": FREE}, "`profile` must be None unless"),
        ({"gamma": "auto", "draft_shape": "samples"}, "must be integers with"),
        ({"gamma": "auto", "draft_shape": "chain", "num_denoising_steps": 2}, "must be integers with"),
        ({"gamma": "all"}, "or 'auto', got 'all'"),
        ({"tree_budget": "most"}, "or 'auto', got 'most'"),
    ]
    for kwargs, words in cases:
        with pytest.raises(ValueError, match=words):
            hf_specdiff.generate(tiny_target, prompt, assistant_model=token_drafter, max_new_tokens=4, **kwargs)


def test_without_arguments_a_drafter_that_names_no_size_follows_the_machine(
    tiny_target: LlamaForCausalLM, prompt: torch.Tensor, tmp_path: Path
) -> None:
    drafter, settings = make_drafter(), {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    drafter.generation_config.tree_budget = None
    result = hf_specdiff.generate(tiny_target, prompt, assistant_model=drafter, **settings, profile=DEAR)
    assert [0] in result.speculation.num_drafted
    with isolated_profiles(tmp_path):
        plain = hf_specdiff.generate(tiny_target, prompt, assistant_model=drafter, **settings)
    assert torch.equal(plain.sequences, result.sequences)
    assert len(list((tmp_path / "profiles").iterdir())) == 1


@pytest.mark.parametrize("arguments", [{"gamma": "auto"}, {"tree_budget": "auto"}], ids=["gamma", "tree_budget"])
def test_either_auto_makes_any_shape_adaptive(
    arguments: dict, tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    for shape in ("auto", "tree", "chain"):
        settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "draft_shape": shape}
        result = hf_specdiff.generate(tiny_target, prompt, assistant_model=token_drafter, **settings, **arguments, profile=DEAR)
        assert [0] in result.speculation.num_drafted

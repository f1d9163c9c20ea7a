"""Every rule is lossless: its exact output law, by enumeration in float64, is the target's; and controls that must fail.

The laws are built from the very functions that decoding draws from. Nothing here is sampled, so no test can fail by chance.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from hf_specdiff.core.acceptance import accept_by_block
from hf_specdiff.core.acceptance import accept_by_match
from hf_specdiff.core.acceptance import accept_by_ratio
from hf_specdiff.core.acceptance import block_bonus_law
from hf_specdiff.core.acceptance import block_num_accepted_law
from hf_specdiff.core.acceptance import ratio_bonus_law
from hf_specdiff.core.acceptance import ratio_num_accepted_law
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.sampling import residual

TOLERANCE = 1e-12
Text = tuple[int, ...]
# A rule's outcomes for one draft: how many tokens stand, the law of the bonus token, and the probability of both.
Outcomes = list[tuple[int, torch.Tensor, float]]
RuleLaw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Outcomes]


class TableTarget:
    """A target whose law of the next token depends on all tokens before it, drawn once from a seed; float64."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size = vocab_size
        self.seed = seed
        self.rows: dict[Text, torch.Tensor] = {}

    def law(self, prefix: Text) -> torch.Tensor:
        if prefix not in self.rows:
            generator = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
            logits = 2 * torch.randn(self.vocab_size, generator=generator, dtype=torch.float64)
            self.rows[prefix] = logits.softmax(0)
        return self.rows[prefix]

    def rows_along(self, draft: Text) -> torch.Tensor:
        """Return p `(1, G + 1, V)` along a draft, as one target pass would."""
        return torch.stack([self.law(draft[:i]) for i in range(len(draft) + 1)])[None]

    def probability(self, text: Text) -> float:
        product = 1.0
        for i, token in enumerate(text):
            product *= float(self.law(text[:i])[token])
        return product


def ratio_outcomes(tokens: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> Outcomes:
    law = ratio_num_accepted_law(tokens, q, p)[0]
    return [(k, ratio_bonus_law(q, p, torch.tensor([k]))[0], float(law[k])) for k in range(len(law))]


def block_outcomes(tokens: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> Outcomes:
    law = block_num_accepted_law(tokens, q, p)[0]
    return [(k, block_bonus_law(tokens, q, p, torch.tensor([k]))[0], float(law[k])) for k in range(len(law))]


def match_outcomes(tokens: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> Outcomes:
    """Enumerate the target's own tokens, all rows of them, and let the production rule decide."""
    outcomes = []
    vocab_size, gamma = p.shape[2], tokens.shape[1]
    for drawn in itertools.product(range(vocab_size), repeat=gamma + 1):
        weight = float(torch.stack([p[0, i, token] for i, token in enumerate(drawn)]).prod())
        acceptance = accept_by_match(tokens, torch.tensor([drawn]))
        bonus = torch.nn.functional.one_hot(torch.tensor(acceptance.tokens[0][-1]), vocab_size).double()
        outcomes.append((acceptance.num_accepted[0], bonus, weight))
    return outcomes


RULES: dict[str, RuleLaw] = {"ratio": ratio_outcomes, "block": block_outcomes, "match": match_outcomes}

# A drafting scheme lists every draft it can make: its tokens, the laws they are said to be drawn from, its probability.
Drafts = list[tuple[Text, torch.Tensor, float]]


def one_pass_drafts(vocab_size: int, gamma: int, seed: int) -> Drafts:
    """Independent marginals of one pass."""
    generator = torch.Generator().manual_seed(seed + 1000)
    q = (2 * torch.randn(gamma, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)
    return [
        (draft, q, float(torch.stack([q[i, token] for i, token in enumerate(draft)]).prod()))
        for draft in itertools.product(range(vocab_size), repeat=gamma)
    ]


def left_to_right_drafts(vocab_size: int, gamma: int, seed: int) -> Drafts:
    """Each token drawn given the ones to its left."""
    drafter = TableTarget(vocab_size, seed + 2000)
    return [
        (draft, drafter.rows_along(draft)[0, :-1], drafter.probability(draft))
        for draft in itertools.product(range(vocab_size), repeat=gamma)
    ]


def right_to_left_drafts(vocab_size: int, gamma: int, seed: int) -> Drafts:
    """Each token drawn given the ones to its right, and reported with the law it was really drawn from."""
    return [(draft[::-1], laws.flip(0), weight) for draft, laws, weight in left_to_right_drafts(vocab_size, gamma, seed + 3000)]


def deterministic_drafts(vocab_size: int, gamma: int, seed: int) -> Drafts:
    """One draft, a function of the committed text; its law is a point mass."""
    generator = torch.Generator().manual_seed(seed + 4000)
    draft = torch.randint(vocab_size, (gamma,), generator=generator)
    return [(tuple(draft.tolist()), torch.nn.functional.one_hot(draft, vocab_size).double(), 1.0)]


def narrow_drafts(vocab_size: int, gamma: int, seed: int) -> Drafts:
    """Drafts of a drafter that does not know the last token, in the target's width."""
    drafts = one_pass_drafts(vocab_size - 1, gamma, seed)
    return [
        (draft, Draft(torch.tensor([draft]), q[None], has_prefix_law=True).dense_probs(vocab_size)[0], weight)
        for draft, q, weight in drafts
    ]


def output_law(target: TableTarget, drafts: Drafts, rule: RuleLaw, length: int) -> dict[Text, float]:
    """Return the law of the first `length` tokens: one round, then the target's own tokens until the text is long enough."""
    law: dict[Text, float] = dict.fromkeys(itertools.product(range(target.vocab_size), repeat=length), 0.0)
    for draft, q, draft_weight in drafts:
        outcomes = rule(torch.tensor([draft]), q[None], target.rows_along(draft))
        for num_accepted, bonus, weight in outcomes:
            for token in range(target.vocab_size):
                text = (*draft[:num_accepted], token)
                mass = draft_weight * weight * float(bonus[token])
                if mass > 0:
                    _spread(target, text, mass, length, law)
    return law


def _spread(target: TableTarget, text: Text, mass: float, length: int, law: dict[Text, float]) -> None:
    """Add `mass` to every text of the wanted length that begins with `text`, by the target's law."""
    if len(text) >= length:
        law[text[:length]] += mass
        return
    for token in range(target.vocab_size):
        _spread(target, (*text, token), mass * float(target.law(text)[token]), length, law)


def distance_from_target(target: TableTarget, drafts: Drafts, rule: RuleLaw, gamma: int) -> float:
    """Return the total variation between the output law of gamma + 1 tokens and the target's."""
    law = output_law(target, drafts, rule, gamma + 1)
    return 0.5 * sum(abs(mass - target.probability(text)) for text, mass in law.items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "gamma"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("make_drafts", [one_pass_drafts, left_to_right_drafts, deterministic_drafts])
@pytest.mark.parametrize("rule", ["ratio", "block", "match"])
def test_rule_preserves_target_law(
    rule: str, make_drafts: Callable[[int, int, int], Drafts], vocab_size: int, gamma: int, seed: int
) -> None:
    target = TableTarget(vocab_size, seed)
    assert distance_from_target(target, make_drafts(vocab_size, gamma, seed), RULES[rule], gamma) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "gamma"), [(2, 1), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("rule", ["ratio", "block", "match"])
def test_a_drafter_that_knows_fewer_tokens_preserves_the_target_law(rule: str, vocab_size: int, gamma: int, seed: int) -> None:
    """Its laws are padded with zeros, which is the truth: it never drafts what it does not know."""
    target = TableTarget(vocab_size, seed)
    drafts = narrow_drafts(vocab_size, gamma, seed)
    assert drafts[0][1].shape == (gamma, vocab_size)
    assert distance_from_target(target, drafts, RULES[rule], gamma) < TOLERANCE


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_control_laws_padded_with_anything_but_zeros_break(rule: str) -> None:
    drafts = [(draft, (q + 0.1) / (q + 0.1).sum(-1, keepdim=True), weight) for draft, q, weight in narrow_drafts(3, 2, 5)]
    assert distance_from_target(TableTarget(3, 5), drafts, RULES[rule], 2) > 1e-2


@pytest.mark.parametrize("gamma", [2, 3])
def test_match_preserves_target_law_for_drafts_drawn_out_of_order(gamma: int) -> None:
    assert distance_from_target(TableTarget(2, 0), right_to_left_drafts(2, gamma, 0), match_outcomes, gamma) < TOLERANCE


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_control_drafts_drawn_out_of_order_break_the_law_of(rule: str) -> None:
    """The worked example: right token first, left drawn looking at it. Ratio and block must miss by a lot, match by nothing."""
    target = TableTarget(2, 0)
    target.rows = {
        (): torch.tensor([0.5, 0.5], dtype=torch.float64),
        (0,): torch.tensor([0.7, 0.3], dtype=torch.float64),
        (1,): torch.tensor([0.2, 0.8], dtype=torch.float64),
    }
    left_given_right = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    right = torch.tensor([0.5, 0.5], dtype=torch.float64)
    drafts = [
        ((x, y), torch.stack([left_given_right[y], right]), float(right[y] * left_given_right[y, x]))
        for x, y in itertools.product(range(2), repeat=2)
    ]
    law = output_law(target, drafts, RULES[rule], 2)
    distance = 0.5 * sum(abs(mass - target.probability(text)) for text, mass in law.items())
    assert distance > 0.05
    if rule == "ratio":
        assert distance == pytest.approx(0.1, abs=1e-12)
    assert distance_from_target(target, drafts, match_outcomes, 1) < TOLERANCE


@pytest.mark.parametrize("rule", ["ratio", "block"])
@pytest.mark.parametrize("damage", ["scaled", "truncated", "sharpened", "bfloat16"])
def test_control_a_law_changed_after_drawing_breaks(rule: str, damage: str) -> None:
    """Tokens drawn from q but reported with another law must be seen: this is the field's recurring bug."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "scaled": lambda q: 0.8 * q,
        "truncated": lambda q: torch.where(q < q.max(-1, keepdim=True).values, q * 0.5, q),
        "sharpened": lambda q: q.square() / q.square().sum(-1, keepdim=True),
        "bfloat16": lambda q: q.bfloat16().double(),
    }
    target = TableTarget(3, 5)
    drafts = [(draft, changes[damage](q), weight) for draft, q, weight in one_pass_drafts(3, 2, 5)]
    limit = 1e-4 if damage == "bfloat16" else 1e-2
    assert distance_from_target(target, drafts, RULES[rule], 2) > limit


def test_control_argmax_drafts_with_their_soft_law_break() -> None:
    """A deterministic draft has a point mass for a law, whatever the drafter's softmax says."""
    target = TableTarget(3, 1)
    draft, q, _ = max(one_pass_drafts(3, 2, 1), key=lambda item: item[2])
    assert distance_from_target(target, [(draft, q, 1.0)], ratio_outcomes, 2) > 0.05
    point = torch.nn.functional.one_hot(torch.tensor(draft), 3).double()
    assert distance_from_target(target, [(draft, point, 1.0)], ratio_outcomes, 2) < TOLERANCE


@pytest.mark.parametrize("seed", range(5))
def test_block_accepts_at_least_as_much_as_ratio_and_ratio_as_match(seed: int) -> None:
    """The order of the rules in expectation, on drafts that are drawn."""
    target, drafts = TableTarget(3, seed), one_pass_drafts(3, 3, seed)
    expected = {"ratio": 0.0, "block": 0.0, "match": 0.0}
    for draft, q, weight in drafts:
        p = target.rows_along(draft)
        for rule in ("ratio", "block"):
            expected[rule] += weight * sum(k * mass for k, _, mass in RULES[rule](torch.tensor([draft]), q[None], p))
        expected["match"] += weight * sum(
            float(torch.stack([p[0, i, draft[i]] for i in range(k)]).prod()) for k in range(1, len(draft) + 1)
        )
    assert expected["block"] >= expected["ratio"] - TOLERANCE
    assert expected["ratio"] >= expected["match"] - TOLERANCE


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.integers(0, 6),
    vocab_size=st.integers(2, 12),
    sharpness=st.floats(0.0, 60.0),
    same=st.booleans(),
)
def test_num_accepted_laws_are_laws_in_float32(seed: int, gamma: int, vocab_size: int, sharpness: float, same: bool) -> None:
    """No rounding may make a probability negative or NaN, also where p equals q or both are nearly point masses."""
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(2, gamma + 1, vocab_size, generator=generator)).softmax(-1)
    q = p[:, :-1].clone() if same else (sharpness * torch.randn(2, gamma, vocab_size, generator=generator)).softmax(-1)
    tokens = (
        torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(2, gamma)
        if gamma
        else torch.zeros(2, 0, dtype=torch.long)
    )
    for law in (ratio_num_accepted_law(tokens, q, p), block_num_accepted_law(tokens, q, p)):
        assert bool((law >= 0).all())
        torch.testing.assert_close(law.sum(1), torch.ones(2), atol=1e-4, rtol=0)
    draft = Draft(tokens, q, has_prefix_law=True)
    for accept in (accept_by_ratio, accept_by_block):
        acceptance = accept(draft, p)
        assert max(acceptance.num_accepted) <= gamma
        if same:
            assert acceptance.num_accepted == [gamma, gamma]


def test_accepting_draws_from_the_laws_that_are_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public rules add nothing to the two laws but the draw."""
    target, (draft, q, _) = TableTarget(3, 2), one_pass_drafts(3, 2, 2)[4]
    p, tokens = target.rows_along(draft), torch.tensor([draft])
    seen: list[torch.Tensor] = []

    def record(probs: torch.Tensor) -> torch.Tensor:
        seen.append(probs)
        return probs.argmax(-1)

    monkeypatch.setattr("hf_specdiff.core.acceptance.draw", record)
    for accept, outcomes in ((accept_by_ratio, ratio_outcomes), (accept_by_block, block_outcomes)):
        seen.clear()
        acceptance = accept(Draft(tokens, q[None], has_prefix_law=True), p)
        expected = outcomes(tokens, q[None], p)
        assert seen[0][0].tolist() == pytest.approx([mass for _, _, mass in expected])
        torch.testing.assert_close(seen[1][0], expected[acceptance.num_accepted[0]][1])


def test_match_counts_the_run_from_the_start() -> None:
    draft = torch.tensor([[4, 5, 6], [4, 5, 6], [4, 5, 6]])
    target_tokens = torch.tensor([[4, 5, 6, 9], [4, 0, 6, 9], [0, 5, 6, 9]])
    acceptance = accept_by_match(draft, target_tokens)
    assert acceptance.tokens == [[4, 5, 6, 9], [4, 0], [0]]
    assert acceptance.nodes == [[0, 1, 2, 3], [0, 1], [0]]
    assert acceptance.num_accepted == [3, 1, 0]


def test_residual_of_equal_laws_is_the_law_itself() -> None:
    """A rejection that has probability 0 but for rounding must not draw from NaN."""
    p = torch.tensor([[0.25, 0.75]])
    assert torch.equal(residual(p, p.clone()), p)
    torch.testing.assert_close(residual(p, torch.tensor([[0.5, 0.5]])), torch.tensor([[0.0, 1.0]]))


def stopped(drafts: Drafts, end: int, *, keeps_it: bool) -> Drafts:
    """Stop every draft at the first end token in it: behind the token, or in front of it."""
    cut = []
    for draft, q, weight in drafts:
        count = draft.index(end) + keeps_it if end in draft else len(draft)
        cut.append((draft[:count], q[:count], weight))
    return cut


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "gamma"), [(2, 1), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("make_drafts", [one_pass_drafts, left_to_right_drafts, deterministic_drafts])
@pytest.mark.parametrize("rule", ["ratio", "block", "match"])
def test_drafts_that_stop_behind_an_end_token_preserve_the_target_law(
    rule: str, make_drafts: Callable[[int, int, int], Drafts], vocab_size: int, gamma: int, seed: int
) -> None:
    """How far a draft reaches may hang on the tokens up to there."""
    target = TableTarget(vocab_size, seed)
    drafts = stopped(make_drafts(vocab_size, gamma, seed), 0, keeps_it=True)
    assert distance_from_target(target, drafts, RULES[rule], gamma) < TOLERANCE


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_control_drafts_that_stop_in_front_of_an_end_token_break_the_law(rule: str) -> None:
    """Then the tokens that are left were not drawn from the laws that are told of them: an end token was never among them."""
    drafts = stopped(one_pass_drafts(3, 2, 5), 0, keeps_it=False)
    assert distance_from_target(TableTarget(3, 5), drafts, RULES[rule], 2) > 1e-2

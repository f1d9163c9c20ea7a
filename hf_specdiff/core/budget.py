"""How much to draft: as many nodes as pay on this machine, given what a pass costs and what the drafter is worth.

Letters: B batch. Knows costs and probabilities, and no model. A clock is read only where one is given, so that a run with a
given profile is reproducible. Nothing here can change what is generated: a choice reads what became of earlier drafts and this
round's probabilities, and is made before this round's tokens are drawn.
"""

from collections import deque
from collections.abc import Callable
from itertools import accumulate
from itertools import zip_longest

from .costs import Calibration
from .costs import Pace
from .costs import Profile
from .draft import DraftTree
from .draft import Outcome
from .tree import COPIED
from .tree import TreeShape
from .tree import last_children

# Memory, per round: of the rate of late, and of whether drafting pays at present.
DECAY = 0.97
RECENT_DECAY = 0.9
# A text's first rounds say little, and a draft that is too small costs more than one that is too large: the rate of late counts
# beside that of this number of plain rounds.
PLAIN_ROUNDS = 8
# Trees are made with a quarter more nodes than the larger of the last two drafts had, and a few at least.
LEAST_ROOM = 16
ROOM_SHARE = 1.25
ROOM_ROUNDS = 2
# Plain rounds between tries, where drafting does not pay.
FIRST_PAUSE = 4
LONGEST_PAUSE = 64
# What drafting may lose, in plain steps: at the beginning; more where a drafter that nothing is known of promises as much; more
# where it has earned as much in the call before.
FIRST_STEPS = 0.7
MOST_ADVANCE = 2.0
MOST_KEPT = 2.0
KEPT = 0.8
# Shares of all time that it may lose on top: where the last draft promised nothing, and where it did.
SHARE = 0.01
PROMISING_SHARE = 0.02


def best_count(gains: list[float], costs: list[float], rate: float, fewest: int = 0) -> int:
    """Return how many nodes bring the most over what the time that they cost would bring elsewhere.

    Args:
        gains (`list[float]`): accepted tokens to expect of each node, at least one for each cost but the first.
        costs (`list[float]`): seconds of a round with 0, 1, 2, ... nodes, as many as may be taken.
        rate (`float`): tokens per second that the time would bring elsewhere.
        fewest (`int`): nodes to take at least, where there are as many.

    Returns:
        `int`: the count n for which the sum of the first n gains less `rate * costs[n]` is largest.

    Source: Dinkelbach's method for the ratio of a round's yield to its cost, one step a round; budgets per round as in
    arXiv:2606.01813.
    """
    sums = list(accumulate(gains, initial=0.0))
    counts = range(min(fewest, len(costs) - 1), len(costs))
    return max(counts, key=lambda count: sums[count] - rate * costs[count])


class Pauses:
    """Leave drafting for 4, 8, 16, ... rounds while its rounds of late bring less than plain decoding."""

    def __init__(self) -> None:
        self.length = FIRST_PAUSE
        self._rounds_left = 0
        self._tokens = self._seconds = 0.0

    def is_on(self) -> bool:
        """Return whether this round belongs to a pause; to be asked once a round."""
        self._rounds_left -= self._rounds_left > 0
        return self._rounds_left > 0

    def judge(self, tokens: float, seconds: float, plain_rate: float) -> None:
        """Pause after this round, if it and those of late are expected to bring less than plain decoding.

        Args:
            tokens (`float`): that this round is expected to bring. One place that is hard to foresee is no reason to pause.
            seconds (`float`): of this round.
            plain_rate (`float`): tokens per second of plain decoding.
        """
        if self._tokens + tokens >= plain_rate * (self._seconds + seconds):
            self.length = FIRST_PAUSE
            return
        self._rounds_left, self.length = self.length + 1, min(2 * self.length, LONGEST_PAUSE)
        self._tokens = self._seconds = 0.0  # the next try is judged by itself

    def observe(self, tokens: float, seconds: float) -> None:
        """Take in what a drafted round brought."""
        self._tokens = RECENT_DECAY * self._tokens + tokens
        self._seconds = RECENT_DECAY * self._seconds + seconds


class Allowance:
    """How much slower than plain decoding drafting may make a text, in plain steps.

    What drafting saves is added and what it loses taken away, and 1 or 2 % of the time that passes is added. No round may lose
    more than is left; where not even the smallest draft fits, rounds are plain ones until it does. So a drafter that promises
    nothing and is never right costs a text 1 % and 0.7 plain steps, whatever its passes cost.

    Args:
        steps (`float`, *optional*): what an earlier call left; `None` where there was none.
        is_vouched_for (`bool`): whether somebody has measured that the drafter pays: then the advance is there at once.
    """

    def __init__(self, steps: float | None, *, is_vouched_for: bool = False) -> None:
        self._is_new = steps is None and not is_vouched_for
        self._share = SHARE
        first = FIRST_STEPS + MOST_ADVANCE * is_vouched_for
        self.steps = first if steps is None else steps

    def promise(self, steps: float) -> None:
        """Take in how many plain steps a draft is expected to save. The first of a drafter that is not known is an advance."""
        self._share = PROMISING_SHARE if steps > 0 else SHARE
        if self._is_new:
            self.steps += min(max(steps, 0.0), MOST_ADVANCE)
            self._is_new = False

    def settle(self, saved: float, spent: float) -> None:
        """Take in a round: the plain steps that it saved, and those that it took."""
        self.steps += saved + self._share * spent

    @property
    def for_next_call(self) -> float:
        """What the next call may lose: as at the beginning, and part of what is left over."""
        return FIRST_STEPS + min(max(KEPT * (self.steps - FIRST_STEPS), 0.0), MOST_KEPT)


class Budget:
    """Choose round by round whether to draft and how many nodes to verify, for the most tokens per second.

    Two rates: tokens per second of plain decoding, and of the drafted rounds of late. A round that verifies n nodes costs a
    drafter pass and a target pass over n + 1 tokens, and is expected to bring one token and the sum of the n nodes' rates of
    acceptance: their path probabilities, as `calibration` reads them. `best_count` picks the n from these gains, these costs
    and the rate of late. `Pauses` and the `Allowance` say when not to draft at all. A tree is made with no more nodes than
    `room`, since making it takes time too.

    Args:
        profile (`Profile`): the costs.
        num_rows (`int`): B.
        draws_children (`bool`): whether the last child of each inner node is drawn, as for the ratio rule on trees.
        clock (`Callable`, *optional*): returns seconds; the profile is then corrected by what rounds really take.
        widths (`list[int]`, *optional*): rising, of the target's passes where they have a few only, the anchor counted.
        is_vouched_for (`bool`): whether the drafter was published with a measured size; see `Allowance`.
    """

    def __init__(
        self,
        profile: Profile,
        num_rows: int,
        *,
        draws_children: bool = False,
        clock: Callable[[], float] | None = None,
        widths: list[int] | None = None,
        is_vouched_for: bool = False,
    ) -> None:
        self.profile = profile
        self._widths = widths or []
        self.num_rows = num_rows
        self.draws_children = draws_children
        self.calibration = Calibration(profile.factors)
        self.pauses = Pauses()
        self.allowance = Allowance(profile.allowance, is_vouched_for=is_vouched_for)
        self.pace = Pace()
        self._clock = clock
        self._last_second: float | None = None  # when the last round ended
        self._tokens = self._seconds = self._rounds = 0.0
        self._is_drafted, self._num_nodes = False, 0  # the round that is under way
        self._known_costs: list[list[float]] = [[], []]  # by the profile and by nodes, of rounds without and with a draft
        self._sizes: deque[int] = deque(maxlen=ROOM_ROUNDS)  # of the last drafts

    @property
    def room(self) -> int:
        """Nodes to make a tree with, before it is known which are worth verifying."""
        return max(LEAST_ROOM, int(ROOM_SHARE * max(self._sizes, default=0)))

    @property
    def plain_seconds(self) -> float:
        """Seconds of a plain step with the rows that are left."""
        return self._cost(0, is_drafted=False)

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding with the rows that are left."""
        return self.num_rows / self.plain_seconds

    @property
    def rate(self) -> float:
        """Tokens per second of the drafted rounds of late and a few plain ones, at least plain decoding's."""
        tokens = self._tokens + PLAIN_ROUNDS * self.num_rows
        return max(tokens / (self._seconds + PLAIN_ROUNDS * self.plain_seconds), self.plain_rate)

    @property
    def smallest_value(self) -> float:
        """A path probability below which nodes are not looked at: not worth half of what a pass's token costs in the mean."""
        return 0.5 * self.rate * self.profile.slope / max(1.0, *self.calibration.factors)

    def wants_draft(self, num_rows: int) -> bool:
        """Return whether this round shall draft at all.

        Args:
            num_rows (`int`): rows that are left.
        """
        if num_rows != self.num_rows:
            # What other rows brought together says nothing about these.
            self.num_rows, self.pauses = num_rows, Pauses()
            self._tokens = self._seconds = self._rounds = 0.0
            self._known_costs = [[], []]
        self._num_nodes = 0
        self._is_drafted = not self.pauses.is_on() and self._loss(1) <= self.allowance.steps
        return self._is_drafted

    def choose_copied(self, rows: list[list[float]]) -> int:
        """Return how many copied tokens to verify in each row without a pass of the drafter; to be asked after `wants_draft`.

        Where this round would draft, that pass is saved only if it costs more than it would bring: in the rows whose copy does
        not stand to its end, what drafts have brought of late.

        Args:
            rows (`list[list[float]]`): how likely each copied token of a row is reached and stands.

        Returns:
            `int`: 0 to the longest copy; 0: the drafter is to be asked, or nothing drafted where it is not wanted.
        """
        gains = [sum(column) for column in zip_longest(*rows, fillvalue=0.0)]
        costs = self._costs(len(gains), is_drafted=False)
        num_allowed = sum(cost / self.plain_seconds - 1 <= self.allowance.steps for cost in costs[1:])
        best = best_count(gains, costs[: num_allowed + 1], self.rate if self._is_drafted else self.plain_rate)
        if best == 0:
            return 0
        if self._is_drafted:
            # Nothing is known of drafts before the first.
            brought = self._tokens / self._rounds / self.num_rows - 1 if self._rounds else float("inf")
            missed = brought * sum(1 - row[best - 1] if len(row) >= best else 1.0 for row in rows)
            if missed >= self.rate * (self._cost(best, is_drafted=True) - costs[best]):
                return 0
        self._is_drafted, self._num_nodes = False, best
        return best

    def choose(self, shapes: list[TreeShape]) -> int:
        """Return how many nodes to verify in each row.

        Args:
            shapes (`list[TreeShape]`): what there is to choose from in each row, likeliest nodes first.

        Returns:
            `int`: 0 to the nodes of the largest row.
        """
        gains = [sum(column) for column in zip_longest(*map(self.gains, shapes), fillvalue=0.0)]
        sums = list(accumulate(gains, initial=float(self.num_rows)))
        costs = self._costs(len(gains), is_drafted=True)
        plain_seconds = self.plain_seconds
        self.allowance.promise(
            max(total / self.num_rows - cost / plain_seconds for total, cost in zip(sums, costs, strict=True))
        )
        # Nothing has been drafted yet: the rate that this round would have at its best.
        rate = self.rate if self._seconds else max(self.rate, *(total / cost for total, cost in zip(sums, costs, strict=True)))
        # One node was allowed when the draft was wanted.
        num_allowed = max(1, sum(cost / plain_seconds - 1 <= self.allowance.steps for cost in costs[1:]))
        # A try verifies something: nothing is learnt from nothing.
        is_try = self.pauses.length > FIRST_PAUSE or self.allowance.steps <= FIRST_STEPS
        best = best_count(gains, costs[: num_allowed + 1], rate, fewest=int(is_try))
        self.pauses.judge(sums[best], costs[best], self.plain_rate)
        self._num_nodes = best
        self._sizes.append(best)
        return best

    def observe(self, outcome: Outcome) -> None:
        """Take in what became of a round; to be called once a round. Rows that have ended say nothing about it."""
        draft = outcome.draft
        sampled_parents = draft.parents if isinstance(draft, DraftTree) and draft.sampled is not None else None
        for row, (values, stands) in enumerate(zip(draft.values or [], outcome.stands(), strict=False)):
            # What copies are worth is learnt elsewhere.
            copied = [] if draft.copied is None else draft.copied[row]
            drawn = [False] * len(values) if sampled_parents is None else last_children(sampled_parents[row], copied)
            own = [place for place in range(len(values)) if place + 1 not in copied]
            if not outcome.is_done[row]:
                self.calibration.learn(
                    [values[place] for place in own], [drawn[place] for place in own], [stands[place] for place in own]
                )
        self.calibration.forget()
        self._read_clock()
        if not any(outcome.is_done):
            self._settle(sum(map(len, outcome.tokens)))
        self._is_drafted, self._num_nodes = False, 0

    def _settle(self, num_new: int) -> None:
        seconds = self._cost(self._num_nodes, is_drafted=self._is_drafted)
        if self._is_drafted:
            self._tokens, self._seconds = DECAY * self._tokens + num_new, DECAY * self._seconds + seconds
            self._rounds = DECAY * self._rounds + 1
            self.pauses.observe(num_new, seconds)
        spent = seconds / self.plain_seconds
        self.allowance.settle(num_new / self.num_rows - spent, spent)

    def _read_clock(self) -> None:
        """Compare the round's seconds with what the profile says."""
        if self._clock is None:
            return
        earlier, self._last_second = self._last_second, self._clock()
        if earlier is not None:
            expected = self._profiled(self._num_nodes, is_drafted=self._is_drafted)
            self.pace.observe((self._last_second - earlier) / expected, is_drafted=self._is_drafted)

    def _cost(self, count: int, *, is_drafted: bool) -> float:
        """Return the seconds of a round that verifies a number of nodes in each row."""
        return self.pace.ratio(is_drafted=is_drafted) * self._profiled(count, is_drafted=is_drafted)

    def _costs(self, most: int, *, is_drafted: bool) -> list[float]:
        """Return the seconds of rounds that verify 0 to `most` nodes in each row."""
        ratio = self.pace.ratio(is_drafted=is_drafted)
        self._profiled(most, is_drafted=is_drafted)
        return [ratio * seconds for seconds in self._known_costs[is_drafted][: most + 1]]

    def _profiled(self, count: int, *, is_drafted: bool) -> float:
        """Return what the profile says that such a round takes."""
        known, rows = self._known_costs[is_drafted], self.num_rows
        for nodes in range(len(known), count + 1):
            kinds = {"is_drafted": is_drafted, "is_drawn": self.draws_children}
            known.append(self.profile.round_cost(rows * self._width(nodes), num_nodes=rows * nodes, **kinds))
        return known[count]

    def _width(self, count: int) -> int:
        """Return the tokens that a pass over a number of nodes reads in each row: where it has a few widths, filler too."""
        return next((width for width in self._widths if width > count), count + 1)

    def _loss(self, count: int) -> float:
        """Return the plain steps that a drafted round loses if nothing is accepted."""
        return self._cost(count, is_drafted=True) / self.plain_seconds - 1

    def gains(self, shape: TreeShape) -> list[float]:
        """Return how much each node of a row adds to the accepted tokens that are to be expected."""
        rate, gains = self.calibration.rate, []
        last_under: dict[int, float] = {}
        for parent, value, rank in zip(shape.parents, shape.values, shape.ranks, strict=True):
            if rank == COPIED or not self.draws_children:
                gains.append(value if rank == COPIED else rate(value, is_drawn=False))
                continue
            gain = rate(value, is_drawn=True)
            if parent in last_under:
                # The child before it is not the drawn one any more.
                earlier = last_under[parent]
                gain += rate(earlier, is_drawn=False) - rate(earlier, is_drawn=True)
            last_under[parent] = value
            gains.append(gain)
        return gains

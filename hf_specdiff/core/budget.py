"""How much to draft: as many nodes as pay on this machine, given what a pass costs and what the drafter is worth.

Letters: B batch, N drafted nodes. Knows costs and probabilities; knows no model and reads no clock, so that a run with a given
profile is reproducible. Nothing here can change what is generated: a choice reads the committed text and what became of earlier
drafts, and is made before this round's tokens are drawn.
"""

from bisect import bisect_left
from dataclasses import dataclass
from dataclasses import field
from functools import cache
from itertools import accumulate
from itertools import zip_longest

from .calibration import NUM_CLASSES
from .calibration import Calibration
from .draft import DraftTree
from .draft import Outcome
from .tree import TreeShape
from .tree import last_children

# Memory of the running means, per round: of what a time usually brings, and of whether drafting pays at present.
DECAY = 0.97
RECENT_DECAY = 0.9
FIRST_PAUSE = 4
LONGEST_PAUSE = 64


@dataclass(frozen=True, slots=True)
class Profile:
    """What rounds cost on one machine with one pair of models.

    Attributes:
        sizes (`list[int]`): tokens of a target pass, rising, the first of them 1.
        target_seconds (`list[float]`): time of a pass over so many tokens, all that the loop does with it included.
        drafter_seconds (`float`): time of a drafter pass, all that the loop does with it included.
        machine (`str`): what it was measured on; see `hf_specdiff.core.profiling`.
        factors (`list[float]`): what is known of the drafter: how its path probabilities are to be read (see `Calibration`); 1
            as long as nothing has been generated, then half way to where the last call left them.
    """

    sizes: list[int]
    target_seconds: list[float]
    drafter_seconds: float
    machine: str = ""
    factors: list[float] = field(default_factory=lambda: [1.0] * (2 * NUM_CLASSES))

    def __post_init__(self) -> None:
        """Check that there is something to interpolate."""
        numbers = [*self.sizes, *self.target_seconds, self.drafter_seconds, *self.factors]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise ValueError(f"`profile` must hold numbers, got {numbers}.")
        is_rising = all(low < high for low, high in zip(self.sizes, self.sizes[1:], strict=False))
        if len(self.sizes) < 2 or len(self.sizes) != len(self.target_seconds) or self.sizes[0] != 1 or not is_rising:
            raise ValueError(
                f"`profile` must have rising `sizes` from 1 on and as many `target_seconds`, got {self.sizes} and "
                f"{self.target_seconds}."
            )
        if not all(number > 0 for number in numbers):
            raise ValueError(f"`profile` must have positive times and factors, got {numbers}.")
        if len(self.factors) != 2 * NUM_CLASSES:
            raise ValueError(f"`profile` must have {2 * NUM_CLASSES} `factors`, got {len(self.factors)}.")

    def target_cost(self, num_tokens: int) -> float:
        """Return the seconds of a target pass over so many tokens, all rows together; linear between and beyond the sizes."""
        high = min(max(bisect_left(self.sizes, num_tokens), 1), len(self.sizes) - 1)
        is_beyond = num_tokens > self.sizes[-1]
        # Beyond them as from half of the largest on: the last step alone may be that from a full tile to the next.
        low = min(bisect_left(self.sizes, self.sizes[-1] // 2), high - 1) if is_beyond else high - 1
        slope = (self.target_seconds[high] - self.target_seconds[low]) / (self.sizes[high] - self.sizes[low])
        return max(self.target_seconds[high] + slope * (num_tokens - self.sizes[high]), self.target_seconds[0])


class Budget:
    """Choose round by round whether to draft and how many nodes to verify, for the most tokens per second.

    A round that verifies n nodes costs D + T(n + 1) and is expected to bring 1 + the sum of the n nodes' rates of acceptance:
    their path probabilities, as `calibration` reads them. The best n is where the expected gain over what the same time usually
    brings is largest. Where the rounds of late and this one bring fewer tokens per second than plain decoding, drafting pauses,
    and tries again after 4, 8, 16, ... rounds; one place that is hard to foresee is no reason.

    Args:
        profile (`Profile`): the costs.
        num_rows (`int`): B.
        draws_children (`bool`): whether the last child of each inner node is drawn, as for the ratio rule on trees.

    Source: fractional programming over a round's yield and cost; budgets per round as in arXiv:2606.01813.
    """

    def __init__(self, profile: Profile, num_rows: int, *, draws_children: bool = False) -> None:
        self.profile = profile
        self.num_rows = num_rows
        self.draws_children = draws_children
        self.calibration = Calibration(profile.factors)
        self.tokens = self.seconds = 0.0
        self._recent_tokens = self._recent_seconds = 0.0
        self._cost = cache(profile.target_cost)
        self._pause = FIRST_PAUSE
        self._rounds_left = 0
        self._open_seconds: float | None = None  # what the open round was expected to take

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding with as many rows as are left."""
        return self.num_rows / self._cost(self.num_rows)

    @property
    def rate(self) -> float:
        """Tokens per second of late, at least plain decoding's."""
        return max(self.tokens / self.seconds if self.seconds else 0.0, self.plain_rate)

    @property
    def smallest_value(self) -> float:
        """A path probability below which nodes are not looked at: not worth half of what a pass's token costs in the mean."""
        span = self.profile.sizes[-1] - self.profile.sizes[0]
        slope = (self.profile.target_seconds[-1] - self.profile.target_seconds[0]) / span
        return 0.5 * self.rate * slope / max(1.0, *self.calibration.factors)

    def wants_draft(self, num_rows: int) -> bool:
        """Return whether this round shall draft at all.

        Args:
            num_rows (`int`): rows that are still running.
        """
        self.calibration.forget()
        if num_rows != self.num_rows:
            # What so many rows brought together says nothing about fewer.
            self.num_rows = num_rows
            self.tokens = self.seconds = self._recent_tokens = self._recent_seconds = 0.0
        if self._rounds_left == 0:
            return True
        self._rounds_left -= 1
        return False

    def choose(self, shapes: list[TreeShape]) -> int:
        """Return how many nodes to verify in each row.

        Args:
            shapes (`list[TreeShape]`): what there is to choose from in each row, likeliest nodes first.

        Returns:
            `int`: 0 to the nodes of the largest row.
        """
        num_rows, drafting = len(shapes), self.profile.drafter_seconds
        gains = zip_longest(*map(self._gains, shapes), fillvalue=0.0)
        sums = [0.0, *accumulate(map(sum, gains))]  # accepted tokens to expect of the first 0, 1, 2, ... nodes
        costs = [self._cost(num_rows * (count + 1)) for count in range(len(sums))]
        rate = self.rate
        if not self.seconds:
            # Nothing has been drafted yet: the rate that this round would have at its best.
            rate = max(rate, *((num_rows + gain) / (drafting + cost) for gain, cost in zip(sums, costs, strict=True)))
        # After a pause something is tried, since nothing is learnt from nothing.
        fewest = 1 if self._pause > FIRST_PAUSE and len(sums) > 1 else 0
        best = max(range(fewest, len(sums)), key=lambda count: sums[count] - rate * costs[count])
        seconds = drafting + costs[best]
        self._open_seconds = seconds
        tokens = num_rows + sums[best]
        if (self._recent_tokens + tokens) / (self._recent_seconds + seconds) < self.plain_rate:
            self._rounds_left, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
            self._recent_tokens = self._recent_seconds = 0.0  # the next try is judged by itself
        else:
            self._pause = FIRST_PAUSE
        return best

    def _gains(self, shape: TreeShape) -> list[float]:
        """Return how much each node adds to the accepted tokens that are to be expected."""
        rate, gains = self.calibration.rate, []
        if not self.draws_children:
            return [rate(value, is_drawn=False) for value in shape.values]
        last_under: dict[int, float] = {}
        for parent, value in zip(shape.parents, shape.values, strict=True):
            gain = rate(value, is_drawn=True)
            if parent in last_under:
                # The child before it is not the drawn one any more.
                earlier = last_under[parent]
                gain += rate(earlier, is_drawn=False) - rate(earlier, is_drawn=True)
            last_under[parent] = value
            gains.append(gain)
        return gains

    def observe(self, outcome: Outcome) -> None:
        """Take in what became of the last draft; rows that have ended say nothing about it."""
        draft = outcome.draft
        sampled_tree = draft if isinstance(draft, DraftTree) and draft.sampled is not None else None
        for row, (values, stands) in enumerate(zip(draft.values or [], outcome.stands(), strict=False)):
            drawn = [False] * len(values) if sampled_tree is None else last_children(sampled_tree.parents[row])
            if not outcome.is_done[row]:
                self.calibration.learn(values, drawn, stands)
        seconds, self._open_seconds = self._open_seconds, None
        if seconds is not None and not any(outcome.is_done):
            written = sum(map(len, outcome.tokens))
            self.tokens, self.seconds = DECAY * self.tokens + written, DECAY * self.seconds + seconds
            self._recent_tokens = RECENT_DECAY * self._recent_tokens + written
            self._recent_seconds = RECENT_DECAY * self._recent_seconds + seconds

"""What rounds cost and what drafts bring: what is known of a pair of models on a machine, and how far the rounds agree with it.

Knows seconds and probabilities; reads no clock, knows no model.
"""

from bisect import bisect_left
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from math import frexp

# How many rounds it takes to outweigh what the profile says, and how fast earlier rounds are forgotten.
PRIOR_ROUNDS = 4.0
DECAY = 0.97
# One round counts for at most this many times what rounds took before it: something else was running.
LARGEST_SURPRISE = 2.0
# Rounds cannot be quicker than a pass takes at its best. Where they take less than this share, the profile is wrong.
TOO_QUICK = 0.8
# Path probabilities are told apart by powers of 2: 1 to 1/2, 1/2 to 1/4, ..., the last class holds all the rest.
NUM_CLASSES = 8
# How many expected acceptances it takes to outweigh what was known before: of nodes by rank, whose probabilities say much, and
# of drawn ones, whose ranks' say little. Memory of the sums, per round.
PRIORS = (8.0, 1.0)
ACCEPTANCE_DECAY = 0.99
LARGEST_FACTOR = 8.0


@dataclass(frozen=True, slots=True)
class Profile:
    """What rounds cost on one machine with one pair of models.

    Attributes:
        sizes (`list[int]`): tokens of a target pass, rising, the first of them 1.
        target_seconds (`list[float]`): time of a pass over each of these numbers of tokens, all that the loop does with it
            included.
        drafter_seconds (`float`): time of a drafter pass and of a draft of one token, all that the loop does with it included.
        machine (`str`): what it was measured on; see `hf_specdiff.core.profiling`.
        factors (`list[float]`): what is known of the drafter: how its path probabilities are to be read (see `Calibration`); 1
            as long as nothing has been generated, then half way to where the last call left them.
        allowance (`float`, *optional*): plain steps that drafting may lose before it has saved any (see `Allowance`); `None` as
            long as nothing has been generated.
        is_doubtful (`bool`): whether other programs seem to have run while it was measured.
        node_seconds (`float`): what each further node of a tree adds to the time of a draft.
        drawn_seconds (`float`): what it adds on top where last children are drawn.
    """

    sizes: list[int]
    target_seconds: list[float]
    drafter_seconds: float
    machine: str = ""
    factors: list[float] = field(default_factory=lambda: [1.0] * (2 * NUM_CLASSES))
    allowance: float | None = None
    is_doubtful: bool = False
    node_seconds: float = 0.0
    drawn_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check that there is something to interpolate."""
        numbers, slopes = [*self.sizes, *self.target_seconds, self.drafter_seconds, *self.factors], self._slopes
        all_numbers = [*numbers, *slopes] if self.allowance is None else [*numbers, *slopes, self.allowance]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in all_numbers):
            raise ValueError(f"`profile` must hold numbers, got {all_numbers}.")
        is_rising = all(low < high for low, high in zip(self.sizes, self.sizes[1:], strict=False))
        if len(self.sizes) < 2 or len(self.sizes) != len(self.target_seconds) or self.sizes[0] != 1 or not is_rising:
            raise ValueError(
                f"`profile` must have rising `sizes` from 1 on and as many `target_seconds`, got {self.sizes} and "
                f"{self.target_seconds}."
            )
        if not all(number > 0 for number in numbers):
            raise ValueError(f"`profile` must have positive times and factors, got {numbers}.")
        if min(slopes) < 0:
            raise ValueError(f"`profile` must have `node_seconds` and `drawn_seconds` of at least 0, got {slopes}.")
        if len(self.factors) != 2 * NUM_CLASSES:
            raise ValueError(f"`profile` must have {2 * NUM_CLASSES} `factors`, got {len(self.factors)}.")

    def target_cost(self, num_tokens: int) -> float:
        """Return the seconds of a target pass over a number of tokens of all rows; linear between and beyond the sizes."""
        high = min(max(bisect_left(self.sizes, num_tokens), 1), len(self.sizes) - 1)
        is_beyond = num_tokens > self.sizes[-1]
        # Beyond them as from half of the largest on: the last step alone may be that from a full tile to the next.
        low = min(bisect_left(self.sizes, self.sizes[-1] // 2), high - 1) if is_beyond else high - 1
        slope = (self.target_seconds[high] - self.target_seconds[low]) / (self.sizes[high] - self.sizes[low])
        return max(self.target_seconds[high] + slope * (num_tokens - self.sizes[high]), self.target_seconds[0])

    def draft_cost(self, num_nodes: int, *, is_drawn: bool = False) -> float:
        """Return the seconds of a drafter pass and of a draft of a number of nodes, all rows together; linear in them."""
        return self.drafter_seconds + num_nodes * (self.node_seconds + self.drawn_seconds * is_drawn)

    def round_cost(self, num_tokens: int, *, is_drafted: bool, num_nodes: int = 0, is_drawn: bool = False) -> float:
        """Return the seconds of a round: a target pass over a number of tokens, and a draft where there is one."""
        draft = self.draft_cost(num_nodes, is_drawn=is_drawn) if is_drafted else 0.0
        return self.target_cost(num_tokens) + draft

    def least(self, earlier: "Profile") -> "Profile":
        """Return this profile with the least of its and an earlier one's times, and what the earlier one knew of the drafter.

        What else runs on a machine can only add to the time of a pass.
        """
        seconds = [min(now, earlier.target_cost(size)) for size, now in zip(self.sizes, self.target_seconds, strict=True)]
        names = ("drafter_seconds", "node_seconds", "drawn_seconds")
        least = {name: min(getattr(self, name), getattr(earlier, name)) for name in names}
        return replace(self, target_seconds=seconds, **least, factors=earlier.factors, allowance=earlier.allowance)

    @property
    def _slopes(self) -> list[float]:
        return [self.node_seconds, self.drawn_seconds]

    @property
    def slope(self) -> float:
        """Seconds that a token of a target pass costs, in the mean."""
        return (self.target_seconds[-1] - self.target_seconds[0]) / (self.sizes[-1] - self.sizes[0])


class Pace:
    """How long rounds take, over what the profile says, apart for rounds with and without a drafter pass.

    Both ratios together say how busy the machine is, which changes no choice. Their difference does: a longer text, a sampled
    draft or a batch costs the one kind more than the other.
    """

    def __init__(self) -> None:
        self._sums = [0.0, 0.0]
        self._counts = [0.0, 0.0]

    def ratio(self, *, is_drafted: bool) -> float:
        """Return the ratio of one kind of rounds; as long as few were seen, near that of all rounds, and that near 1."""
        overall = (PRIOR_ROUNDS + sum(self._sums)) / (PRIOR_ROUNDS + sum(self._counts))
        return (PRIOR_ROUNDS * overall + self._sums[is_drafted]) / (PRIOR_ROUNDS + self._counts[is_drafted])

    def observe(self, ratio: float, *, is_drafted: bool) -> None:
        """Take in one round.

        Args:
            ratio (`float`): its seconds over what the profile says.
            is_drafted (`bool`): whether the drafter ran.
        """
        bounded = min(ratio, LARGEST_SURPRISE * self.ratio(is_drafted=is_drafted))
        self._sums = [DECAY * total for total in self._sums]
        self._counts = [DECAY * count for count in self._counts]
        self._sums[is_drafted] += bounded
        self._counts[is_drafted] += 1

    @property
    def is_too_quick(self) -> bool:
        """Whether rounds take so much less than the profile says that it must have been measured on a busy machine."""
        return min(self.ratio(is_drafted=True), self.ratio(is_drafted=False)) < TOO_QUICK


class Calibration:
    """Factors that turn path probabilities into rates of acceptance, one for each class of probabilities and kind of node.

    A path's probability is the product of its positions' marginals. These say nothing of each other, so where a drafter is
    right so far it is likelier to be right again; a drafter may be sure of nonsense; and a child that is drawn is accepted
    wherever drafter and target overlap, which its rank's probability does not say. All of that shows in how many of a class's
    nodes are accepted, against how many its probabilities promised.

    Args:
        factors (`list[float]`): what to begin with, 2 * `NUM_CLASSES` numbers: for nodes that were chosen by rank, the
            likeliest first, then for drawn ones.
    """

    def __init__(self, factors: list[float]) -> None:
        self.factors = list(factors)
        self._known = list(factors)
        self._accepted = [0.0] * len(factors)
        self._promised = [0.0] * len(factors)

    def rate(self, probability: float, *, is_drawn: bool) -> float:
        """Return how often a node of such a path probability is accepted, as far as is known."""
        return min(1.0, probability * self.factors[_place(probability, is_drawn)])

    def forget(self) -> None:
        """Let what was learnt count for less; to be called once a round, also where nothing is drafted."""
        self._accepted = [ACCEPTANCE_DECAY * count for count in self._accepted]
        self._promised = [ACCEPTANCE_DECAY * count for count in self._promised]
        self._update()

    def learn(self, probabilities: list[float], is_drawn: list[bool], is_accepted: list[bool]) -> None:
        """Take in what became of one row's nodes.

        Args:
            probabilities (`list[float]`): of the paths to the nodes.
            is_drawn (`list[bool]`): whether a node's token was drawn, not chosen by rank.
            is_accepted (`list[bool]`): whether it stands in the text now.
        """
        accepted, promised = [0.0] * len(self.factors), [0.0] * len(self.factors)
        for probability, drawn, stands in zip(probabilities, is_drawn, is_accepted, strict=True):
            place = _place(probability, drawn)
            promised[place] += probability
            accepted[place] += stands
        for place, count in enumerate(promised):
            # Nodes of one path stand or fall together: a round is one observation, however many they are.
            weight = 1 / max(1.0, count)
            self._accepted[place] += weight * accepted[place]
            self._promised[place] += weight * count
        self._update()

    def _update(self) -> None:
        for place, known in enumerate(self._known):
            prior = PRIORS[place // NUM_CLASSES]
            factor = (prior * known + self._accepted[place]) / (prior + self._promised[place])
            self.factors[place] = min(factor, LARGEST_FACTOR)


def _place(probability: float, is_drawn: bool) -> int:
    halvings = -frexp(probability)[1] if probability > 0 else NUM_CLASSES
    return min(max(halvings, 0), NUM_CLASSES - 1) + NUM_CLASSES * is_drawn

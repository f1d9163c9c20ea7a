"""How much more or less often drafted tokens are accepted than their probabilities say, learnt round by round.

Knows probabilities; knows no model.
"""

from math import frexp

# Path probabilities are told apart by powers of 2: 1 to 1/2, 1/2 to 1/4, ..., the last class holds all the rest.
NUM_CLASSES = 8
# How many expected acceptances it takes to outweigh what was known before: of nodes by rank, whose probabilities say much, and
# of drawn ones, whose ranks' say little. Memory of the sums, per round.
PRIORS = (8.0, 1.0)
DECAY = 0.99
LARGEST_FACTOR = 8.0


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
        self._accepted = [DECAY * count for count in self._accepted]
        self._promised = [DECAY * count for count in self._promised]
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

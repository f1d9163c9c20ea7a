"""Copied branches: what followed the last tokens where they stood before in the text.

Letters: B batch, G positions of the drafter's window. Knows tokens and probabilities; knows no model and draws nothing. What is
found is a function of the committed text, and how far it is trusted one of what became of earlier copies too; neither can see
what a round draws.
"""

from dataclasses import dataclass
from itertools import takewhile
from math import exp
from math import log

from .draft import Outcome
from .text import Text
from .tree import Copied

# Log-odds that a copied token stands: so much for each e-fold of the tokens that were alike before it, and for each e-fold by
# which the drafter prefers it to the best other token. Fitted to the bundled pair; the rest is learnt.
LENGTH_WEIGHT = 1.5
OPINION_WEIGHT = 0.5
# Where trust begins: where the drafter was asked, and where it was not.
FIRST_TRUST, FIRST_TRUST_ALONE = -0.5, -1.5
STEP = 0.1
# No probability counts as less: what a drafter has never seen it cannot rule out.
LEAST_PROBABILITY = 1e-4


class Trust:
    """How often copied tokens stand, given what speaks for each: one number that follows the text, by logistic regression.

    Args:
        offset (`float`): where to begin, in log-odds.
    """

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def rate(self, match: int, opinion: float = 0.0) -> float:
        """Return the probability that a copied token stands, if those before it do.

        Args:
            match (`int`): tokens right before it that are alike in both places, at least 1.
            opinion (`float`): the log-ratio of the drafter's probabilities of this token and of the best other one.
        """
        return 1 / (1 + exp(-(self.offset + LENGTH_WEIGHT * log(match) + OPINION_WEIGHT * opinion)))

    def learn(self, rate: float, *, stands: bool) -> None:
        """Take in whether a token of this rate stands."""
        self.offset += STEP * (stands - rate)


@dataclass(slots=True)
class Copy:
    """What followed the last tokens of a row where they stood before.

    Attributes:
        tokens (`list[int]`): the copied tokens; none: the last token is new.
        match (`int`): tokens before them that are alike in both places.
        alone (`list[float]`): for each token, how likely it stands if those before it do; by the text alone.
        rates (`list[float]`): the same with the drafter's opinion, of the first `num_weighed` tokens.
        num_weighed (`int`): tokens that the drafter was asked about.
    """

    tokens: list[int]
    match: int
    alone: list[float]
    rates: list[float]
    num_weighed: int = 0

    def values(self) -> list[float]:
        """Return how likely each token is reached and stands."""
        values, value = [], 1.0
        for rate in self.rates:
            value *= rate
            values.append(value)
        return values


class Places:
    """Where each run of tokens stood last in one row: an index that grows with the text.

    Args:
        max_size (`int`): the longest runs that are looked up.
        padding (`int`): tokens to the left of the text that belong to no text.
    """

    def __init__(self, max_size: int, padding: int = 0) -> None:
        self.padding = padding
        self.tokens: list[int] = []
        self._behind: list[dict[tuple[int, ...], int]] = [{} for _ in range(max_size)]  # by size: from run to the place behind

    @property
    def length(self) -> int:
        """How many tokens of the row were taken in, padding included."""
        return self.padding + len(self.tokens)

    def extend(self, tokens: list[int]) -> None:
        """Take in what was added to the text."""
        for token in tokens:
            end = len(self.tokens)
            for size, places in enumerate(self._behind[:end], 1):
                places[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def find(self, count: int) -> tuple[list[int], int]:
        """Return what followed the last tokens where the longest known run of them stood last.

        Args:
            count (`int`): tokens to copy; where the text ends before, the copy goes on with itself.

        Returns:
            `tuple`: the tokens, and how many before them are alike, at most `2 * count` beyond the run: more says no more.
        """
        tokens, end = self.tokens, len(self.tokens)
        for size in range(min(len(self._behind), end - 1), 0, -1):
            place = self._behind[size - 1].get(tuple(tokens[end - size :]))
            if place is None:
                continue
            match, most = size, min(place, size + 2 * count)
            while match < most and tokens[place - match - 1] == tokens[end - match - 1]:
                match += 1
            known, period = tokens[place : place + count], end - place
            while len(known) < count:
                known.append(known[len(known) - period])
            return known, match
        return [], 0


class Copies:
    """Find a copied branch for each row, and learn how far to trust them.

    Args:
        num_tokens (`int`): most tokens of a copy.
        max_size (`int`): the longest runs of last tokens that are looked up.
        vocab_size (`int`): of the target. A prompt may hold more, which is never copied.

    Lossless when: what comes of it is settled before the round draws anything. `look` reads the committed text, `weigh` the
    drafter's probabilities, `observe` earlier rounds.
    Source: prompt lookup, as in transformers; here one branch of a tree.
    """

    def __init__(self, num_tokens: int, max_size: int, vocab_size: int) -> None:
        self.num_tokens = num_tokens
        self.vocab_size = vocab_size
        self.max_size = max_size
        self.found: list[Copy] = []
        self._places: dict[int, Places] = {}  # by row of the batch, so that rows may end
        self._with_drafter, self._alone = Trust(FIRST_TRUST), Trust(FIRST_TRUST_ALONE)

    def look(self, text: Text, max_length: int | None) -> list[Copy]:
        """Find this round's copies.

        Args:
            text (`Text`): committed; calls only extend it or take rows away.
            max_length (`int`, *optional*): most tokens of the finished text; no copy reaches past it.

        Returns:
            `list[Copy]`: one for each row.
        """
        self._read(text)
        self.found = []
        for row, length in zip(text.rows, text.lengths, strict=True):
            room = self.num_tokens if max_length is None else min(self.num_tokens, max_length - length - 1)
            tokens, match = self._places[row].find(room) if room > 0 else ([], 0)
            tokens = list(takewhile(lambda token: token < self.vocab_size, tokens))
            alone = [self._alone.rate(match + depth) for depth in range(len(tokens))]
            self.found.append(Copy(tokens, match, alone, list(alone)))
        return self.found

    def weigh(self, row: int, depth: int, prob: float, likeliest: list[float], tokens: list[int]) -> Copied:
        """Ask what the drafter says to a copied token.

        Args:
            row (`int`): of those that were looked at.
            depth (`int`): tokens before it in the copy.
            prob (`float`): the drafter's probability of the token, those before it being as copied.
            likeliest (`list[float]`): its largest probabilities there, falling.
            tokens (`list[int]`): whose they are.

        Returns:
            `Copied`: how likely the token stands, and what that leaves to the others.
        """
        copy = self.found[row]
        token = copy.tokens[depth]
        rank = tokens.index(token) if token in tokens else None
        other = next((value for place, value in enumerate(likeliest[:2]) if place != rank), 1 - prob)
        opinion = log(max(prob, LEAST_PROBABILITY) / max(other, LEAST_PROBABILITY))
        rate = copy.rates[depth] = self._with_drafter.rate(copy.match + depth, opinion)
        copy.num_weighed = depth + 1
        # Where the copy is less sure than the drafter, the others are not worth more than they were.
        return Copied(rate, rank, min(1.0, (1 - rate) / (1 - prob)) if prob < 1 else 1.0)

    def observe(self, outcome: Outcome) -> None:
        """Compare the copies with what the round has added to the text."""
        # Nothing was looked up where no draft had room.
        for copy, written in zip(self.found, outcome.tokens, strict=False):
            for depth, (copied, token) in enumerate(zip(copy.tokens, written, strict=False)):
                stands = copied == token
                self._alone.learn(copy.alone[depth], stands=stands)
                if depth < copy.num_weighed:
                    self._with_drafter.learn(copy.rates[depth], stands=stands)
                if not stands:
                    break
        self.found = []

    def _read(self, text: Text) -> None:
        """Bring the index of each row up to the text."""
        for index, row in enumerate(text.rows):
            if row not in self._places:
                is_text = text.is_text(0, text.prompt_length)
                padding = 0 if is_text is None else int((~is_text[index]).sum())
                self._places[row] = Places(self.max_size, padding)
        starts = [self._places[row].length for row in text.rows]
        first = min(starts)
        table = text.tokens[:, first:].tolist()  # one device sync
        for row, start, length, tokens in zip(text.rows, starts, text.lengths, table, strict=True):
            self._places[row].extend(tokens[start - first : length - first])

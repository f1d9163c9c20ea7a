"""The value objects that pass between drafter, rule and loop.

Letters: B batch, G drafted tokens (gamma), V vocabulary. Knows no model and draws nothing.
"""

from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import torch


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens together with the law they were drawn from.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, G)`, int64): the drafted tokens.
        probs (`torch.Tensor` of shape `(B, G, V)`, float32, *optional*): the probabilities that `tokens` were really drawn
            from. `None`: nothing was drawn, each token is a function of the committed text, that is a point mass on it.
        has_prefix_law (`bool`): whether, given the accepted prefix, token `i` has the law `probs[:, i]`. True for the
            marginals of one pass, for left-to-right reveals and for point masses; false for tokens drawn out of order. The
            ratio and the block rule need it, the match rule does not.
        values (`list[list[float]]`, *optional*): for each row and position, the probability of the likeliest tokens so far
            under the drafter's marginals; what a budget goes by.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None
    has_prefix_law: bool
    values: list[list[float]] | None = None

    @classmethod
    def nothing(cls, tokens: torch.Tensor) -> "Draft":
        """Return a draft of no tokens for each row of `tokens`; every rule meets it with one token of the target's own."""
        return cls(tokens[:, :0], None, has_prefix_law=True)

    def first(self, count: int) -> "Draft":
        """Return the first so many tokens."""
        probs = None if self.probs is None else self.probs[:, :count]
        values = None if self.values is None else [row[:count] for row in self.values]
        return Draft(self.tokens[:, :count], probs, self.has_prefix_law, values)

    @property
    def num_tokens(self) -> int:
        """G, the drafted tokens of a sequence."""
        return self.tokens.shape[1]

    def num_drafted(self) -> list[int]:
        """Return the drafted tokens of each row."""
        return [self.num_tokens] * self.tokens.shape[0]

    def deepest(self) -> list[int]:
        """Return how far ahead each row's draft reaches."""
        return self.num_drafted()

    def outcome(self, additions: list[list[int]]) -> list[list[bool]]:
        """Return, for each row, which drafted tokens stand in the text.

        Args:
            additions (`list[list[int]]`): what has been added to each row since.
        """
        rows = []
        for drafted, added in zip(self.tokens.tolist(), additions, strict=True):
            count = next((i for i, pair in enumerate(zip(drafted, added, strict=False)) if pair[0] != pair[1]), len(added))
            rows.append([i < count for i in range(len(drafted))])
        return rows

    def drawn(self) -> list[list[bool]]:
        """Return, for each row, which tokens were drawn beside others that were not: none in a chain."""
        return [[False] * self.num_tokens] * self.tokens.shape[0]

    def depths(self) -> torch.Tensor:
        """Return how far behind the anchor each token stands, `(1, G + 1)` int64; the anchor is the first."""
        return torch.arange(self.num_tokens + 1, device=self.tokens.device)[None]

    def ancestor_mask(self) -> torch.Tensor:
        """Return who sees whom, `(1, G + 1, G + 1)` bool: every token those before it."""
        size = self.num_tokens + 1
        return torch.ones(1, size, size, dtype=torch.bool, device=self.tokens.device).tril()

    def to(self, device: torch.device) -> "Draft":
        """Return the draft on another device."""
        if self.tokens.device == device:
            return self
        probs = None if self.probs is None else self.probs.to(device)
        return replace(self, tokens=self.tokens.to(device), probs=probs)

    def dense_probs(self, vocab_size: int) -> torch.Tensor:
        """Return `probs`, with a point mass written out, and 0 for tokens that the drafter does not know.

        Args:
            vocab_size (`int`): V, at least the drafter's own.

        Returns:
            `torch.Tensor` of shape `(B, G, V)`, float32.
        """
        if self.probs is not None:
            return torch.nn.functional.pad(self.probs, (0, vocab_size - self.probs.shape[-1]))
        return torch.nn.functional.one_hot(self.tokens, vocab_size).float()

    def scores(self, vocab_size: int) -> torch.Tensor:
        """Return log-probabilities whose softmax is the law of the tokens, in nats; what the host calls candidate logits.

        Args:
            vocab_size (`int`): V.

        Returns:
            `torch.Tensor` of shape `(B, G, V)`, float32, minus infinity where the probability is 0.
        """
        return self.dense_probs(vocab_size).log()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a rule decided about a draft.

    Attributes:
        num_accepted (`torch.Tensor` of shape `(B,)`, int64): drafted tokens accepted, 0 to G; the bonus is not counted.
        bonus_token (`torch.Tensor` of shape `(B,)`, int64): the token that the target adds after them.
        paths (`list[list[int]]`, *optional*): of a tree, for each row the accepted nodes, root to leaf. `None`: a chain, whose
            nodes are 1, 2, ...
    """

    num_accepted: torch.Tensor
    bonus_token: torch.Tensor
    paths: list[list[int]] | None = None

    def new_tokens(self, draft_tokens: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Return what the round would add.

        Args:
            draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): the draft, or a tree's nodes.

        Returns:
            `tuple`: for each row its new tokens, the accepted ones and then the bonus token; and the nodes that lead there, the
            anchor (0) first, so that node `i` is the one whose logits token `i` was taken from.
        """
        # One device sync for all that the host side of the round needs to know.
        table = torch.cat([self.num_accepted[:, None], self.bonus_token[:, None], draft_tokens], dim=1).tolist()
        paths = self.paths or [list(range(1, row[0] + 1)) for row in table]
        tokens = [[*(row[node + 1] for node in path), row[1]] for row, path in zip(table, paths, strict=True)]
        return tokens, [[0, *path] for path in paths]


@dataclass(slots=True)
class SpeculationStats:
    """What a call to `generate` did, round by round.

    A round's `num_accepted` is the number of tokens that it added to the text less one: the last of them counts as the bonus
    token, also where an end of the text fell inside the accepted window.

    Attributes:
        draft_shape (`str`): the shape that was used.
        acceptance (`str`): the rule that was used.
        num_drafted (`list[list[int]]`): for each round and sequence, tokens drafted.
        num_accepted (`list[list[int]]`): for each round and sequence, drafted tokens kept; a row that has ended takes no part.
        prefill_seconds (`float`): the target's pass over the prompt.
        drafter_seconds (`float`): all drafter passes.
        target_seconds (`float`): all target passes after the prefill.
        total_seconds (`float`): the whole decoding, prefill included.
        draft_depths (`list[list[int]]`): for each round and sequence, how far ahead the draft reached: the drafted tokens of a
            chain, the longest path of a tree. Empty: that of chains.
    """

    draft_shape: str
    acceptance: str
    num_drafted: list[list[int]]
    num_accepted: list[list[int]]
    prefill_seconds: float = 0.0
    drafter_seconds: float = 0.0
    target_seconds: float = 0.0
    total_seconds: float = 0.0
    draft_depths: list[list[int]] = field(default_factory=list)

    @property
    def num_rounds(self) -> int:
        """Rounds: one draft and one target pass each."""
        return len(self.num_accepted)

    @property
    def num_drafted_tokens(self) -> int:
        """Drafted tokens over all rounds and sequences."""
        return sum(map(sum, self.num_drafted))

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round adds, the bonus included (tau, block efficiency); 0 without rounds."""
        accepted = [count for row in self.num_accepted for count in row]
        return sum(accepted) / len(accepted) + 1 if accepted else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, all of a tree's nodes counted; 0 without drafts."""
        return sum(map(sum, self.num_accepted)) / max(self.num_drafted_tokens, 1)

    @property
    def acceptance_per_position(self) -> list[float]:
        """For each window position, the share of the drafts reaching so far in which it was accepted."""
        pairs = [
            pair
            for drafted, accepted in zip(self.draft_depths or self.num_drafted, self.num_accepted, strict=True)
            for pair in zip(drafted, accepted, strict=True)
        ]
        longest = max((drafted for drafted, _ in pairs), default=0)
        shares = []
        for position in range(longest):
            reached = [accepted > position for drafted, accepted in pairs if drafted > position]
            shares.append(sum(reached) / len(reached))
        return shares

    @property
    def other_seconds(self) -> float:
        """Time that was spent neither in the drafter nor in the target."""
        return self.total_seconds - self.prefill_seconds - self.drafter_seconds - self.target_seconds

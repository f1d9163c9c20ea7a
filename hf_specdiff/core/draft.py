"""What passes between drafter, rule and loop: drafted tokens as a chain or a tree, and what became of them.

Letters: B batch, G drafted tokens of a chain (gamma), N nodes of a tree, V vocabulary. Node 0 is the anchor, and parents come
before children. Knows no model and draws nothing.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any
from typing import TypeAlias

import torch

from .text import to_device


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
        copied (`list[list[int]]`, *optional*): for each row, which of the tokens 1, 2, ... were copied from the text.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None
    has_prefix_law: bool
    values: list[list[float]] | None = None
    copied: list[list[int]] | None = None

    @classmethod
    def nothing(cls, tokens: torch.Tensor) -> "Draft":
        """Return a draft of no tokens for each row of `tokens`; every rule meets it with one token of the target's own."""
        return cls(tokens[:, :0], None, has_prefix_law=True)

    def first(self, count: int) -> "Draft":
        """Return the first `count` tokens of every row."""
        probs = None if self.probs is None else self.probs[:, :count]
        values = None if self.values is None else [row[:count] for row in self.values]
        copied = None if self.copied is None else [[node for node in row if node <= count] for row in self.copied]
        return Draft(self.tokens[:, :count], probs, self.has_prefix_law, values, copied)

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


# Tokens of each position of a chain that laws of the next one are asked for at once; others are asked for one by one.
NUM_CANDIDATES = 8
# What a head keeps of the tokens before, `(n, R)`, if it keeps something.
Memory: TypeAlias = torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Conditionals:
    """The laws of one pass, position by position.

    Attributes:
        step (`Callable`): from a position (0 to G - 1), the batch rows of n nodes, the tokens before `(n,)` and the memory of
            the nodes before `(n, R)` to processed logits `(n, V)` float32 and the memory for the nodes behind.
        anchors (`torch.Tensor` of shape `(B,)`, int64): the tokens before position 0.
        gamma (`int`): G.
        marginals (`torch.Tensor` of shape `(B, G, V)`, *optional*): logits of the positions by themselves, where a law hangs on
            its position and the token before and on nothing else: then `step` may be asked in any order, and for a position
            of each node, `(n,)` int64, in place of one for all. `None`: a law may hang on all tokens before.
        confidence (`Callable`, *optional*): from a position, the batch rows of n nodes and the tokens before `(n,)` to how
            likely the target is to accept a token that is drawn from this law, `(n,)` float32; `None`: nobody says.
        drafted_ids (`torch.Tensor` of shape `(m,)`, int64, *optional*): rising; the tokens that alone are drafted, where
            `drafted_step` knows them apart; `None`: it does not.
        drafted_step (`Callable`, *optional*): from positions, batch rows and tokens before, each `(n,)`, to the columns
            `(n, m)` of what `step` returns. All others are minus infinity.
    """

    step: Callable[[Any, Any, torch.Tensor, Memory], tuple[torch.Tensor, Memory]]
    anchors: torch.Tensor
    gamma: int
    marginals: torch.Tensor | None = None
    confidence: Callable[[Any, Any, torch.Tensor], torch.Tensor] | None = None
    drafted_ids: torch.Tensor | None = None
    drafted_step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @property
    def width(self) -> int:
        """Tokens that are told apart: m, or V; with `marginals` only."""
        assert self.marginals is not None
        return self.marginals.shape[-1] if self.drafted_ids is None else len(self.drafted_ids)

    def drafted_scores(
        self, positions: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits that can be drafted of many laws, and whose they are: a large vocabulary's others cost time.

        Args:
            positions (`torch.Tensor` of shape `(n,)`, int64): 0 to G - 1.
            rows (`torch.Tensor` of shape `(n,)`, int64): of the batch.
            tokens (`torch.Tensor` of shape `(n,)`, int64): before the positions.

        Returns:
            `tuple`: logits `(n, m)` float32 and the ids of their columns `(m,)` int64; `None`: a column for each token.
        """
        if self.drafted_step is None or self.drafted_ids is None:
            return self.step(positions, rows, tokens, None)[0], None
        return self.drafted_step(positions, rows, tokens), self.drafted_ids

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.anchors)

    def likely(
        self, copied: list[list[int]] | None = None, most: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what laws are worth asking for at once: given the anchors, and each token that may well stand before.

        Args:
            copied (`list[list[int]]`, *optional*): for each row, tokens that may stand at its first positions too.
            most (`int`, *optional*): tokens of each row, over all positions, that are likeliest to be reached and to stand; by
                default the likeliest few of each position.

        Returns:
            `tuple`: positions, rows of the batch and tokens before, each `(n,)` int64.
        """
        assert self.marginals is not None
        device, num_rows = self.anchors.device, self.num_rows
        before, vocab_size = self.marginals[:, : self.gamma - 1], self.marginals.shape[-1]
        if most is None:
            tokens = before.topk(min(NUM_CANDIDATES, vocab_size), dim=-1).indices
            places = (torch.arange(1, self.gamma, device=device)[:, None] * vocab_size + tokens).flatten(1)
        else:
            values = torch.softmax(before.float(), dim=-1)
            reached = values.amax(dim=-1).cumprod(dim=-1)
            values[:, 1:] *= reached[:, :-1, None]
            values = values.flatten(1)
            places = values.topk(min(most, values.shape[1]), dim=-1).indices + vocab_size
        # Position and token as one number; that of an anchor, at position 0, is its token.
        rows = [*range(num_rows), *(row for row in range(num_rows) for _ in range(places.shape[1]))]
        more = []
        for row, own in enumerate(copied or []):
            more += [place * vocab_size + token for place, token in enumerate(own[: self.gamma - 1], 1)]
            rows += [row] * min(len(own), self.gamma - 1)
        known = to_device(rows + more, device)
        places = torch.cat([self.anchors, places.flatten(), known[len(rows) :]])
        positions = torch.div(places, vocab_size, rounding_mode="floor")
        return positions, known[: len(rows)], places - positions * vocab_size

    def trust(self, index: Any, rows: Any, previous: torch.Tensor, law: torch.Tensor) -> torch.Tensor:
        """Return what a position's probabilities are to be multiplied with, so that they say how often tokens are accepted.

        A law of which the drafter is right to be unsure is accepted as often as two draws from it agree, `sum_x q(x)^2`, where
        the target is sure. So a law says by itself how often a token of it is accepted, and the head says how often it is;
        where the head says less, the law promises too much. Where the head says more, the target is unsure too, and the
        probabilities are right as they are.

        Args:
            index (`int` or `torch.Tensor` of shape `(n,)`): the position.
            rows (`list[int]` or `torch.Tensor` of shape `(n,)`): the batch rows of n nodes.
            previous (`torch.Tensor` of shape `(n,)`, int64): the tokens before.
            law (`torch.Tensor` of shape `(n, V)`, float): the laws.

        Returns:
            `torch.Tensor` of shape `(n, 1)`: at most 1; 1 where nobody says how likely they are accepted.
        """
        if self.confidence is None:
            return law.new_ones(len(law), 1)
        confidence = self.confidence(index, rows, previous).to(law)
        return (confidence / law.square().sum(dim=-1)).clamp(max=1.0)[:, None]


@dataclass(frozen=True, slots=True)
class SampledChildren:
    """The children that were drawn, where a tree has one such child under each inner node.

    Attributes:
        laws (`torch.Tensor` of shape `(n, V)`, float32): what each was drawn from: its position's marginal without the tokens
            of its siblings, normalised.
        row_of (`list[dict[int, int]]`): for each batch row, from inner node to its row in `laws`.
        child_of (`list[dict[int, int]]`): for each batch row, from the same nodes to the child that was drawn.
        marginals (`torch.Tensor` of shape `(n, V)`, float32, *optional*): what `laws` are at temperature 1, if at another.
    """

    laws: torch.Tensor
    row_of: list[dict[int, int]]
    child_of: list[dict[int, int]]
    marginals: torch.Tensor | None = None


class UnreadParents(Sequence[list[int]]):
    """Parents of a tree's nodes, row by row, that lie on a device until somebody asks.

    Args:
        tensor (`torch.Tensor` of shape `(B, N)`, int64): -1 for filler, which stands behind the nodes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._rows: list[list[int]] | None = None

    def read(self, rows: list[list[int]]) -> None:
        """Take in what `tensor` holds, which somebody has read back beside other things."""
        self._rows = [[parent for parent in row if parent >= 0] for row in rows]

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, row: Any) -> Any:
        if self._rows is None:
            self.read(self.tensor.tolist())
        assert self._rows is not None
        return self._rows[row]

    def __iter__(self) -> Iterator[list[int]]:
        return iter([self[row] for row in range(len(self))])


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """Where a tree's nodes stand, on the device.

    Attributes:
        parents (`torch.Tensor` of shape `(B, N)`, int64): of nodes 1 to N; -1 for filler.
        depths (`torch.Tensor` of shape `(B, N + 1)`, int64): 0 for the anchor and for filler.
        mask (`torch.Tensor` of shape `(B, N + 1, N + 1)`, bool): true at [i, j] if j is i or an ancestor of i.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> "TreeLayout":
        """Return the layout on another device."""
        return TreeLayout(self.parents.to(device), self.depths.to(device), self.mask.to(device))


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens as a tree for every row of a batch; siblings differ.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, N)`, int64): of nodes 1 to N; rows with fewer nodes end in filler.
        parents (`Sequence[list[int]]`): for each row, the parents of its nodes 1, 2, ...; filler has none.
        drafts (`list[list[list[int]]]`, *optional*): for each row, the nodes of each joint draft, root to leaf.
        sampled (`SampledChildren`, *optional*): `None`: every node is a function of the committed text, or the rule does not
            ask what it was drawn from.
        values (`list[list[float]]`, *optional*): for each row, the path probabilities of its nodes by their ranks.
        copied (`list[list[int]]`, *optional*): for each row, the nodes that were copied from the text, root to leaf.
        layout (`TreeLayout`, *optional*): of a tree that was built on the device; its parents are read back with the round.
    """

    tokens: torch.Tensor
    parents: Sequence[list[int]]
    drafts: list[list[list[int]]] | None = None
    sampled: SampledChildren | None = None
    values: list[list[float]] | None = None
    copied: list[list[int]] | None = None
    layout: TreeLayout | None = None

    @classmethod
    def planted(cls, tokens: torch.Tensor, layout: TreeLayout) -> "DraftTree":
        """Return a tree that was built on the device; see `tree.plant`."""
        return cls(tokens, UnreadParents(layout.parents), layout=layout)

    @classmethod
    def of_rows(
        cls,
        tokens: list[list[int]],
        parents: list[list[int]],
        device: torch.device,
        drafts: list[list[list[int]]] | None = None,
        sampled: SampledChildren | None = None,
        values: list[list[float]] | None = None,
        copied: list[list[int]] | None = None,
    ) -> "DraftTree":
        """Join rows of different sizes."""
        most = max(map(len, tokens))
        padded = [row + [0] * (most - len(row)) for row in tokens]
        return cls(to_device(padded, device).view(len(tokens), most), parents, drafts, sampled, values, copied)

    @classmethod
    def of_chain(cls, tokens: torch.Tensor) -> "DraftTree":
        """Return a chain `(B, G)` as a tree of one branch."""
        return cls(tokens, [list(range(tokens.shape[1])) for _ in range(tokens.shape[0])])

    @property
    def num_tokens(self) -> int:
        """N, the nodes of the largest row."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> "DraftTree":
        """Return the tree with its tokens on another device."""
        if self.tokens.device == device:
            return self
        if self.layout is not None:
            return DraftTree.planted(self.tokens.to(device), self.layout.to(device))
        return replace(self, tokens=self.tokens.to(device))

    def read(self, numbers: torch.Tensor) -> list[list[int]]:
        """Read numbers of a round `(B, n)` back from the device, in one go with the parents where these still lie there."""
        if not isinstance(self.parents, UnreadParents):
            return numbers.tolist()
        size = self.num_tokens
        table = torch.cat([numbers, self.parents.tensor], dim=1).tolist()
        self.parents.read([row[-size:] for row in table])
        return [row[:-size] for row in table]

    def num_drafted(self) -> list[int]:
        """Return the nodes of each row."""
        return [len(parents) for parents in self.parents]

    def deepest(self) -> list[int]:
        """Return the longest path of each row."""
        return [max(row) for row in self._depth_rows()]

    def children(self, tokens: list[list[int]] | None = None) -> list[dict[tuple[int, int], int]]:
        """Return, for each row, from (node, token) to the child of that node with that token.

        Args:
            tokens (`list[list[int]]`, *optional*): `tokens`, where they have been read back from the device already.
        """
        return [
            {(parent, token): node for node, (parent, token) in enumerate(zip(parents, own, strict=False), 1)}
            for parents, own in zip(self.parents, self.tokens.tolist() if tokens is None else tokens, strict=True)
        ]

    def path(self, row: int, node: int) -> list[int]:
        """Return the nodes from the anchor (0) down to one of a row's."""
        path = [node]
        while path[-1] > 0:
            path.append(self.parents[row][path[-1] - 1])
        return path[::-1]

    def depths(self) -> torch.Tensor:
        """Return how far behind the anchor each node stands, `(B, N + 1)` int64: 0 for the anchor and for filler."""
        if self.layout is not None:
            return self.layout.depths
        size = self.num_tokens + 1
        rows = [row + [0] * (size - len(row)) for row in self._depth_rows()]
        return to_device(rows, self.tokens.device)

    def _depth_rows(self) -> list[list[int]]:
        rows = []
        for parents in self.parents:
            depths = [0]
            for parent in parents:
                depths.append(depths[parent] + 1)
            rows.append(depths)
        return rows

    def ancestor_mask(self) -> torch.Tensor:
        """Return who sees whom, `(B, N + 1, N + 1)` bool: true at [i, j] if j is i or an ancestor of i; filler sees itself."""
        if self.layout is not None:
            return self.layout.mask
        size = self.num_tokens + 1
        table = bytearray()
        for parents in self.parents:
            rows = [bytearray(size)]
            rows[0][0] = True
            for node, parent in enumerate([*parents, *[None] * (size - 1 - len(parents))], 1):
                row = bytearray(size) if parent is None else rows[parent][:]  # what its parent sees, and itself
                row[node] = True
                rows.append(row)
            table += b"".join(rows)
        mask = torch.frombuffer(table, dtype=torch.bool)
        device = self.tokens.device
        return mask.view(len(self.parents), size, size).to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a draft: what the loop tells the drafter once a round.

    Attributes:
        draft (`Draft` or `DraftTree`): as it was verified.
        tokens (`list[list[int]]`): for each row what the round has added to the text: the accepted tokens, then one of the
            target's own, cut where the text ends.
        nodes (`list[list[int]]`): for each row and new token the drafted token behind whose logits it stands: the anchor (0),
            then those that were accepted (of a chain 1, 2, ...).
        is_done (`list[bool]`): whether each row's text ends here. What was cut off with it says nothing about the draft.
        target_laws (`dict[tuple[int, int], torch.Tensor]`): where a child was drawn, the target's law `(V,)`, float32, at its
            parent, by row and parent; only at those that the walk reached.
    """

    draft: Draft | DraftTree
    tokens: list[list[int]]
    nodes: list[list[int]]
    is_done: list[bool]
    target_laws: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def stands(self) -> list[list[bool]]:
        """Return, for each row, which of the nodes 1, 2, ... stand in the text."""
        accepted = [set(path[1:]) for path in self.nodes]
        sizes = self.draft.num_drafted()
        return [[node in kept for node in range(1, size + 1)] for kept, size in zip(accepted, sizes, strict=True)]

    def num_copied(self) -> list[int]:
        """Return, for each row, how many of the tokens that stand were copied."""
        copied = self.draft.copied or [[] for _ in self.nodes]
        return [len(set(path) & set(nodes)) for path, nodes in zip(self.nodes, copied, strict=True)]

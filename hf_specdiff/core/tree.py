"""Draft trees: from marginals or samples to nodes, and what the target needs to see of them.

Letters: B batch, G window (gamma), V vocabulary, N drafted nodes, K drafts. Node 0 is the anchor; parents come before children.
Draws nothing.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

import torch


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The nodes of one row, without tokens: a tree over window positions and ranks.

    Attributes:
        parents (`list[int]`): of nodes 1, 2, ...: index of the parent.
        depths (`list[int]`): of nodes 1, 2, ...: 1-based window position.
        ranks (`list[int]`): of nodes 1, 2, ...: the token is the `rank`-th most probable one of its position, from 0.
        values (`list[float]`): of nodes 1, 2, ...: probability of the path under the marginals.
    """

    parents: list[int]
    depths: list[int]
    ranks: list[int]
    values: list[float]

    def first(self, count: int) -> "TreeShape":
        """Return the first so many nodes: parents come before children, so they are a tree too."""
        return TreeShape(self.parents[:count], self.depths[:count], self.ranks[:count], self.values[:count])

    def depth_first(self) -> "TreeShape":
        """Return the same tree with its nodes in depth-first order, the more probable child first.

        The most probable path then has nodes 1, 2, 3, ...: where it is accepted, its keys and values already lie where they
        belong.
        """
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents, 1):
            children.setdefault(parent, []).append(node)
        order, place, stack = [], {0: 0}, children.get(0, [])[::-1]
        while stack:
            node = stack.pop()
            order.append(node - 1)
            place[node] = len(order)
            stack += children.get(node, [])[::-1]
        return TreeShape(
            [place[self.parents[i]] for i in order],
            [self.depths[i] for i in order],
            [self.ranks[i] for i in order],
            [self.values[i] for i in order],
        )


def best_first(ranked_probs: list[list[float]], budget: int, smallest: float = 0.0) -> TreeShape:
    """Return the `budget` most probable prefixes under a product of marginals, most probable first.

    A prefix's probability is the product of its tokens', so no prefix comes before its parent, and among the trees of so many
    nodes none has a larger expected accepted length under the marginals.

    Args:
        ranked_probs (`list[list[float]]`): for each window position the probabilities of its tokens, falling.
        budget (`int`): most nodes.
        smallest (`float`): prefixes of at most this probability are left out.

    Returns:
        `TreeShape`: fewer nodes where there are not so many prefixes of positive probability.

    Source: arXiv:2604.12989, Algorithm 1.
    """
    shape = TreeShape([], [], [], [])
    heap = [(-ranked_probs[0][0], 0, 0, 1, 0, 1.0)]  # minus value, tie-break, parent, depth, rank, the parent's value
    pushed = 1
    while heap and len(shape.parents) < budget:
        negative, _, parent, depth, rank, above = heapq.heappop(heap)
        value = -negative
        if value <= smallest:
            break
        shape.parents.append(parent)
        shape.depths.append(depth)
        shape.ranks.append(rank)
        shape.values.append(value)
        if rank + 1 < len(ranked_probs[depth - 1]):
            sibling = above * ranked_probs[depth - 1][rank + 1]
            heapq.heappush(heap, (-sibling, pushed, parent, depth, rank + 1, above))
        if depth < len(ranked_probs):
            child = value * ranked_probs[depth][0]
            heapq.heappush(heap, (-child, pushed + 1, len(shape.parents), depth + 1, 0, value))
        pushed += 2
    return shape


@dataclass(frozen=True, slots=True)
class SampledChildren:
    """The children that were drawn, where a tree has one such child under each inner node.

    Attributes:
        laws (`torch.Tensor` of shape `(n, V)`, float32): what each was drawn from: its position's marginal without the tokens
            of its siblings, normalised.
        row_of (`list[dict[int, int]]`): for each batch row, from inner node to its row in `laws`.
        token_of (`list[dict[int, int]]`): for each batch row, from inner node to the token that was drawn under it.
        on_visit (`Callable`, *optional*): told a row of `laws` and the target's law there, for each inner node that is
            reached; what it learns may change later drafts, never this one.
    """

    laws: torch.Tensor
    row_of: list[dict[int, int]]
    token_of: list[dict[int, int]]
    on_visit: Callable[[int, torch.Tensor], None] | None = None


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens as a tree for every row of a batch; siblings differ.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, N)`, int64): of nodes 1 to N; rows with fewer nodes end in filler.
        parents (`list[list[int]]`): for each row, the parents of its nodes 1, 2, ...; filler has none.
        drafts (`list[list[list[int]]]`, *optional*): for each row, the nodes of each joint draft, root to leaf.
        sampled (`SampledChildren`, *optional*): `None`: every node is a function of the committed text, or the rule does not
            ask what it was drawn from.
        values (`list[list[float]]`, *optional*): for each row, the path probabilities of its nodes by their ranks.
    """

    tokens: torch.Tensor
    parents: list[list[int]]
    drafts: list[list[list[int]]] | None = None
    sampled: SampledChildren | None = None
    values: list[list[float]] | None = None

    @classmethod
    def of_rows(
        cls,
        tokens: list[list[int]],
        parents: list[list[int]],
        device: torch.device,
        drafts: list[list[list[int]]] | None = None,
        sampled: SampledChildren | None = None,
        values: list[list[float]] | None = None,
    ) -> "DraftTree":
        """Join rows of different sizes."""
        most = max(map(len, tokens))
        padded = [row + [0] * (most - len(row)) for row in tokens]
        return cls(torch.tensor(padded, device=device).view(len(tokens), most), parents, drafts, sampled, values)

    @property
    def num_tokens(self) -> int:
        """N, the nodes of the largest row."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> "DraftTree":
        """Return the tree with its tokens on another device."""
        if self.tokens.device == device:
            return self
        return replace(self, tokens=self.tokens.to(device))

    def num_drafted(self) -> list[int]:
        """Return the nodes of each row."""
        return [len(parents) for parents in self.parents]

    def deepest(self) -> list[int]:
        """Return the longest path of each row."""
        return [max(row) for row in self._depth_rows()]

    def outcome(self, additions: list[list[int]]) -> list[list[bool]]:
        """Return, for each row, which nodes stand in the text.

        Args:
            additions (`list[list[int]]`): what has been added to each row since.
        """
        rows = []
        for children, parents, added in zip(self.children(), self.parents, additions, strict=True):
            node, stands = 0, [False] * len(parents)
            for token in added:
                if (node := children.get((node, token), 0)) == 0:
                    break
                stands[node - 1] = True
            rows.append(stands)
        return rows

    def drawn(self) -> list[list[bool]]:
        """Return, for each row, which nodes' tokens were drawn: the last child of each inner node, where any is."""
        if self.sampled is None:
            return [[False] * len(parents) for parents in self.parents]
        rows = []
        for parents in self.parents:
            last_under = {parent: node for node, parent in enumerate(parents)}
            rows.append([last_under[parent] == node for node, parent in enumerate(parents)])
        return rows

    def children(self) -> list[dict[tuple[int, int], int]]:
        """Return, for each row, from (node, token) to the child of that node with that token."""
        return [
            {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=False), 1)}
            for parents, tokens in zip(self.parents, self.tokens.tolist(), strict=True)
        ]

    def depths(self) -> torch.Tensor:
        """Return how far behind the anchor each node stands, `(B, N + 1)` int64: 0 for the anchor and for filler."""
        size = self.num_tokens + 1
        rows = [row + [0] * (size - len(row)) for row in self._depth_rows()]
        return torch.tensor(rows, device=self.tokens.device)

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
        return mask.view(len(self.parents), size, size).to(self.tokens.device)


def merge_drafts(drafts: list[list[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge joint drafts into a trie: equal beginnings are one path.

    Args:
        drafts (`list[list[int]]`): K drafts, each a list of tokens.

    Returns:
        `tuple`: tokens and parents of nodes 1, 2, ..., and for each draft its nodes, root to leaf.
    """
    tokens: list[int] = []
    parents: list[int] = []
    node_of: dict[tuple[int, int], int] = {}
    paths = []
    for draft in drafts:
        node, path = 0, []
        for token in draft:
            key = (node, token)
            if key not in node_of:
                tokens.append(token)
                parents.append(node)
                node_of[key] = len(tokens)
            node = node_of[key]
            path.append(node)
        paths.append(path)
    return tokens, parents, paths

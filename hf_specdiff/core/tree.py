"""Which nodes a draft tree has: the most probable prefixes under some marginals, or joint drafts merged into a trie.

Letters: K drafts. Node 0 is the anchor; parents come before children. Knows plain numbers; draws nothing.
"""

import heapq
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

# In the place of a rank: the token was copied (see `copies.py`).
COPIED = -1


class Copied(NamedTuple):
    """A token of a copied branch, as the tree knows it.

    Attributes:
        rate (`float`): how likely it stands if those before it do.
        rank (`int`, *optional*): where it is among its position's tokens by probability; `None`: behind all that are known.
        scale (`float`): what is left to the other tokens of its position, over what they had by themselves.
    """

    rate: float
    rank: int | None
    scale: float


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The nodes of one row, without tokens: a tree over window positions and ranks.

    Attributes:
        parents (`list[int]`): of nodes 1, 2, ...: index of the parent.
        depths (`list[int]`): of nodes 1, 2, ...: 1-based window position.
        ranks (`list[int]`): of nodes 1, 2, ...: the token is the `rank`-th most probable one of its position, from 0; or
            `COPIED`.
        values (`list[float]`): of nodes 1, 2, ...: probability of the path under the marginals.
    """

    parents: list[int]
    depths: list[int]
    ranks: list[int]
    values: list[float]

    def first(self, count: int) -> "TreeShape":
        """Return the first so many nodes: parents come before children, so they are a tree too."""
        return TreeShape(self.parents[:count], self.depths[:count], self.ranks[:count], self.values[:count])

    def copied(self) -> list[int]:
        """Return the nodes of the copied branch, root to leaf."""
        return [node for node, rank in enumerate(self.ranks, 1) if rank == COPIED]

    def depth_first_order(self) -> list[int]:
        """Return the nodes, counted from 0, in depth-first order, the more probable child first.

        The most probable path then has nodes 1, 2, 3, ...: where it is accepted, its keys and values already lie where they
        belong.
        """
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents, 1):
            children.setdefault(parent, []).append(node)
        order, stack = [], children.get(0, [])[::-1]
        while stack:
            node = stack.pop()
            order.append(node - 1)
            stack += children.get(node, [])[::-1]
        return order

    def in_order(self, order: list[int]) -> "TreeShape":
        """Return the same tree with its nodes, counted from 0, in another order; parents must stay before children."""
        place = {0: 0} | {node + 1: number for number, node in enumerate(order, 1)}
        return TreeShape(
            [place[self.parents[node]] for node in order],
            [self.depths[node] for node in order],
            [self.ranks[node] for node in order],
            [self.values[node] for node in order],
        )

    def depth_first(self) -> "TreeShape":
        """Return the same tree with its nodes in depth-first order; see `depth_first_order`."""
        return self.in_order(self.depth_first_order())


def best_first(ranked_probs: list[list[float]], budget: int, smallest: float = 0.0, copied: Sequence[Copied] = ()) -> TreeShape:
    """Return the `budget` most probable prefixes under a product of marginals, most probable first.

    A prefix's probability is the product of its tokens', so no prefix comes before its parent, and among the trees of so many
    nodes none has a larger expected accepted length under the marginals.

    Args:
        ranked_probs (`list[list[float]]`): for each window position the probabilities of its tokens, falling.
        budget (`int`): most nodes.
        smallest (`float`): prefixes of at most this probability are left out.
        copied (`Sequence[Copied]`): one more branch, perhaps longer than the window: where its own path leads, a copied token
            stands with its own rate, and what is left of the marginal goes on behind it.

    Returns:
        `TreeShape`: fewer nodes where there are not so many prefixes of positive probability.

    Source: arXiv:2604.12989, Algorithm 1.
    """
    shape = TreeShape([], [], [], [])
    # Minus value, tie-break, parent, depth, rank, what siblings are multiplied with, the copied sibling.
    heap: list[tuple[float, int, int, int, int, float, Copied | None]] = []
    order = count()

    def offer(parent: int, depth: int, rank: int, above: float, beside: Copied | None) -> None:
        if beside is not None and rank == beside.rank:
            rank += 1
        if depth <= len(ranked_probs) and rank < len(ranked_probs[depth - 1]):
            value = above * ranked_probs[depth - 1][rank]
            heapq.heappush(heap, (-value, next(order), parent, depth, rank, above, beside))

    def offer_children(parent: int, depth: int, value: float, *, is_copied: bool) -> None:
        beside = copied[depth - 1] if is_copied and depth <= len(copied) else None
        if beside is not None:
            heapq.heappush(heap, (-value * beside.rate, next(order), parent, depth, COPIED, value, beside))
            value *= beside.scale
        offer(parent, depth, 0, value, beside)

    offer_children(0, 1, 1.0, is_copied=True)
    while heap and len(shape.parents) < budget:
        negative, _, parent, depth, rank, above, beside = heapq.heappop(heap)
        if -negative <= smallest:
            break
        shape.parents.append(parent)
        shape.depths.append(depth)
        shape.ranks.append(rank)
        shape.values.append(-negative)
        if rank != COPIED:
            offer(parent, depth, rank + 1, above, beside)
        offer_children(len(shape.parents), depth + 1, -negative, is_copied=rank == COPIED)
    return shape


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


def last_children(parents: list[int], copied: Collection[int] = ()) -> list[bool]:
    """Return which of the nodes 1, 2, ... are the last child of their parent, copied ones left out.

    Args:
        parents (`list[int]`): of nodes 1, 2, ...
        copied (`Collection[int]`): the copied nodes.

    Returns:
        `list[bool]`: one for each node; the last child is the one that is drawn where one of them is.
    """
    last_under = {parent: node for node, parent in enumerate(parents, 1) if node not in copied}
    return [last_under.get(parent) == node for node, parent in enumerate(parents, 1)]

"""Which nodes a draft tree has: the most probable prefixes under some marginals, or joint drafts merged into a trie.

Letters: B batch, G drafted positions, R ranks of a position, N nodes, K drafts, V vocabulary. Node 0 is the anchor; parents
come before children. Knows plain numbers, and for `plant`, which builds the same trees on a device, tensors; draws nothing.
"""

import heapq
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch

from .draft import TreeLayout

# In the place of a rank: the token was copied (see `copies.py`).
COPIED = -1
# Levels are sorted whole, which takes too long for larger trees.
MOST_NODES = 128


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


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Prefixes, `(B, n)` each: probability, index of the parent among all (0: the anchor), window position, rank."""

    values: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ranks: torch.Tensor

    def pick(self, index: torch.Tensor) -> "_Nodes":
        return _Nodes(*(part.gather(1, index) for part in (self.values, self.parents, self.depths, self.ranks)))


def plant(marginals: torch.Tensor, budget: int) -> tuple[torch.Tensor, TreeLayout]:
    """Return the `budget` most probable prefixes under a product of marginals as a tree, in depth-first order.

    Where prefixes are exactly as probable, it may take another one of them than `best_first` does.

    Args:
        marginals (`torch.Tensor` of shape `(B, G, V)`, float32): of one pass, on a device that knows float64.
        budget (`int`): most nodes, at most `MOST_NODES`.

    Returns:
        `tuple`: tokens `(B, N)` int64 and their layout; N is the budget, or all prefixes if there are not as many.
    """
    probs, tokens = marginals.topk(min(budget, marginals.shape[-1]), dim=-1)
    nodes = _best(_levels(probs.double(), budget), budget)  # the products that the host would compute
    mask, order, place = _depth_first(nodes.parents)
    parents = place.gather(1, nodes.parents.clamp(min=0)).masked_fill(nodes.parents < 0, -1)
    index = order[:, 1:] - 1
    depths = nodes.depths.gather(1, index)
    ids = tokens.flatten(1).gather(1, (depths - 1).clamp(min=0) * tokens.shape[-1] + nodes.ranks.gather(1, index))
    depths = torch.nn.functional.pad(depths, (1, 0))
    mask = mask.gather(1, order[:, :, None].expand_as(mask)).gather(2, order[:, None].expand_as(mask))
    return ids, TreeLayout(parents.gather(1, index), depths, mask)


def _levels(probs: torch.Tensor, budget: int) -> _Nodes:
    """Return the most probable prefixes of each length, at most `budget` of each, shorter ones first.

    No prefix is more probable than the one that it goes on from, so among the most probable of all there are no others.
    """
    num_rows, gamma, num_ranks = probs.shape
    values, first = probs.new_ones(num_rows, 1), 0  # of the level before, and the index of its first node
    levels = []
    for depth in range(1, gamma + 1):
        products = (values[:, :, None] * probs[:, depth - 1, None]).flatten(1)
        # Stable: of equally probable siblings the ones of the lower ranks.
        values, found = products.sort(dim=1, descending=True, stable=True)
        values, found = values[:, :budget], found[:, :budget]
        levels.append(_Nodes(values, first + found // num_ranks, torch.full_like(found, depth), found % num_ranks))
        first += 1 if depth == 1 else levels[-2].values.shape[1]
    return _Nodes(*(torch.cat(parts, dim=1) for parts in zip(*map(_parts, levels), strict=True)))


def _parts(nodes: _Nodes) -> tuple[torch.Tensor, ...]:
    return nodes.values, nodes.parents, nodes.depths, nodes.ranks


def _best(nodes: _Nodes, budget: int) -> _Nodes:
    """Return the most probable nodes, most probable first, their parents counted among themselves; -1 for filler."""
    order = nodes.values.sort(dim=1, descending=True, stable=True).indices[:, :budget]  # stable: parents before children
    count = torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order)
    place = torch.zeros_like(nodes.parents).scatter(1, order, count)
    place = torch.nn.functional.pad(place, (1, 0))  # the anchor
    best = nodes.pick(order)
    is_node = best.values > 0
    parents = place.gather(1, best.parents).masked_fill(~is_node, -1)
    return _Nodes(best.values, parents, best.depths * is_node, best.ranks)


def _depth_first(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return who is whose ancestor, and the order that visits the more probable child first.

    Args:
        parents (`torch.Tensor` of shape `(B, N)`, int64): of nodes 1 to N; -1 for filler.

    Returns:
        `tuple`: mask `(B, N + 1, N + 1)` bool, nodes by place and place by node `(B, N + 1)` int64.
    """
    num_rows, size = parents.shape[0], parents.shape[1] + 1
    above = torch.nn.functional.pad(parents, (1, 0), value=-1)  # (B, N + 1)
    nodes = torch.arange(size, device=parents.device)
    is_parent = (above[:, :, None] == nodes).float()
    mask, jump = is_parent + torch.eye(size, device=parents.device), is_parent
    # Powers of "is parent of": ancestors one, two, four, ... levels up.
    for _ in range((size - 1).bit_length()):
        jump = jump @ jump
        mask = mask + mask @ jump
    num_below = mask.sum(dim=1)  # itself included
    is_earlier = (above[:, :, None] == above[:, None]) & (nodes < nodes[:, None]) & (above >= 0)[:, :, None]
    # A node comes one behind its parent, and behind all that its earlier siblings hold.
    steps = (1 + (is_earlier * num_below[:, None]).sum(dim=2)).masked_fill(above < 0, 0.0)
    place = (mask @ steps[:, :, None]).squeeze(2).long()
    is_filler = (above < 0) & (nodes > 0)
    place = torch.where(is_filler, nodes, place)
    return mask > 0, torch.zeros_like(place).scatter(1, place, nodes.expand(num_rows, -1)), place

"""Many drafts from a drafter whose heads know the token before: each node's law is given the tokens that lead to it.

Letters: B batch, G drafted positions, n nodes, V vocabulary, K drafts. The counterpart of `shapes.py`, where one pass's
marginals serve all nodes of a depth. Draws through `sampling` only.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from itertools import accumulate
from itertools import count
from itertools import pairwise
from typing import Any
from typing import NamedTuple

import torch

from .copies import Copies
from .copies import Copy
from .draft import Conditionals
from .draft import Draft
from .draft import DraftTree
from .draft import SampledChildren
from .sampling import draw
from .sampling import to_probs
from .speculation import SpeculationConfig
from .text import at_places
from .text import to_device
from .tree import COPIED
from .tree import Copied
from .tree import TreeShape
from .tree import merge_drafts

# Ranks of a law that are read back first: a tree seldom has so many siblings.
FEW_RANKS = 16
# Laws that are asked for at once for each node that the tree may have, and numbers in all of them at most: laws of a large
# vocabulary are asked for as they are needed.
TABLE_SHARE = 2
MOST_NUMBERS = 2**20


@dataclass
class _Found:
    """A row's nodes in the order in which they were found; the root, number 0, is the anchor."""

    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    ranks: list[int] = field(default_factory=lambda: [0])
    values: list[float] = field(default_factory=lambda: [1.0])
    tokens: list[int] = field(default_factory=lambda: [0])
    end: int = 0  # of the copied branch, as far as it has come

    def add(self, parent: int, rank: int, value: float, token: int) -> None:
        """Add a node."""
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ranks.append(rank)
        self.values.append(value)
        self.tokens.append(token)

    def copy_on(self, copy: Copy, smallest: float) -> None:
        """Let the copied branch go on behind the window, by the text alone."""
        for depth in range(self.depths[self.end], len(copy.tokens)):
            value = self.values[self.end] * copy.alone[depth]
            if value <= smallest:
                break
            self.add(self.end, COPIED, value, copy.tokens[depth])
            self.end = len(self.values) - 1

    def best(self, budget: int) -> list[int]:
        """Return the most probable nodes, the root not counted; sorting keeps the order, so parents precede children."""
        return sorted(range(1, len(self.values)), key=lambda node: -self.values[node])[:budget]

    def shape(self, budget: int) -> tuple[TreeShape, list[int]]:
        """Return the most probable nodes as a shape, and their tokens."""
        nodes = self.best(budget)
        number = {0: 0} | {node: place for place, node in enumerate(nodes, 1)}
        columns = [[getattr(self, name)[node] for node in nodes] for name in ("depths", "ranks", "values", "tokens")]
        return TreeShape([number[self.parents[node]] for node in nodes], *columns[:3]), columns[3]


def sample_drafts(laws: Conditionals, speculation: SpeculationConfig, copies: Copies | None = None) -> DraftTree:
    """Draw K joint drafts from left to right and merge them into a trie; see `shapes.draft_samples`."""
    count = speculation.num_drafts
    rows = [row for row in range(laws.num_rows) for _ in range(count)]
    previous, memory, drawn = laws.anchors.repeat_interleave(count), None, []
    for index in range(laws.gamma):
        scores, memory = laws.step(index, rows, previous, memory)
        previous = draw(to_probs(scores, speculation.draft_temperature))
        drawn.append(previous)
    return merged_drafts(torch.stack(drawn, dim=1).unflatten(0, (-1, count)).tolist(), laws.anchors.device, copies)


def merged_drafts(drawn: list[list[list[int]]], device: torch.device, copies: Copies | None) -> DraftTree:
    """Merge each row's joint drafts `(B, K, G)` into a trie; what the row copies is one more, no longer than the others."""
    found = [[]] * len(drawn) if copies is None else [copy.tokens[: len(drawn[0][0])] for copy in copies.found]
    merged = [merge_drafts([*drafts, copy] if copy else drafts) for drafts, copy in zip(drawn, found, strict=True)]
    tokens, parents, paths = (list(column) for column in zip(*merged, strict=True))
    copied = [row[-1] if copy else [] for row, copy in zip(paths, found, strict=True)]
    return DraftTree.of_rows(tokens, parents, device, paths, copied=None if copies is None else copied)


def likeliest_chains(laws: Conditionals) -> list[TreeShape]:
    """Return each row's likeliest chain as a tree, with the probability that it is right so far, position by position.

    The chain that is drawn may be another one: this one hangs on the committed text alone, as what a chain's length is settled
    by must.

    Args:
        laws (`Conditionals`): of one pass.

    Returns:
        `list[TreeShape]`: G nodes for each row, each the child of the one before it.
    """
    rows, previous, memory, probs = list(range(laws.num_rows)), laws.anchors, None, []
    for index in range(laws.gamma):
        scores, memory = laws.step(index, rows, previous, memory)
        law = to_probs(scores)
        best = law.max(dim=-1)
        probs.append(best.values * laws.trust(index, rows, previous, law)[:, 0])
        previous = best.indices
    return chain_shapes(torch.stack(probs, dim=1))


def chain_shapes(probs: torch.Tensor) -> list[TreeShape]:
    """Return each row's chain as a tree, with the probability that it is right so far, position by position.

    Args:
        probs (`torch.Tensor` of shape `(B, G)`, float32): of each token to be right where those before it are.

    Returns:
        `list[TreeShape]`: G nodes for each row, each the child of the one before it.
    """
    gamma = probs.shape[1]
    depths = list(range(1, gamma + 1))
    return [TreeShape(list(range(gamma)), depths, [0] * gamma, row) for row in probs.cumprod(dim=-1).tolist()]


def conditional_tree(
    laws: Conditionals,
    speculation: SpeculationConfig,
    choose: Callable[[list[TreeShape]], int] | None = None,
    smallest: float = 0.0,
    temper: Callable[[torch.Tensor], torch.Tensor] | None = None,
    copies: Copies | None = None,
) -> Draft | DraftTree:
    """Take the most probable prefixes as a tree; for the ratio rule, draw the last child of each inner node.

    Which nodes there are is settled before anything is drawn. Behind a drawn child the laws are others than those that settled
    it: there the nodes keep their places and ranks, and get the tokens of these ranks.

    Args:
        laws (`Conditionals`): of one pass.
        speculation (`SpeculationConfig`): the budget, the temperature of the laws, and the rule.
        choose (`Callable`, *optional*): as `shapes.draft_tree`.
        smallest (`float`): paths of at most this probability are left out.
        temper (`Callable`, *optional*): from the laws of drawn children `(n, V)` to those that they are drawn from.
        copies (`Copies`, *optional*): as `shapes.draft_tree`.

    Returns:
        `DraftTree`: with `sampled` for the ratio rule; or a `Draft` of nothing, where no node is worth it.

    Lossless when: as the trees of `shapes.draft_tree`; a child's law hangs on the path to it and on nothing else.
    """
    if laws.marginals is None:
        found = [row.shape(speculation.tree_budget) for row in _most_probable(laws, speculation, smallest, copies)]
    else:
        found = _best_first(laws, speculation, smallest, copies)
    shapes, tokens = (list(column) for column in zip(*found, strict=True))
    if choose is not None:
        count = choose(shapes)
        shapes, tokens = [shape.first(count) for shape in shapes], [row[:count] for row in tokens]
    if not any(tokens):
        return Draft.nothing(laws.anchors[:, None])
    orders = [shape.depth_first_order() for shape in shapes]
    shapes = [shape.in_order(order) for shape, order in zip(shapes, orders, strict=True)]
    tokens = [[row[node] for node in order] for row, order in zip(tokens, orders, strict=True)]
    sampled = _filled(shapes, tokens, laws, speculation, temper) if speculation.acceptance == "ratio" else None
    parents, values = [shape.parents for shape in shapes], [shape.values for shape in shapes]
    copied = None if copies is None else [shape.copied() for shape in shapes]
    return DraftTree.of_rows(tokens, parents, laws.anchors.device, sampled=sampled, values=values, copied=copied)


class _Law(NamedTuple):
    """What is read back of the law of a position given the token before it.

    Attributes:
        probs (`list[float]`): its largest probabilities, falling.
        tokens (`list[int]`): whose they are.
        copied (`float`): the probability of the token that the row's copy has at this position.
        trust (`float`): what they are to be multiplied with; see `Conditionals.trust`.
    """

    probs: list[float]
    tokens: list[int]
    copied: float
    trust: float


# Row, position, token before.
_Key = tuple[float, float, float]


class _Tables:
    """Laws given each likely token before, of all positions in one go; others as they are asked for.

    Args:
        laws (`Conditionals`): with `marginals`.
        temperature (`float`): of the laws.
        num_ranks (`int`): probabilities to read back of each.
        most (`int`): laws of each row to ask for at once.
        copies (`list[Copy]`): of each row, or none.
    """

    def __init__(self, laws: Conditionals, temperature: float, num_ranks: int, most: int, copies: list[Copy]) -> None:
        self.laws, self.temperature, self.num_ranks = laws, temperature, num_ranks
        copied = [copy.tokens[: laws.gamma] for copy in copies]
        padded = [token for own in copied for token in own + [0] * (laws.gamma - len(own))]
        self._copied: torch.Tensor | None = None  # by row and position
        if any(copied):
            self._copied = to_device(padded, laws.anchors.device).view(-1, laws.gamma)
        # Where a law's numbers begin: in which table, and at which of its places.
        self._places: dict[_Key, tuple[list[list[float]], int]] = {}
        self._ask(*laws.likely(copied, most))

    def law(self, key: _Key) -> _Law | None:
        """Return the law of one position of a row given the token before it; `None`: it has not been asked for."""
        if key not in self._places:
            return None
        (ids, probs, trust, copied), place = self._places[key]
        start, end = place * self.num_ranks, (place + 1) * self.num_ranks
        return _Law(
            probs[start:end],
            [int(token) for token in ids[start:end]],
            copied[place] if copied else 0.0,
            trust[place] if trust else 1.0,
        )

    def ask(self, keys: list[_Key]) -> None:
        """Ask for laws that were not foreseen."""
        rows, positions, tokens = to_device(list(zip(*keys, strict=True)), self.laws.anchors.device)
        self._ask(positions, rows, tokens)

    def _ask(self, positions: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        scores, ids = self.laws.drafted_scores(positions, rows, tokens)
        law = to_probs(scores, self.temperature)
        probs, ranked = law.topk(self.num_ranks, dim=-1)
        own = torch.cat([rows, positions, tokens, (ranked if ids is None else ids[ranked]).flatten()])
        parts = [own.to(law.dtype), probs.flatten()]
        has_trust = self.laws.confidence is not None
        if has_trust:
            parts.append(self.laws.trust(positions, rows, tokens, law)[:, 0])
        if self._copied is not None:
            parts.append(_probabilities(law, ids, at_places(self._copied, rows, positions)))
        # One device sync. Ids are exact in float32, as far as vocabularies go (2 ** 24).
        numbers = torch.cat(parts).tolist()
        size, many = len(tokens), probs.numel()
        ends = [*accumulate([size, size, size, many, many, size * has_trust]), len(numbers)]
        columns = [numbers[start:end] for start, end in pairwise([0, *ends])]
        # Keys are whole numbers, which are found whether they are integers or not.
        for place, key in enumerate(zip(*columns[:3], strict=True)):
            self._places[key] = (columns[3:], place)


def _probabilities(law: torch.Tensor, ids: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Return what laws `(n, m)` say of one token each, `(n,)`; 0 of a token that is not among `ids` `(m,)`."""
    if ids is None:
        return law.gather(-1, tokens[:, None])[:, 0]
    places = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return law.gather(-1, places[:, None])[:, 0] * (ids[places] == tokens)


def _best_first(
    laws: Conditionals, speculation: SpeculationConfig, smallest: float, copies: Copies | None
) -> list[tuple[TreeShape, list[int]]]:
    """Return each row's most probable prefixes and their tokens, from tables of the likely laws."""
    anchors, most = laws.anchors.tolist(), min(speculation.tree_budget, laws.width)
    found = []
    for num_ranks in sorted({min(FEW_RANKS, most), most}):
        own = [] if copies is None else copies.found
        # A tree has fewer inner nodes than nodes, but not all of them are foreseen.
        num_foreseen = min(TABLE_SHARE * speculation.tree_budget, MOST_NUMBERS // laws.width)
        tables = _Tables(laws, speculation.draft_temperature, num_ranks, num_foreseen, own)
        found = [
            _Search(tables, row, copies).run(anchor, speculation.tree_budget, smallest) for row, anchor in enumerate(anchors)
        ]
        # Where the last rank was not taken, the one after it could not have been.
        if all(max(shape.ranks, default=0) < num_ranks - 1 for shape, _ in found):
            break
    return found


class _Search:
    """A row's best-first tree: `tree.best_first`, each node's law being given its token.

    Args:
        tables (`_Tables`): the laws.
        row (`int`): of the batch.
        copies (`Copies`, *optional*): with the row's copy.
    """

    def __init__(self, tables: _Tables, row: int, copies: Copies | None) -> None:
        self.tables, self.row, self.copies = tables, row, copies
        self.copy = None if copies is None else copies.found[row]
        # Minus value, tie-break, parent, depth, rank, what siblings are multiplied with, their law, the copied one's rank.
        self._heap: list[tuple[float, int, int, int, int, float, _Law | None, int | None]] = []
        self._order = count()
        self._missing = 0  # nodes that the tree may still have

    def run(self, anchor: int, budget: int, smallest: float) -> tuple[TreeShape, list[int]]:
        """Return at most `budget` nodes, most probable first, all of more than `smallest` probability; and their tokens."""
        shape = TreeShape([], [], [], [])
        tokens: list[int] = []
        self._offer_children(0, 1, anchor, 1.0, is_copied=True)
        while self._heap and len(tokens) < budget:
            negative, _, parent, depth, rank, above, law, beside = heapq.heappop(self._heap)
            if -negative <= smallest:
                break
            if rank == COPIED:
                assert self.copy is not None
                token = self.copy.tokens[depth - 1]
            else:
                assert law is not None
                token = law.tokens[rank]
                self._offer(parent, depth, rank + 1, above, law, beside)
            shape.parents.append(parent)
            shape.depths.append(depth)
            shape.ranks.append(rank)
            shape.values.append(-negative)
            tokens.append(token)
            # The last node has no children; what a copy has behind it is weighed, which teaches how far to trust copies.
            if len(tokens) < budget or rank == COPIED:
                self._missing = budget - len(tokens)
                self._offer_children(len(tokens), depth + 1, token, -negative, is_copied=rank == COPIED)
        return shape, tokens

    def _offer(self, parent: int, depth: int, rank: int, above: float, law: _Law, beside: int | None) -> None:
        """Offer a child by its rank; the copied one has its own place."""
        rank += rank == beside
        if rank < len(law.probs):
            self._push(-above * law.probs[rank], parent, depth, rank, above, law, beside)

    def _offer_children(self, parent: int, depth: int, token: int, value: float, *, is_copied: bool) -> None:
        """Offer a node's likeliest child, and the copied one where the copy leads through the node."""
        is_copied = is_copied and self.copy is not None and depth <= len(self.copy.tokens)
        if depth > self.tables.laws.gamma:
            if is_copied:  # behind the window, by the text alone
                assert self.copy is not None
                self._push(-value * self.copy.alone[depth - 1], parent, depth, COPIED, value, None, None)
            return
        law, beside = self._law((self.row, depth - 1, token)), None
        if is_copied:
            assert self.copies is not None
            copied = self.copies.weigh(self.row, depth - 1, law.copied, law.probs, law.tokens)
            self._push(-value * copied.rate, parent, depth, COPIED, value, law, copied.rank)
            value, beside = value * copied.scale, copied.rank
        self._offer(parent, depth, 0, value * law.trust, law, beside)

    def _law(self, key: _Key) -> _Law:
        """Return a law; one that was not foreseen is asked for together with those that will soon be wanted."""
        found = self.tables.law(key)
        if found is None:
            self.tables.ask([key, *self._next_laws()])
            found = self.tables.law(key)
            assert found is not None
        return found

    def _next_laws(self) -> list[_Key]:
        """Return those behind the likeliest nodes that were offered, as many as the tree may still have."""
        keys: list[_Key] = []
        for _, _, _, depth, rank, _, law, _ in heapq.nsmallest(self._missing, self._heap):
            if depth < self.tables.laws.gamma:
                if rank == COPIED:
                    assert self.copy is not None
                    token = self.copy.tokens[depth - 1]
                else:
                    assert law is not None
                    token = law.tokens[rank]
                key = (self.row, depth, token)
                if self.tables.law(key) is None:
                    keys.append(key)
        return keys

    def _push(self, negative: float, *others: Any) -> None:
        heapq.heappush(self._heap, (negative, next(self._order), *others))


def _most_probable(laws: Conditionals, speculation: SpeculationConfig, smallest: float, copies: Copies | None) -> list[_Found]:
    """Return for each row nodes among which its most probable prefixes are, found depth by depth."""
    budget = speculation.tree_budget
    found = [_Found() for _ in range(laws.num_rows)]
    frontier = [(row, 0) for row in range(laws.num_rows)]
    previous, memory = laws.anchors, None
    for depth in range(1, laws.gamma + 1):
        rows = [row for row, _ in frontier]
        scores, memory = laws.step(depth - 1, rows, previous, memory)
        law = to_probs(scores, speculation.draft_temperature)
        probs, tokens = law.topk(min(budget, scores.shape[-1]), dim=-1)
        copied = {} if copies is None else _copied_children(copies, found, frontier, law, probs, tokens)
        probs = probs * laws.trust(depth - 1, rows, previous, law)
        places: dict[tuple[int, int], int] = {}  # from a new node to its parent's place in the frontier
        for row, nodes in enumerate(found):
            own = [place for place, other in enumerate(rows) if other == row]
            _grow(nodes, own, [frontier[place][1] for place in own], probs, tokens, (budget, smallest), places, row, copied)
        kept = {(row, node) for row, nodes in enumerate(found) for node in nodes.best(budget) if nodes.depths[node] == depth}
        frontier = [node for node in places if node in kept]
        for row, node in frontier:
            if found[row].ranks[node] == COPIED:
                found[row].end = node
        if not frontier:
            break
        previous = to_device([found[row].tokens[node] for row, node in frontier], laws.anchors.device)
        memory = None if memory is None else memory[[places[node] for node in frontier]]
    for nodes, copy in zip(found, [] if copies is None else copies.found, strict=False):
        if nodes.depths[nodes.end] == laws.gamma:
            nodes.copy_on(copy, smallest)
    return found


def _copied_children(
    copies: Copies,
    found: list[_Found],
    frontier: list[tuple[int, int]],
    law: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
) -> dict[int, tuple[Copied, int]]:
    """Return the next copied tokens and what they are worth, by their parents' places in the frontier."""
    children = {}
    for place, (row, node) in enumerate(frontier):
        depth, copy = found[row].depths[node], copies.found[row]
        if node == found[row].end and depth < len(copy.tokens):
            token = copy.tokens[depth]
            copied = copies.weigh(row, depth, float(law[place, token]), probs[place].tolist(), tokens[place].tolist())
            children[place] = (copied, token)
    return children


def _grow(
    nodes: _Found,
    own: list[int],
    parents: list[int],
    probs: torch.Tensor,
    tokens: torch.Tensor,
    limits: tuple[int, float],
    places: dict[tuple[int, int], int],
    row: int,
    copied: dict[int, tuple[Copied, int]],
) -> None:
    """Add to a row the likeliest children of its frontier, no more of them than the tree may have nodes, and the copied one."""
    if not own:
        return
    budget, smallest = limits
    values = torch.tensor([nodes.values[node] for node in parents], dtype=torch.float64)[:, None] * probs[own].double().cpu()
    for number, place in enumerate(own):
        if place in copied:
            beside, token = copied[place]
            values[number] *= beside.scale
            if beside.rank is not None:
                values[number, beside.rank] = 0.0
            value = nodes.values[parents[number]] * beside.rate
            if value > smallest:
                places[row, len(nodes.values)] = place
                nodes.add(parents[number], COPIED, value, token)
    best, flat = values.flatten().topk(min(budget, values.numel()))
    # Ties in the order of ranks: a child stands behind its likelier siblings.
    order = sorted(zip((-best).tolist(), flat.tolist(), strict=True))
    ids = tokens[own].tolist()
    for value, at in order:
        place, rank = divmod(at, probs.shape[1])
        if -value <= smallest:
            continue
        places[row, len(nodes.values)] = own[place]
        nodes.add(parents[place], rank, -value, ids[place][rank])


def _filled(
    shapes: list[TreeShape],
    tokens: list[list[int]],
    laws: Conditionals,
    speculation: SpeculationConfig,
    temper: Callable[[torch.Tensor], torch.Tensor] | None,
) -> SampledChildren:
    """Draw each inner node's last child, depth by depth, and fill the nodes behind it; `tokens` is changed in place."""
    children: list[dict[int, list[int]]] = [{} for _ in shapes]
    for row, shape in enumerate(shapes):
        for node, parent in enumerate(shape.parents, 1):
            children[row].setdefault(parent, []).append(node)
    row_of: list[dict[int, int]] = [{} for _ in shapes]
    child_of: list[dict[int, int]] = [{} for _ in shapes]
    all_laws: list[torch.Tensor] = []
    all_natural: list[torch.Tensor] = []
    inner = [(row, 0) for row, found in enumerate(children) if found]
    previous, memory, index, num_laws = laws.anchors[[row for row, _ in inner]], None, 0, 0
    while inner and index < laws.gamma:
        scores, memory = laws.step(index, [row for row, _ in inner], previous, memory)
        law = to_probs(scores, speculation.draft_temperature)
        most = max(len(children[row][node]) for row, node in inner)
        ranked = law.topk(most, dim=-1).indices.tolist()
        families = [_by_rank(shapes[row], children[row][node]) for row, node in inner]
        siblings = []
        for place, ((row, _), family) in enumerate(zip(inner, families, strict=True)):
            settled = [tokens[row][child - 1] for child in family if shapes[row].ranks[child - 1] == COPIED]
            # The copied child comes first; the others get the likeliest tokens but its own, the last one is drawn.
            likeliest = (token for token in ranked[place] if token not in settled)
            for child in family[len(settled) : -1]:
                tokens[row][child - 1] = next(likeliest)
            kept = family if len(settled) == len(family) else family[:-1]
            siblings += [(place, tokens[row][child - 1]) for child in kept]
        natural = _without(law, siblings)
        drawn_from = natural if temper is None else temper(natural)
        for place, (((row, node), family), token) in enumerate(
            zip(zip(inner, families, strict=True), draw(drawn_from).tolist(), strict=True)
        ):
            if shapes[row].ranks[family[-1] - 1] == COPIED:
                continue  # alone, and not drawn
            tokens[row][family[-1] - 1] = token
            row_of[row][node], child_of[row][node] = num_laws + place, family[-1]
        num_laws += len(inner)
        all_laws.append(drawn_from)
        all_natural.append(natural)
        behind = [
            (place, row, child)
            for place, ((row, _), family) in enumerate(zip(inner, families, strict=True))
            for child in family
            if child in children[row]
        ]
        inner = [(row, child) for _, row, child in behind]
        previous = to_device([tokens[row][child - 1] for row, child in inner], law.device)
        memory = None if memory is None else memory[[place for place, _, _ in behind]]
        index += 1
    return SampledChildren(torch.cat(all_laws), row_of, child_of, None if temper is None else torch.cat(all_natural))


def _without(law: torch.Tensor, siblings: list[tuple[int, int]]) -> torch.Tensor:
    """Return laws `(n, V)` without some tokens, normalised; where nothing is left, all others alike."""
    allowed = torch.ones_like(law, dtype=torch.bool)
    if siblings:
        index = to_device(siblings, law.device)
        allowed[index[:, 0], index[:, 1]] = False
    left = law * allowed
    mass = left.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, left / mass.clamp(min=torch.finfo(law.dtype).tiny), allowed / allowed.sum(-1, keepdim=True))


def _by_rank(shape: TreeShape, nodes: list[int]) -> list[int]:
    """Return siblings, the likelier before the others."""
    return sorted(nodes, key=lambda node: shape.ranks[node - 1])

"""Many drafts from a drafter whose heads know the token before: each node's law is given the tokens that lead to it.

Letters: B batch, G drafted positions, n nodes, V vocabulary, K drafts. The counterpart of `shapes.py`, where one pass's
marginals serve all nodes of a depth. Draws through `sampling` only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field

import torch

from .draft import Conditionals
from .draft import Draft
from .draft import DraftTree
from .draft import SampledChildren
from .sampling import draw
from .sampling import to_probs
from .speculation import SpeculationConfig
from .tree import TreeShape
from .tree import merge_drafts


@dataclass
class _Found:
    """A row's nodes in the order in which they were found; the root, number 0, is the anchor."""

    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    ranks: list[int] = field(default_factory=lambda: [0])
    values: list[float] = field(default_factory=lambda: [1.0])
    tokens: list[int] = field(default_factory=lambda: [0])

    def best(self, budget: int) -> list[int]:
        """Return the most probable nodes, the root not counted; sorting keeps the order, so parents precede children."""
        return sorted(range(1, len(self.values)), key=lambda node: -self.values[node])[:budget]

    def shape(self, budget: int) -> tuple[TreeShape, list[int]]:
        """Return the most probable nodes as a shape, and their tokens."""
        nodes = self.best(budget)
        number = {0: 0} | {node: place for place, node in enumerate(nodes, 1)}
        columns = [[getattr(self, name)[node] for node in nodes] for name in ("depths", "ranks", "values", "tokens")]
        return TreeShape([number[self.parents[node]] for node in nodes], *columns[:3]), columns[3]


def sample_drafts(laws: Conditionals, speculation: SpeculationConfig) -> DraftTree:
    """Draw K joint drafts from left to right and merge them into a trie; see `shapes.draft_samples`."""
    count = speculation.num_drafts
    rows = [row for row in range(laws.num_rows) for _ in range(count)]
    previous, memory, drawn = laws.anchors.repeat_interleave(count), None, []
    for index in range(laws.gamma):
        scores, memory = laws.step(index, rows, previous, memory)
        previous = draw(to_probs(scores / speculation.draft_temperature))
        drawn.append(previous)
    merged = [merge_drafts(drafts) for drafts in torch.stack(drawn, dim=1).unflatten(0, (-1, count)).tolist()]
    tokens, parents, drafts = (list(column) for column in zip(*merged, strict=True))
    return DraftTree.of_rows(tokens, parents, laws.anchors.device, drafts)


def conditional_tree(
    laws: Conditionals,
    speculation: SpeculationConfig,
    choose: Callable[[list[TreeShape]], int] | None = None,
    smallest: float = 0.0,
    temper: Callable[[torch.Tensor], torch.Tensor] | None = None,
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

    Returns:
        `DraftTree`: with `sampled` for the ratio rule; or a `Draft` of nothing, where no node is worth it.

    Lossless when: as the trees of `shapes.draft_tree`; a child's law hangs on the path to it and on nothing else.
    """
    found = _most_probable(laws, speculation, smallest)
    shapes, tokens = (list(column) for column in zip(*(row.shape(speculation.tree_budget) for row in found), strict=True))
    if choose is not None:
        count = choose(shapes)
        shapes, tokens = [shape.first(count) for shape in shapes], [row[:count] for row in tokens]
    if not any(tokens):
        return Draft.nothing(laws.anchors[:, None])
    sampled = _filled(shapes, tokens, laws, speculation, temper) if speculation.acceptance == "ratio" else None
    parents, values = [shape.parents for shape in shapes], [shape.values for shape in shapes]
    return DraftTree.of_rows(tokens, parents, laws.anchors.device, sampled=sampled, values=values)


def _most_probable(laws: Conditionals, speculation: SpeculationConfig, smallest: float) -> list[_Found]:
    """Return for each row nodes among which its most probable prefixes are, found depth by depth."""
    budget = speculation.tree_budget
    found = [_Found() for _ in range(laws.num_rows)]
    frontier = [(row, 0) for row in range(laws.num_rows)]
    previous, memory = laws.anchors, None
    for depth in range(1, laws.gamma + 1):
        rows = [row for row, _ in frontier]
        scores, memory = laws.step(depth - 1, rows, previous, memory)
        probs, tokens = to_probs(scores / speculation.draft_temperature).topk(min(budget, scores.shape[-1]), dim=-1)
        places: dict[tuple[int, int], int] = {}  # from a new node to its parent's place in the frontier
        for row, nodes in enumerate(found):
            own = [place for place, other in enumerate(rows) if other == row]
            _grow(nodes, own, [frontier[place][1] for place in own], probs, tokens, (budget, smallest), places, row)
        kept = {(row, node) for row, nodes in enumerate(found) for node in nodes.best(budget) if nodes.depths[node] == depth}
        frontier = [node for node in places if node in kept]
        if not frontier:
            break
        previous = torch.tensor([found[row].tokens[node] for row, node in frontier], device=laws.anchors.device)
        memory = None if memory is None else memory[[places[node] for node in frontier]]
    return found


def _grow(
    nodes: _Found,
    own: list[int],
    parents: list[int],
    probs: torch.Tensor,
    tokens: torch.Tensor,
    limits: tuple[int, float],
    places: dict[tuple[int, int], int],
    row: int,
) -> None:
    """Add to a row the likeliest children of its frontier, no more of them than the tree may have nodes."""
    if not own:
        return
    budget, smallest = limits
    values = torch.tensor([nodes.values[node] for node in parents], dtype=torch.float64)[:, None] * probs[own].double().cpu()
    best, flat = values.flatten().topk(min(budget, values.numel()))
    # Ties in the order of ranks: a child stands behind its likelier siblings.
    order = sorted(zip((-best).tolist(), flat.tolist(), strict=True))
    ids = tokens[own].tolist()
    for value, at in order:
        place, rank = divmod(at, probs.shape[1])
        if -value <= smallest:
            continue
        places[row, len(nodes.values)] = own[place]
        nodes.parents.append(parents[place])
        nodes.depths.append(nodes.depths[parents[place]] + 1)
        nodes.ranks.append(rank)
        nodes.values.append(-value)
        nodes.tokens.append(ids[place][rank])


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
    token_of: list[dict[int, int]] = [{} for _ in shapes]
    all_laws: list[torch.Tensor] = []
    all_natural: list[torch.Tensor] = []
    inner = [(row, 0) for row, found in enumerate(children) if found]
    previous, memory, index, num_laws = laws.anchors[[row for row, _ in inner]], None, 0, 0
    while inner:
        scores, memory = laws.step(index, [row for row, _ in inner], previous, memory)
        law = to_probs(scores / speculation.draft_temperature)
        most = max(len(children[row][node]) for row, node in inner)
        ranked = law.topk(most, dim=-1).indices.tolist()
        families = [_by_rank(shapes[row], children[row][node]) for row, node in inner]
        siblings = []
        for place, ((row, _), family) in enumerate(zip(inner, families, strict=True)):
            for rank, child in enumerate(family):
                tokens[row][child - 1] = ranked[place][rank]
            siblings += [(place, ranked[place][rank]) for rank in range(len(family) - 1)]
        natural = _without(law, siblings)
        drawn_from = natural if temper is None else temper(natural)
        for place, (((row, node), family), token) in enumerate(
            zip(zip(inner, families, strict=True), draw(drawn_from).tolist(), strict=True)
        ):
            tokens[row][family[-1] - 1] = token
            row_of[row][node], token_of[row][node] = num_laws + place, token
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
        previous = torch.tensor([tokens[row][child - 1] for row, child in inner], device=law.device)
        memory = None if memory is None else memory[[place for place, _, _ in behind]]
        index += 1
    return SampledChildren(torch.cat(all_laws), row_of, token_of, None if temper is None else torch.cat(all_natural))


def _without(law: torch.Tensor, siblings: list[tuple[int, int]]) -> torch.Tensor:
    """Return laws `(n, V)` without some tokens, normalised; where nothing is left, all others alike."""
    allowed = torch.ones_like(law, dtype=torch.bool)
    if siblings:
        index = torch.tensor(siblings, device=law.device)
        allowed[index[:, 0], index[:, 1]] = False
    left = law * allowed
    mass = left.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, left / mass.clamp(min=torch.finfo(law.dtype).tiny), allowed / allowed.sum(-1, keepdim=True))


def _by_rank(shape: TreeShape, nodes: list[int]) -> list[int]:
    """Return siblings, the likelier before the others."""
    return sorted(nodes, key=lambda node: shape.ranks[node - 1])

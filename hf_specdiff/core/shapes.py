"""From the marginals of one drafter pass to many drafts, and how many of their tokens are verified.

Letters: B batch, G drafted positions (gamma), V vocabulary, N nodes, K drafts. Draws through `sampling` only. One pass
gives a law for every position, whatever stands at the others, so many drafts cost no more passes than one.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from .budget import Budget
from .conditional import chain_shapes
from .conditional import conditional_tree
from .conditional import likeliest_chains
from .conditional import merged_drafts
from .conditional import sample_drafts
from .copies import Copies
from .copies import Copy
from .draft import Conditionals
from .draft import Draft
from .draft import DraftTree
from .draft import Outcome
from .draft import SampledChildren
from .sampling import draw
from .sampling import to_probs
from .speculation import SpeculationConfig
from .text import Text
from .text import to_device
from .tree import COPIED
from .tree import MOST_NODES
from .tree import Copied
from .tree import TreeShape
from .tree import best_first
from .tree import plant

# Of drawn children, and how fast earlier rounds are forgotten.
TEMPERATURES = (1.0, 0.7, 0.4, 0.2)
DECAY = 0.9
# Ranks of a position that are looked at first: sorting more of them takes longer, and a tree seldom has so many siblings.
FEW_RANKS = 16


class ChildTemperature:
    """At which temperature the drawn children of a tree are drawn: the one that agreed best with the target so far.

    A child drawn from q, its position's marginal without its siblings, is accepted where q and the target's law p overlap, with
    probability sum_x min(p(x), q(x)) (the siblings have q = 0 and are accepted with their p anyway). A marginal averages over
    all texts that may come before its position, while p knows the text: where p is nearly certain a colder q overlaps more,
    where it is not a warmer one does. Each node that verification reaches shows p, so what the other temperatures would have
    brought is known too.

    The choice is made between rounds, from what earlier rounds showed, and the tokens are drawn from the very law that the
    rule is given; so it changes how much is accepted and nothing else.
    """

    def __init__(self) -> None:
        self._value = 1.0
        self._num_rounds = 0
        # Of the last round, on the device still: they are read back together with the next one's marginals.
        self.unread: torch.Tensor | None = None
        self._overlaps = [0.0] * len(TEMPERATURES)

    @property
    def value(self) -> float:
        """The temperature of the next children."""
        if self.unread is not None:
            self.read(self.unread.tolist())
        return self._value

    def read(self, overlaps: list[float]) -> None:
        """Take in what `unread` holds: the overlaps of the last round, temperature by temperature."""
        self.unread = None
        self._overlaps = [DECAY * old + new for old, new in zip(self._overlaps, overlaps, strict=True)]
        self._value = TEMPERATURES[self._overlaps.index(max(self._overlaps))]

    def law(self, marginals: torch.Tensor) -> torch.Tensor:
        """Return what to draw this round's children from.

        Args:
            marginals (`torch.Tensor` of shape `(n, V)`, float32): of the children's positions without their siblings,
                normalised.

        Returns:
            `torch.Tensor` of shape `(n, V)`, float32.
        """
        return _tempered(marginals, self.value)

    def observe(self, outcome: Outcome) -> None:
        """Compare what was drawn from with the target's law, wherever the walk came; see `Outcome.target_laws`."""
        sampled = None if isinstance(outcome.draft, Draft) else outcome.draft.sampled
        if sampled is None or sampled.marginals is None:
            return
        self._num_rounds += 1
        # A text changes slowly, and comparing costs time: after the first rounds one in four tells enough.
        if not outcome.target_laws or (self._num_rounds > 4 and self._num_rounds % 4 != 0):
            return
        if self.unread is not None:
            self.read(self.unread.tolist())
        places = to_device([sampled.row_of[row][node] for row, node in outcome.target_laws], sampled.marginals.device)
        marginals = sampled.marginals[places]
        target_laws = torch.stack(list(outcome.target_laws.values())).to(marginals.device)
        self.unread = torch.stack([torch.minimum(target_laws, _tempered(marginals, t)).sum() for t in TEMPERATURES])


class DraftShaper:
    """Make drafts of the shape that was asked for from one pass's marginals, as large as pays where a budget says so.

    Args:
        speculation (`SpeculationConfig`): the shape and its settings.
        budget (`Budget`, *optional*): where the size is to follow the machine.
        copies (`Copies`, *optional*): where copied branches take part.
    """

    def __init__(self, speculation: SpeculationConfig, budget: Budget | None = None, copies: Copies | None = None) -> None:
        self.speculation = speculation
        self.budget = budget
        self.child_temperature = ChildTemperature() if speculation.is_tempered else None
        self.copies = copies

    def without_pass(self, text: Text, max_length: int | None) -> Draft | DraftTree | None:
        """Begin a round, and return its draft where that needs no pass of the drafter.

        Args:
            text (`Text`): committed.
            max_length (`int`, *optional*): most tokens of the finished text.

        Returns:
            `Draft` or `DraftTree`, *optional*: `None` where the drafter is to be asked.
        """
        copies = [] if self.copies is None else self.copies.look(text, max_length)
        if self.budget is None:
            return None
        is_wanted = self.budget.wants_draft(text.num_rows)
        if self.speculation.draft_shape == "chain":  # has the same length in each row
            copies = copies if all(copy.tokens for copy in copies) else []
        count = self.budget.choose_copied([copy.values() for copy in copies])
        if count > 0:
            return copied_draft(copies, count, text.tokens, self.speculation.draft_shape)
        return None if is_wanted else Draft.nothing(text.tokens)

    def chain_plan(
        self, scores: torch.Tensor, laws: Conditionals | None = None
    ) -> tuple[int, list[list[float]] | None, list[list[int]] | None]:
        """Return how much of a chain to verify, and which of its tokens are copied.

        It reads the marginals and the text alone, not the tokens that are drawn: a draft that is cut, or given up for a copy,
        because of a token it holds does not have the law that the ratio and the block rule count on.

        Args:
            scores (`torch.Tensor` of shape `(B, G, V)`, float32): logits of one pass.
            laws (`Conditionals`, *optional*): of the same pass, where the drafter's heads know the token before or how likely
                tokens are accepted.

        Returns:
            `tuple`: tokens, 0 to G; `Draft.values`, where a budget reads them; and, where copies take part, the tokens that
            each row's chain begins with: its copy's, where more of that is expected to stand, or none.
        """
        if self.budget is None and self.copies is None:
            return scores.shape[1], None, None
        shapes = chain_shapes(to_probs(scores).amax(dim=-1)) if laws is None else likeliest_chains(laws)
        copied = None
        if self.copies is not None:
            gains = self.budget.gains if self.budget is not None else lambda shape: shape.values
            with_copies = copied_chains(scores, shapes, self.copies)
            is_better = [sum(gains(new)) > sum(gains(old)) for new, old in zip(with_copies, shapes, strict=True)]
            shapes = [new if better else old for new, old, better in zip(with_copies, shapes, is_better, strict=True)]
            copied = [
                copy.tokens[: scores.shape[1]] if better else []
                for copy, better in zip(self.copies.found, is_better, strict=True)
            ]
        count = scores.shape[1] if self.budget is None else self.budget.choose(shapes)
        return count, [shape.values for shape in shapes], copied

    def draft(self, scores: torch.Tensor) -> Draft | DraftTree:
        """Return joint samples or a tree.

        Args:
            scores (`torch.Tensor` of shape `(B, G, V)`, float32): processed logits of one pass.

        Returns:
            `DraftTree`; or a `Draft` of nothing, where no node is worth it.
        """
        if self.speculation.draft_shape == "samples":
            return draft_samples(scores, self.speculation, self.copies)
        if self.budget is None:
            return draft_tree(scores, self.speculation, temperature=self.child_temperature, copies=self.copies)
        choose, smallest = self.budget.choose, self.budget.smallest_value
        return draft_tree(scores, self._within(self.budget), choose, smallest, self.child_temperature, self.copies)

    def draft_in_order(self, laws: Conditionals) -> Draft | DraftTree:
        """Return joint samples or a tree of a drafter whose heads know the token before.

        Args:
            laws (`Conditionals`): of one pass.

        Returns:
            as `draft`.
        """
        if self.speculation.draft_shape == "samples":
            return sample_drafts(laws, self.speculation, self.copies)
        temper = None if self.child_temperature is None else self.child_temperature.law
        if self.budget is None:
            return conditional_tree(laws, self.speculation, temper=temper, copies=self.copies)
        choose, smallest = self.budget.choose, self.budget.smallest_value
        return conditional_tree(laws, self._within(self.budget), choose, smallest, temper, self.copies)

    def _within(self, budget: Budget) -> SpeculationConfig:
        """Return the settings with a tree of no more nodes than the budget has room for: making it takes time too."""
        return replace(self.speculation, tree_budget=min(self.speculation.tree_budget, budget.room))

    def observe(self, outcome: Outcome) -> None:
        """Take in what became of the last draft; what is learnt may change later ones."""
        if self.child_temperature is not None:
            self.child_temperature.observe(outcome)
        if self.copies is not None:
            self.copies.observe(outcome)
        if self.budget is not None:
            self.budget.observe(outcome)


def copied_draft(copies: list[Copy], count: int, tokens: torch.Tensor, shape: str) -> Draft | DraftTree:
    """Return a draft of copied tokens alone, no longer than `count`; a chain is as long as each row's copy is."""
    if shape == "chain":
        count = min(count, *(len(copy.tokens) for copy in copies))
    rows = [copy.tokens[:count] for copy in copies]
    values = [copy.values()[:count] for copy in copies]
    copied = [list(range(1, len(row) + 1)) for row in rows]
    if shape == "chain":
        return Draft(torch.tensor(rows, device=tokens.device), None, has_prefix_law=True, values=values, copied=copied)
    parents = [list(range(len(row))) for row in rows]
    return DraftTree.of_rows(rows, parents, tokens.device, values=values, copied=copied)


def _tempered(laws: torch.Tensor, temperature: float) -> torch.Tensor:
    return laws if temperature == 1 else torch.softmax(laws.log() / temperature, dim=-1)


def draft_samples(scores: torch.Tensor, speculation: SpeculationConfig, copies: Copies | None = None) -> DraftTree:
    """Draw K joint drafts, each token from its position's marginal, and merge them into a trie.

    Args:
        scores (`torch.Tensor` of shape `(B, G, V)`, float32): processed logits of one pass.
        speculation (`SpeculationConfig`): K and the temperature to draw at.
        copies (`Copies`, *optional*): what each row copies is one more draft, no longer than the others.

    Returns:
        `DraftTree`: with `drafts`; where they begin alike they share nodes.

    Source: SpecDiff-2, arXiv:2511.00606, Algorithm 1, steps 1 to 3.
    """
    marginals = to_probs(scores, speculation.draft_temperature)
    drawn = draw(marginals[:, None].expand(-1, speculation.num_drafts, -1, -1))  # (B, K, G)
    return merged_drafts(drawn.tolist(), scores.device, copies)


def draft_tree(
    scores: torch.Tensor,
    speculation: SpeculationConfig,
    choose: Callable[[list[TreeShape]], int] | None = None,
    smallest: float = 0.0,
    temperature: ChildTemperature | None = None,
    copies: Copies | None = None,
) -> Draft | DraftTree:
    """Take the most probable prefixes as a tree; for the ratio rule, draw the last child of each inner node.

    Args:
        scores (`torch.Tensor` of shape `(B, G, V)`, float32): processed logits of one pass.
        speculation (`SpeculationConfig`): the budget, the temperature of the marginals, and the rule.
        choose (`Callable`, *optional*): from each row's nodes, likeliest first, to how many of them are worth verifying. It is
            asked before anything is drawn.
        smallest (`float`): paths of at most this probability are left out.
        temperature (`ChildTemperature`, *optional*): of the drawn children; by default that of the marginals.
        copies (`Copies`, *optional*): what each row copies is one more branch, merged where it begins as drafted ones do.

    Returns:
        `DraftTree`: with `sampled` for the ratio rule; or a `Draft` of nothing, where no node is worth it. On a GPU a tree of
            a fixed size is built there, unless it has drawn or copied nodes, which the host places.

    Source: arXiv:2604.12989; drawn children arXiv:2502.18779.
    """
    marginals = to_probs(scores, speculation.draft_temperature)
    is_fixed = choose is None and copies is None and speculation.acceptance != "ratio"
    if is_fixed and speculation.tree_budget <= MOST_NODES and builds_trees(scores.device):
        return DraftTree.planted(*plant(marginals, speculation.tree_budget))
    shapes, ranked_tokens = _most_probable(marginals, speculation.tree_budget, smallest, temperature, copies)
    if choose is not None:
        count = choose(shapes)
        shapes = [shape.first(count) for shape in shapes]
    shapes = [shape.depth_first() for shape in shapes]
    copied = [[] for _ in shapes] if copies is None else [copy.tokens for copy in copies.found]
    tokens = [
        [
            own[depth - 1] if rank == COPIED else row[depth - 1][rank]
            for depth, rank in zip(shape.depths, shape.ranks, strict=True)
        ]
        for shape, row, own in zip(shapes, ranked_tokens, copied, strict=True)
    ]
    if not any(tokens):
        return Draft.nothing(marginals.new_empty(marginals.shape[:2], dtype=torch.long))
    parents, values = [shape.parents for shape in shapes], [shape.values for shape in shapes]
    nodes = None if copies is None else [shape.copied() for shape in shapes]
    tree = DraftTree.of_rows(tokens, parents, scores.device, values=values, copied=nodes)
    return draw_last_children(tree, shapes, marginals, temperature) if speculation.acceptance == "ratio" else tree


def builds_trees(device: torch.device) -> bool:
    """Return whether trees are built on a device rather than on the host: on GPUs, which would be waited for.

    A CPU has nothing to wait for, and builds a tree on the host in a fraction of the time.
    """
    return device.type == "cuda"


def _most_probable(
    marginals: torch.Tensor,
    budget: int,
    smallest: float,
    temperature: ChildTemperature | None = None,
    copies: Copies | None = None,
) -> tuple[list[TreeShape], list[list[list[int]]]]:
    """Return each row's most probable prefixes of `marginals` `(B, G, V)`, and tokens by row, position and rank.

    What `temperature` has not read of the last round yet is read along.
    """
    most = min(budget, marginals.shape[-1])
    for num_ranks in sorted({min(FEW_RANKS, most), most}):
        probs, tokens = marginals.topk(num_ranks, dim=-1)
        # One device sync. Ids are exact in float32, as far as vocabularies go (2 ** 24).
        parts = [probs.flatten(), tokens.flatten().to(probs.dtype)]
        if temperature is not None and temperature.unread is not None:
            parts.append(temperature.unread.to(probs.device, probs.dtype))
        numbers = torch.cat(parts).tolist()
        size = probs.numel()
        if len(parts) > 2:
            assert temperature is not None
            temperature.read(numbers[2 * size :])
        rows = _nested(numbers[:size], probs.shape)
        ranked_tokens = _nested([int(token) for token in numbers[size : 2 * size]], probs.shape)
        places = [[]] * len(rows) if copies is None else _copied_places(marginals, rows, ranked_tokens, copies)
        shapes = [best_first(row, budget, smallest, copied) for row, copied in zip(rows, places, strict=True)]
        # Where the last rank was not taken, the one after it could not have been.
        if all(max(shape.ranks, default=0) < num_ranks - 1 for shape in shapes):
            break
    return shapes, ranked_tokens


def _nested(numbers: list[Any], shape: torch.Size) -> list[list[list[Any]]]:
    """Return a flat list in a tensor's shape of three dimensions."""
    _, count, size = shape
    rows = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def _copied_places(
    marginals: torch.Tensor, probs: list[list[list[float]]], tokens: list[list[list[int]]], copies: Copies
) -> list[list[Copied]]:
    """Return each row's copy as the tree knows it.

    Args:
        marginals (`torch.Tensor` of shape `(B, G, V)`, float32): of one pass.
        probs (`list`): the largest of them, `(B, G, ranks)`.
        tokens (`list`): whose they are, `(B, G, ranks)`.
        copies (`Copies`): which asks what the marginals say.

    Returns:
        `list[list[Copied]]`: behind the window by the text alone.
    """
    places = []
    for row, copy in enumerate(copies.found):
        seen = copy.tokens[: marginals.shape[1]]
        own = marginals[row, list(range(len(seen))), seen].tolist() if seen else []
        of_row = [copies.weigh(row, depth, prob, probs[row][depth], tokens[row][depth]) for depth, prob in enumerate(own)]
        places.append(of_row + [Copied(rate, None, 0.0) for rate in copy.alone[len(seen) :]])
    return places


def copied_chains(scores: torch.Tensor, drafted: list[TreeShape], copies: Copies) -> list[TreeShape]:
    """Return each row's chain as it is if it begins with the row's copy and goes on as drafted.

    Args:
        scores (`torch.Tensor` of shape `(B, G, V)`, float32): logits of one pass.
        drafted (`list[TreeShape]`): the chains by `chain_shapes`.
        copies (`Copies`): which asks what the marginals say.

    Returns:
        `list[TreeShape]`: G nodes for each row.
    """
    marginals = to_probs(scores)
    probs, tokens = marginals.topk(min(2, marginals.shape[-1]), dim=-1)
    ranked_probs = probs.tolist()
    places = _copied_places(marginals, ranked_probs, tokens.tolist(), copies)
    chains = []
    for shape, ranked, copied in zip(drafted, ranked_probs, places, strict=True):
        rates = [place.rate for place in copied[: len(ranked)]]
        values = list(accumulate(rates + [row[0] for row in ranked[len(rates) :]], mul))
        ranks = [COPIED] * len(rates) + shape.ranks[len(rates) :]
        chains.append(TreeShape(shape.parents, shape.depths, ranks, values))
    return chains


def draw_last_children(
    tree: DraftTree, shapes: list[TreeShape], marginals: torch.Tensor, temperature: ChildTemperature | None = None
) -> DraftTree:
    """Replace the last child of each inner node by one drawn from the marginal without its siblings.

    Which nodes there are was settled before anything is drawn, and does not change with what is drawn. The drawn tokens stay
    on the device: nobody asks for them before the target has read them.

    Args:
        tree (`DraftTree`): with tokens by rank only.
        shapes (`list[TreeShape]`): of each row.
        marginals (`torch.Tensor` of shape `(B, G, V)`, float32): what to draw from.
        temperature (`ChildTemperature`, *optional*): at which.

    Returns:
        `DraftTree`: with the drawn tokens, and their laws as `sampled`.
    """
    drawn: list[tuple[int, int, int]] = []  # row of the batch, position, node counted from 0
    siblings: list[tuple[int, int, int]] = []  # place among the laws, row of the batch, node counted from 0
    row_of: list[dict[int, int]] = [{} for _ in shapes]
    child_of: list[dict[int, int]] = [{} for _ in shapes]
    for row, shape in enumerate(shapes):
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(shape.parents):
            children.setdefault(parent, []).append(node)
        for parent, nodes in children.items():
            last = max((node for node in nodes if shape.ranks[node] != COPIED), default=None)
            if last is None:
                continue  # a copied token alone, which is not drawn
            siblings += [(len(drawn), row, node) for node in nodes if node != last]
            row_of[row][parent], child_of[row][parent] = len(drawn), last + 1
            drawn.append((row, shape.depths[last] - 1, last))
    if not drawn:
        return tree
    rows, positions, places = to_device(list(zip(*drawn, strict=True)), marginals.device)
    laws = marginals[rows, positions]  # (n, V)
    if siblings:
        law, of_row, kept = to_device(list(zip(*siblings, strict=True)), laws.device)
        laws[law, tree.tokens[of_row, kept]] = 0.0
    # The last child's own rank has a positive probability, so something is left to draw.
    natural = laws / laws.sum(dim=-1, keepdim=True)
    laws = natural if temperature is None else temperature.law(natural)
    tokens = tree.tokens.index_put((rows, places), draw(laws))
    sampled = SampledChildren(laws, row_of, child_of, None if temperature is None else natural)
    return replace(tree, tokens=tokens, sampled=sampled)

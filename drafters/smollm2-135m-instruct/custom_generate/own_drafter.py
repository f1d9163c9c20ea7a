"""A drafter of the user's own in the loop: what it drafts is checked before the target or a rule sees it.

Letters: B batch, G drafted tokens, N nodes of a tree, V vocabulary. Knows drafters by their two names only; see `Drafter`.
"""

from dataclasses import replace
from typing import Any

import torch

from .draft import Draft
from .draft import DraftTree
from .draft import Outcome
from .draft import SampledChildren
from .features import Features
from .speculation import RULES_OF_SHAPE
from .speculation import WHY_NOT
from .speculation import SpeculationConfig
from .text import Text

# How far the sum of float32 probabilities may be from 1.
ROUNDING = 1e-3


def is_own_drafter(candidate: Any) -> bool:
    """Return whether an object is a drafter by what it has: `draft` and `target_layer_ids`."""
    return callable(getattr(candidate, "draft", None)) and hasattr(candidate, "target_layer_ids")


def check_own_drafter(model: Any, drafter: Any, num_rows: int) -> None:
    """Refuse a drafter that asks for what there is not, or cannot follow a batch.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        drafter (`Drafter`): the user's object.
        num_rows (`int`): B.

    Raises:
        TypeError: if `target_layer_ids` is no list of integers.
        ValueError: if the target lacks one of the layers, or a batch is to be drafted for without `select_rows`.
    """
    layer_ids = drafter.target_layer_ids
    if layer_ids is not None:
        is_list = isinstance(layer_ids, list | tuple) and len(layer_ids) > 0
        if not is_list or not all(isinstance(layer_id, int) and not isinstance(layer_id, bool) for layer_id in layer_ids):
            raise TypeError(f"`target_layer_ids` must be a list of integers, or None for no hidden states, got {layer_ids!r}.")
        num_layers = model.config.get_text_config().num_hidden_layers
        if not all(0 <= layer_id < num_layers for layer_id in layer_ids):
            raise ValueError(
                f"`assistant_model` must read layers that the target has (0 to {num_layers - 1}), got `target_layer_ids` "
                f"{list(layer_ids)}."
            )
    if num_rows > 1 and not callable(getattr(drafter, "select_rows", None)):
        raise ValueError(
            f"`assistant_model` must have a method `select_rows` for {num_rows} sequences, got {type(drafter).__name__} "
            "without: rows that have ended leave the batch. Add one, or call generate once for each prompt."
        )


class OwnDrafter:
    """A user's drafter, each of its drafts checked and brought to the text's device.

    Args:
        drafter (`Drafter`): the user's object.
        speculation (`SpeculationConfig`): the shape and the rule that were asked for, either may be `"auto"`.
        vocab_size (`int`): V, the target's.
        max_length (`int`, *optional*): most tokens of the finished text; what would reach past it is cut off.

    Lossless when: see `Drafter.draft`.
    """

    def __init__(self, drafter: Any, speculation: SpeculationConfig, vocab_size: int, max_length: int | None) -> None:
        self.drafter = drafter
        self.speculation = speculation
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.target_layer_ids = None if drafter.target_layer_ids is None else list(drafter.target_layer_ids)

    def draft(self, text: Text, features: Features | None) -> Draft | DraftTree:
        """Draft, and refuse what is no draft; see `Drafter.draft`.

        Raises:
            TypeError: if the drafter returns something else than a draft.
            ValueError: if the draft is malformed, or of another shape than was asked for, or not for the rule.
        """
        draft = self.drafter.draft(text, features)
        if not isinstance(draft, Draft | DraftTree):
            raise TypeError(f"`draft` must return a Draft or a DraftTree, got {type(draft).__name__}.")
        _check_tokens(draft.tokens, text.num_rows, self.vocab_size)
        if draft.num_tokens == 0:
            return Draft.nothing(text.tokens)
        self._check_shape(draft)
        room = None if self.max_length is None else self.max_length - min(text.lengths) - 1
        if isinstance(draft, DraftTree):
            _check_tree(draft, self.vocab_size)
            return (draft if room is None else shallow(draft, room)).to(text.tokens.device)
        _check_chain(draft, self.vocab_size)
        return draft.first(draft.num_tokens if room is None else room).to(text.tokens.device)

    def observe(self, outcome: Outcome) -> None:
        """Hand on what became of the last draft."""
        getattr(self.drafter, "observe", lambda _: None)(outcome)

    def select_rows(self, rows: list[int]) -> None:
        """Hand on which rows are left; the entry has seen that the drafter wants to know."""
        self.drafter.select_rows(rows)

    def _check_shape(self, draft: Draft | DraftTree) -> None:
        """Refuse a draft of another shape than was asked for, or one that the rule is not made for."""
        asked, rule = self.speculation.draft_shape, self.speculation.acceptance
        shape = "chain" if isinstance(draft, Draft) else "tree" if draft.drafts is None else "samples"
        if asked not in ("auto", shape):
            raise ValueError(
                f"`draft` must return the `draft_shape` {asked!r} that was asked for, got {shape!r}. A Draft is a chain, a "
                "DraftTree a tree, and one with `drafts` samples."
            )
        if rule != "auto" and rule not in RULES_OF_SHAPE[shape]:
            raise ValueError(
                f"`acceptance` must be one of {', '.join(RULES_OF_SHAPE[shape])} for drafts of the shape {shape!r}, got "
                f"{rule!r}: {WHY_NOT[shape, rule]}."
            )


def shallow(tree: DraftTree, depth: int) -> DraftTree:
    """Return a tree without its nodes deeper than `depth`, which is settled before anything is drawn.

    Args:
        tree (`DraftTree`): the draft.
        depth (`int`): most drafted tokens of a path.

    Returns:
        `DraftTree`: the same object if it is not deeper.
    """
    if max(tree.deepest()) <= depth:
        return tree
    tokens, parents, places = [], [], []
    for row, of_row in zip(tree.tokens.tolist(), tree.parents, strict=True):
        depths, place = [0], {0: 0}
        for node, parent in enumerate(of_row, 1):
            depths.append(depths[parent] + 1)
            if depths[node] <= depth:
                place[node] = len(place)
        kept = [node for node in place if node > 0]
        tokens.append([row[node - 1] for node in kept])
        parents.append([place[of_row[node - 1]] for node in kept])
        places.append(place)
    drafts, sampled = tree.drafts, tree.sampled
    if drafts is not None:
        drafts = [
            [[place[node] for node in path if node in place] for path in paths]
            for paths, place in zip(drafts, places, strict=True)
        ]
    if sampled is not None:
        inner = [set(of_row) for of_row in parents]  # a node whose children are gone has none that was drawn
        row_of = [
            {place[node]: value for node, value in column.items() if place.get(node) in left}
            for column, place, left in zip(sampled.row_of, places, inner, strict=True)
        ]
        child_of = [
            {place[node]: place[child] for node, child in column.items() if child in place}
            for column, place in zip(sampled.child_of, places, strict=True)
        ]
        sampled = replace(sampled, row_of=row_of, child_of=child_of)
    return DraftTree.of_rows(tokens, parents, tree.tokens.device, drafts, sampled)


def _check_tokens(tokens: Any, num_rows: int, vocab_size: int) -> None:
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.long or tokens.dim() != 2 or len(tokens) != num_rows:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"`Draft.tokens` must be an int64 tensor of shape ({num_rows}, drafted tokens), got {got}.")
    if tokens.numel() == 0:
        return
    low, high = torch.stack([tokens.min(), tokens.max()]).tolist()  # one device sync
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`Draft.tokens` must be ids of the target, 0 to {vocab_size - 1}, got {low if low < 0 else high}. Does the "
            "drafter have another vocabulary?"
        )


def _check_chain(draft: Draft, vocab_size: int) -> None:
    if not isinstance(draft.has_prefix_law, bool):
        raise TypeError(f"`Draft.has_prefix_law` must be True or False, got {draft.has_prefix_law!r}.")
    if draft.probs is not None:
        check_laws("Draft.probs", draft.probs, (*draft.tokens.shape, vocab_size), draft.tokens)


def check_laws(name: str, laws: Any, shape: tuple[int, ...], tokens: torch.Tensor) -> None:
    """Refuse what are no laws, or could not have brought forth the tokens that were drawn from them.

    Args:
        name (`str`): of the field.
        laws (`torch.Tensor`): to be checked.
        shape (`tuple[int, ...]`): `(..., V)`.
        tokens (`torch.Tensor` of shape `(...)`, int64): drawn from them.

    Raises:
        ValueError: if so.
    """
    is_tensor = isinstance(laws, torch.Tensor)
    if not is_tensor or laws.dtype not in (torch.float32, torch.float64) or tuple(laws.shape) != shape:
        got = f"{laws.dtype} {tuple(laws.shape)}" if is_tensor else type(laws).__name__
        raise ValueError(
            f"`{name}` must be the float32 probabilities that the tokens were drawn from, of shape {shape} with the target's "
            f"{shape[-1]} tokens, got {got}."
        )
    drawn = laws.gather(-1, tokens.to(laws.device)[..., None])
    is_law = (laws >= 0).all() & ((laws.sum(dim=-1) - 1).abs() < ROUNDING).all()
    is_law, is_drawn = torch.stack([is_law, (drawn > 0).all()]).tolist()  # one device sync
    if not is_law:
        raise ValueError(f"`{name}` must be probabilities whose rows sum to 1, got others. Are these logits?")
    if not is_drawn:
        raise ValueError(f"`{name}` must be what the tokens were drawn from, got a token of probability 0.")


def _check_tree(tree: DraftTree, vocab_size: int) -> None:
    if not isinstance(tree.parents, list) or len(tree.parents) != len(tree.tokens):
        raise ValueError(f"`DraftTree.parents` must be a list for each of the {len(tree.tokens)} rows, got {tree.parents!r}.")
    for parents, children in zip(tree.parents, tree.children(), strict=True):
        are_before = all(type(parent) is int and 0 <= parent < node for node, parent in enumerate(parents, 1))
        if len(parents) > tree.num_tokens or not are_before:
            raise ValueError(
                f"`DraftTree.parents` must name for each of at most {tree.num_tokens} nodes one before it (0 is the anchor), "
                f"got {parents}."
            )
        if len(children) < len(parents):
            raise ValueError("`DraftTree.tokens` must differ among siblings, got two alike. Merge them into one node.")
    for parents, paths in zip(tree.parents, tree.drafts or [[]] * len(tree.parents), strict=True):
        for path in paths:
            if any(
                not 0 < node <= len(parents) or parents[node - 1] != last for last, node in zip([0, *path], path, strict=False)
            ):
                raise ValueError(f"`DraftTree.drafts` must be paths from the anchor down, child by child, got {path}.")
    if tree.sampled is not None:
        _check_sampled(tree, tree.sampled, vocab_size)


def _check_sampled(tree: DraftTree, sampled: SampledChildren, vocab_size: int) -> None:
    """Refuse drawn children that are no children, or laws that know of no siblings."""
    drawn: dict[int, int] = {}
    siblings: list[tuple[int, int]] = []
    for row, (parents, tokens) in enumerate(zip(tree.parents, tree.tokens.tolist(), strict=True)):
        children = sampled.child_of[row]
        if any(not 0 < child <= len(parents) or parents[child - 1] != node for node, child in children.items()):
            raise ValueError(f"`SampledChildren.child_of` must name a child of each of its nodes, got {children}.")
        if sampled.row_of[row].keys() != children.keys():
            raise ValueError("`SampledChildren` must have the same nodes in `row_of` and `child_of`, got others.")
        for parent, place in sampled.row_of[row].items():
            drawn[place] = tokens[children[parent] - 1]
            siblings += [
                (place, tokens[i - 1]) for i, other in enumerate(parents, 1) if other == parent and i != children[parent]
            ]
    if sorted(drawn) != list(range(len(sampled.laws))):
        raise ValueError(f"`SampledChildren.row_of` must use each of the {len(sampled.laws)} laws once, got {sorted(drawn)}.")
    token_row = torch.tensor([drawn[place] for place in range(len(drawn))], dtype=torch.long)
    check_laws("SampledChildren.laws", sampled.laws, (len(drawn), vocab_size), token_row)
    index = torch.tensor(siblings, dtype=torch.long, device=sampled.laws.device).view(-1, 2)
    if bool((sampled.laws[index[:, 0], index[:, 1]] != 0).any()):
        raise ValueError("`SampledChildren.laws` must be 0 on the siblings of the drawn child, got more.")

"""From the name of a rule to a function of a draft and the target's scores.

Letters: B batch, N nodes of a tree, V vocabulary. Decides which rows of the target's logits are looked at and how tokens are
drawn from them; why the rules are lossless is in `acceptance.py`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from .acceptance import Acceptance
from .acceptance import accept_by_block
from .acceptance import accept_by_match
from .acceptance import accept_by_ratio
from .acceptance import accept_by_walk
from .acceptance import sampled_child_law
from .acceptance import select_draft
from .draft import Draft
from .draft import DraftTree
from .sampling import Scores
from .sampling import draw
from .sampling import to_probs

# From a draft and the target's scores after it to what stands of the draft.
AcceptanceRule = Callable[[Draft | DraftTree, Scores], Acceptance]


def make_rule(acceptance: str, *, do_sample: bool) -> AcceptanceRule:
    """Return the acceptance rule as a function of a draft and the target's scores.

    Args:
        acceptance (`str`): `"match"`, `"ratio"`, `"block"` or `"self_selection"`.
        do_sample (`bool`): false: the target's law is a point mass on its most probable token, and all rules are the match.

    Returns:
        `AcceptanceRule`: the rule.
    """

    def accept(draft: Draft | DraftTree, scores: Scores) -> Acceptance:
        if isinstance(draft, DraftTree):
            tree = _selected(draft, scores, do_sample=do_sample) if acceptance == "self_selection" else draft
            target_laws: dict[tuple[int, int], torch.Tensor] = {}
            walked = accept_by_walk(tree, next_token_at(tree, scores, target_laws, do_sample=do_sample))
            return replace(walked, target_laws=target_laws)
        window = scores.window()
        if not do_sample:
            return accept_by_match(draft.tokens, window.argmax(dim=-1))
        if acceptance in ("match", "self_selection"):
            return accept_by_match(draft.tokens, draw(to_probs(window)))
        if not draft.has_prefix_law:
            raise ValueError(
                f"`acceptance` must be 'match' for drafts without a prefix law, got {acceptance!r}. The drafter says that its "
                "tokens do not have, given the accepted prefix, the probabilities they were drawn with."
            )
        return {"ratio": accept_by_ratio, "block": accept_by_block}[acceptance](draft, to_probs(window))

    return accept


def next_token_at(
    tree: DraftTree, scores: Scores, target_laws: dict[tuple[int, int], torch.Tensor], *, do_sample: bool
) -> Callable[[int, list[int]], int]:
    """Return how the target writes its next token along a path of a tree; see `accept_by_walk`.

    Args:
        tree (`DraftTree`): where a child of the path's end was drawn, the token's law is coupled with that draw.
        scores (`Scores`): of the target's pass over the tree; only those on the path are processed.
        target_laws (`dict[tuple[int, int], torch.Tensor]`): filled with what `Outcome` says of them.
        do_sample (`bool`): false: the most probable token.

    Returns:
        `Callable`: from batch row and path to a token.
    """
    if not do_sample and not scores.processors:
        best = scores.logits.argmax(dim=-1).tolist()
        return lambda row, path: best[row][path[-1]]
    if not do_sample:
        return lambda row, path: int(scores.last(row, path).argmax())

    def next_token(row: int, path: list[int]) -> int:
        law = to_probs(scores.last(row, path))
        sampled = tree.sampled
        if sampled is not None and path[-1] in sampled.row_of[row]:
            place = sampled.row_of[row][path[-1]]
            target_laws[row, path[-1]] = law
            draft_law = sampled.laws[place].to(law.device)
            law = sampled_child_law(law, draft_law, sampled.token_of[row][path[-1]])
        return int(draw(law[None]))

    return next_token


def _selected(tree: DraftTree, scores: Scores, *, do_sample: bool) -> DraftTree:
    """Return the tree with each row's best draft only, by `select_draft`; the other nodes have no parent any more."""
    parents = []
    for row, drafts in enumerate(tree.drafts or []):
        path_probs: dict[int, float] = {0: 1.0}
        tokens = tree.tokens[row].tolist()
        for draft in drafts:
            laws = scores.along(row, [0, *draft[:-1]])
            laws = to_probs(laws) if do_sample else torch.nn.functional.one_hot(laws.argmax(dim=-1), laws.shape[-1])
            for node, law, parent in zip(draft, laws, [0, *draft[:-1]], strict=True):
                path_probs[node] = path_probs[parent] * float(law[tokens[node - 1]])
        chosen = set(select_draft(drafts, path_probs))
        parents.append([parent if node in chosen else -1 for node, parent in enumerate(tree.parents[row], 1)])
    return replace(tree, parents=parents)

"""From the name of a rule to a function of a draft and the target's scores.

Letters: B batch, N nodes of a tree, V vocabulary. Decides which rows of the target's logits are looked at and how tokens are
drawn from them; why the rules are lossless is in `acceptance.py`.
"""

from collections.abc import Callable
from collections.abc import Set
from dataclasses import replace

import torch

from .acceptance import Acceptance
from .acceptance import accept_by_block
from .acceptance import accept_by_match
from .acceptance import accept_by_ratio
from .acceptance import accept_by_walk
from .acceptance import accept_on_tree
from .acceptance import sampled_child_law
from .acceptance import select_draft
from .draft import Draft
from .draft import DraftTree
from .sampling import Scores
from .sampling import draw
from .sampling import to_probs

# From a draft and the target's scores after it to what stands of the draft.
AcceptanceRule = Callable[[Draft | DraftTree, Scores], Acceptance]


def make_rule(acceptance: str, *, do_sample: bool, end_token_ids: Set[int] = frozenset()) -> AcceptanceRule:
    """Return the acceptance rule as a function of a draft and the target's scores.

    Args:
        acceptance (`str`): `"match"`, `"ratio"`, `"block"` or `"self_selection"`; `"auto"`: what accepts most of each draft.
        do_sample (`bool`): false: the target's law is a point mass on its most probable token, and all rules are the match.
        end_token_ids (`set[int]`): with one of them the text ends; processors are asked nothing about what follows one.

    Returns:
        `AcceptanceRule`: the rule.
    """

    def accept(draft: Draft | DraftTree, scores: Scores) -> Acceptance:
        if isinstance(draft, DraftTree):
            is_selected = acceptance == "self_selection"
            tree = selected_draft(draft, scores, end_token_ids, do_sample=do_sample) if is_selected else draft
            # The match asks nobody what a token was drawn from.
            return on_tree(replace(tree, sampled=None) if acceptance == "match" and tree.sampled is not None else tree, scores)
        name = ("block" if draft.has_prefix_law else "match") if acceptance == "auto" else acceptance
        is_by_match = not do_sample or name in ("match", "self_selection")
        if is_by_match and not scores.is_prefix_free:
            return on_tree(DraftTree.of_chain(draft.tokens), scores)
        if not do_sample:
            return accept_by_match(draft.tokens, scores.window().argmax(dim=-1))
        if is_by_match:
            return accept_by_match(draft.tokens, draw(to_probs(scores.window())))
        if not draft.has_prefix_law:
            raise ValueError(
                f"`acceptance` must be 'match' for drafts without a prefix law, got {acceptance!r}. The drafter says that its "
                "tokens do not have, given the accepted prefix, the probabilities they were drawn with."
            )
        rule = {"ratio": accept_by_ratio, "block": accept_by_block}[name]
        if scores.is_prefix_free:
            return rule(draft, to_probs(scores.window()))
        return _row_by_row(rule, draft, scores, end_token_ids)

    def on_tree(tree: DraftTree, scores: Scores) -> Acceptance:
        if scores.is_prefix_free and do_sample:
            return accept_on_tree(tree, to_probs(scores.window()))
        if scores.is_prefix_free:
            # One device sync: the drafted tokens, and the target's own after the anchor and after each of them.
            table = tree.read(torch.cat([tree.tokens, scores.window().argmax(dim=-1)], dim=1))
            size = tree.num_tokens
            return accept_by_walk(tree.children([row[:size] for row in table]), lambda row, path: table[row][size + path[-1]])
        # Processors that read the text are asked node by node, and only where the walk comes.
        target_laws: dict[tuple[int, int], torch.Tensor] = {}
        next_token = next_token_at(tree, scores, target_laws, do_sample=do_sample)
        return replace(accept_by_walk(tree.children(), next_token, end_token_ids), target_laws=target_laws)

    return accept


def _row_by_row(
    rule: Callable[[Draft, torch.Tensor], Acceptance], draft: Draft, scores: Scores, end_token_ids: Set[int]
) -> Acceptance:
    """Accept a chain whose laws hang on their prefixes: each row by itself, as far as the processors can be asked.

    A draft that stops behind some token because of the tokens up to there is as good as one that was never longer: each token
    is tested against the law that it was drawn from, whatever would have come later. Where it stops without a law for what
    follows, its last token ends the round in the bonus token's place.
    """
    new_tokens, nodes = [], []
    for row, tokens in enumerate(draft.tokens.tolist()):
        laws = known_laws(scores, row, list(range(1, len(tokens) + 1)), tokens, end_token_ids)
        count = min(len(laws), len(tokens))
        own = replace(
            draft, tokens=draft.tokens[row : row + 1], probs=None if draft.probs is None else draft.probs[row : row + 1]
        )
        # A row of the last law again stands where none is known: nothing is read from it.
        answer = rule(replace(own, values=None).first(count), torch.stack([*laws, laws[-1]][: count + 1])[None])
        new_tokens.append(answer.tokens[0][: len(laws)])
        nodes.append(answer.nodes[0][: len(laws)])
    return Acceptance(new_tokens, nodes)


def known_laws(scores: Scores, row: int, nodes: list[int], tokens: list[int], end_token_ids: Set[int]) -> list[torch.Tensor]:
    """Return the target's laws along a draft, up to where the text ends or the target would not follow.

    Args:
        scores (`Scores`): of the target's pass.
        row (`int`): of the batch.
        nodes (`list[int]`): the draft, root to leaf.
        tokens (`list[int]`): of nodes 1, 2, ...
        end_token_ids (`set[int]`): with one of them the text ends.

    Returns:
        `list[torch.Tensor]`: at least one `(V,)`; all `len(nodes) + 1` if nothing stops. It stops behind an end token, behind a
            token of probability 0, and behind a text that the processors do not take, each known from the tokens up to there.
    """
    laws: list[torch.Tensor] = []
    for place in range(len(nodes) + 1):
        token = tokens[nodes[place - 1] - 1] if place > 0 else None
        if token is not None and (token in end_token_ids or float(laws[-1][token]) == 0):
            break
        found = scores.last_if_taken(row, [0, *nodes[:place]])
        if found is None:
            break
        laws.append(to_probs(found))
    return laws


def next_token_at(
    tree: DraftTree, scores: Scores, target_laws: dict[tuple[int, int], torch.Tensor], *, do_sample: bool
) -> Callable[[int, list[int]], int | None]:
    """Return how the target writes its next token along a path of a tree; see `accept_by_walk`.

    Args:
        tree (`DraftTree`): where a child of the path's end was drawn, the token's law is coupled with that draw.
        scores (`Scores`): of the target's pass over the tree; only those on the path are processed.
        target_laws (`dict[tuple[int, int], torch.Tensor]`): filled with what `Outcome` says of them.
        do_sample (`bool`): false: the most probable token.

    Returns:
        `Callable`: from batch row and path to a token; `None` behind a drafted text that the processors do not take.
    """

    def next_token(row: int, path: list[int]) -> int | None:
        found = scores.last_if_taken(row, path)
        if found is None or not do_sample:
            return None if found is None else int(found.argmax())
        law = to_probs(found)
        sampled = tree.sampled
        if sampled is not None and path[-1] in sampled.row_of[row]:
            place = sampled.row_of[row][path[-1]]
            target_laws[row, path[-1]] = law
            draft_law = sampled.laws[place].to(law.device)
            law = sampled_child_law(law, draft_law, tree.tokens[row, sampled.child_of[row][path[-1]] - 1])
        return int(draw(law[None]))

    return next_token


def selected_draft(tree: DraftTree, scores: Scores, end_token_ids: Set[int], *, do_sample: bool) -> DraftTree:
    """Return the tree with each row's best draft only; the other nodes have no parent any more.

    Args:
        tree (`DraftTree`): with `drafts`.
        scores (`Scores`): of the target's pass over it.
        end_token_ids (`set[int]`): with one of them the text ends.
        do_sample (`bool`): false: the target's law is a point mass.

    Returns:
        `DraftTree`: for `select_draft`'s choice.
    """
    parents = []
    for row, drafts in enumerate(tree.drafts or []):
        path_probs: dict[int, float] = {0: 1.0}
        tokens = tree.tokens[row].tolist()
        for draft in drafts:
            laws = known_laws(scores, row, draft, tokens, end_token_ids)
            path = [0, *draft]
            for place, node in enumerate(draft):
                law = laws[place] if place < len(laws) else None
                if law is not None and not do_sample:
                    law = torch.nn.functional.one_hot(law.argmax(), len(law))
                path_probs[node] = 0.0 if law is None else path_probs[path[place]] * float(law[tokens[node - 1]])
        chosen = set(select_draft(drafts, path_probs))
        parents.append([parent if node in chosen else -1 for node, parent in enumerate(tree.parents[row], 1)])
    return replace(tree, parents=parents)

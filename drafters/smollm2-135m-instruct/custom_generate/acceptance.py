"""The rules that decide how much of a draft stands, and why each of them is lossless.

Letters: B batch, G drafted tokens, N nodes of a tree, V vocabulary. p_i is the target's law and q_i the drafter's law of token
i, both given the tokens before it; x is the draft. Knows no model and no cache.

A rule is lossless when the text it emits has the target's law. Each rule below is a pair of pure functions, the law of the
number of accepted tokens and the law of the bonus token; the tests enumerate exactly these functions, and drawing from them is
all that the public function adds.
"""

from collections.abc import Callable
from collections.abc import Set
from dataclasses import dataclass
from dataclasses import field

import torch

from .draft import Draft
from .draft import DraftTree
from .sampling import draw
from .sampling import residual
from .text import to_device


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a rule decided about a draft, in numbers of the host: all that a round reads back after the target's pass.

    Attributes:
        tokens (`list[list[int]]`): for each row what the round would add: the accepted tokens, then the bonus token, the
            target's own.
        nodes (`list[list[int]]`): for each row the nodes that lead there, the anchor (0) first, so that node `i` is the one
            whose logits token `i` was taken from. Of a chain they are 0, 1, 2, ...
        target_laws (`dict[tuple[int, int], torch.Tensor]`): see `Outcome`.
    """

    tokens: list[list[int]]
    nodes: list[list[int]]
    target_laws: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def num_accepted(self) -> list[int]:
        """Drafted tokens accepted in each row, 0 to G; the bonus is not counted."""
        return [len(row) - 1 for row in self.tokens]


def accept_by_match(draft_tokens: torch.Tensor, target_tokens: torch.Tensor) -> Acceptance:
    """Accept the draft as long as it equals the target's own tokens.

    Every emitted token is one that the target drew, given a prefix that it drew too; the draft only decides how many of
    them are known after one pass.

    Args:
        draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): the draft.
        target_tokens (`torch.Tensor` of shape `(B, G + 1)`, int64): token `i` drawn by the target given the committed text
            and `draft_tokens[:, :i]`; the most probable one when greedy.

    Returns:
        `Acceptance`: the run of matches, then the target's token that follows it.

    Lossless when: always, for any draft.
    Source: sample-and-match, as in arXiv:2602.06036; equal to point-mass rejection for deterministic drafts.
    """
    # One device sync, then plain Python: a dozen numbers are compared sooner than a kernel is launched.
    table = torch.cat([draft_tokens, target_tokens], dim=1).tolist()
    gamma = draft_tokens.shape[1]
    counts = [next((i for i in range(gamma) if row[i] != row[gamma + i]), gamma) for row in table]
    # The accepted tokens are the target's own too.
    tokens = [row[gamma : gamma + count + 1] for row, count in zip(table, counts, strict=True)]
    return Acceptance(tokens, [list(range(count + 1)) for count in counts])


def accept_by_ratio(draft: Draft, target_probs: torch.Tensor) -> Acceptance:
    """Accept token i with probability min(1, p_i(x_i) / q_i(x_i)), stop at the first rejection.

    After a rejection the bonus token comes from the residual norm(max(p_i - q_i, 0)), so that token i has the law
    min(p_i, q_i) + max(p_i - q_i, 0) = p_i; after G acceptances it comes from p_G.

    Args:
        draft (`Draft`): the draft, `has_prefix_law`.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`, float32): p.

    Returns:
        `Acceptance`: the accepted run and the bonus token.

    Lossless when: given the accepted prefix, token i was drawn from `draft.probs[:, i]`.
    Source: arXiv:2211.17192, Algorithm 1.
    """
    draft_probs = draft.dense_probs(target_probs.shape[-1])
    num_accepted = draw(ratio_num_accepted_law(draft.tokens, draft_probs, target_probs))
    return _of_chain(draft.tokens, num_accepted, draw(ratio_bonus_law(draft_probs, target_probs, num_accepted)))


def accept_by_block(draft: Draft, target_probs: torch.Tensor) -> Acceptance:
    """Verify the whole block jointly; never accepts less than the ratio rule in expectation.

    Args:
        draft (`Draft`): the draft, `has_prefix_law`.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`, float32): p.

    Returns:
        `Acceptance`: the accepted run and the bonus token.

    Lossless when: given the accepted prefix, token i was drawn from `draft.probs[:, i]`.
    Source: arXiv:2403.10444, Algorithm 2.
    """
    draft_probs = draft.dense_probs(target_probs.shape[-1])
    num_accepted = draw(block_num_accepted_law(draft.tokens, draft_probs, target_probs))
    return _of_chain(draft.tokens, num_accepted, draw(block_bonus_law(draft.tokens, draft_probs, target_probs, num_accepted)))


def accept_by_walk(
    children: list[dict[tuple[int, int], int]],
    next_token: Callable[[int, list[int]], int | None],
    end_token_ids: Set[int] = frozenset(),
) -> Acceptance:
    """Walk down a tree: let the target write its next token, go on while a child carries it.

    Args:
        children (`list[dict[tuple[int, int], int]]`): the draft; see `DraftTree.children`.
        next_token (`Callable`): from batch row and the path so far (node 0 first) to the target's token after it: drawn from
            the target's law given that prefix, or the most probable one. It is asked once for each node that is reached, and
            `None` where the text cannot be gone on with yet; then the round ends with the node's own token.
        end_token_ids (`set[int]`): with one of them the text ends, so no more is asked.

    Returns:
        `Acceptance`: the accepted path and the target's token that follows it.

    Lossless when: `next_token` has the target's law given the path, whatever the tree; the children only decide how many of
    the target's own tokens are known after one pass.
    Source: arXiv:2604.12989, section 3; the match rule for trees.
    """
    tokens, nodes = [], []
    for row, of_row in enumerate(children):
        path = [0]
        token = next_token(row, path)
        assert token is not None  # what is committed can be gone on with
        written = [token]
        while token not in end_token_ids and (child := of_row.get((path[-1], token))) is not None:
            following = next_token(row, [*path, child])
            if following is None:
                break
            path.append(child)
            token = following
            written.append(token)
        tokens.append(written)
        nodes.append(path)
    return Acceptance(tokens, nodes)


def accept_on_tree(tree: DraftTree, target_probs: torch.Tensor) -> Acceptance:
    """Draw where a walk down a tree ends, and the token behind it: what `accept_by_walk` draws token by token, in two draws.

    Args:
        tree (`DraftTree`): the draft; where a child was drawn (`sampled`), the node's law is coupled with that draw.
        target_probs (`torch.Tensor` of shape `(B, N + 1, V)`, float32): p after the anchor and after each node.

    Returns:
        `Acceptance`: the accepted path and the bonus token.

    Lossless when: as `accept_by_walk`, with `sampled_child_law` where a child was drawn.
    Source: as `accept_by_walk`; `walk_end_law` is the law of its last node.
    """
    laws = coupled_laws(tree, target_probs)
    ends = draw(walk_end_law(tree, laws))
    bonus_tokens = draw(walk_bonus_law(tree, laws, ends))
    # One device sync for all that the host side of the round needs to know.
    tokens, nodes = [], []
    for row, (end, bonus_token, *drafted) in enumerate(
        tree.read(torch.cat([ends[:, None], bonus_tokens[:, None], tree.tokens], dim=1))
    ):
        path = tree.path(row, end)
        tokens.append([*(drafted[node - 1] for node in path[1:]), bonus_token])
        nodes.append(path)
    target_laws: dict[tuple[int, int], torch.Tensor] = {}
    if tree.sampled is not None:
        for row, places in enumerate(tree.sampled.row_of):
            target_laws |= {(row, node): target_probs[row, node] for node in nodes[row] if node in places}
    return Acceptance(tokens, nodes, target_laws)


def coupled_laws(tree: DraftTree, target_probs: torch.Tensor) -> torch.Tensor:
    """Return the target's laws at all nodes, where a child was drawn by `sampled_child_law`.

    Args:
        tree (`DraftTree`): the draft.
        target_probs (`torch.Tensor` of shape `(B, N + 1, V)`): p.

    Returns:
        `torch.Tensor` of shape `(B, N + 1, V)`.
    """
    if tree.sampled is None:
        return target_probs
    table = [
        (row, node, place, tree.sampled.child_of[row][node] - 1)
        for row, places in enumerate(tree.sampled.row_of)
        for node, place in places.items()
    ]
    if not table:
        return target_probs
    device = target_probs.device
    rows, nodes, places, drawn = to_device(list(zip(*table, strict=True)), device)
    draft_probs = tree.sampled.laws.to(device)[places]
    given = sampled_child_law(target_probs[rows, nodes], draft_probs, tree.tokens[rows, drawn])
    return target_probs.index_put((rows, nodes), given)


def walk_end_law(tree: DraftTree, laws: torch.Tensor) -> torch.Tensor:
    """Return P(a walk ends at node v): the target writes the tokens down to v and then none of v's children.

    Args:
        tree (`DraftTree`): the draft.
        laws (`torch.Tensor` of shape `(B, N + 1, V)`): of the next token at each node.

    Returns:
        `torch.Tensor` of shape `(B, N + 1)`.
    """
    parents, is_node = _parents(tree, laws.device)
    rows = torch.arange(len(parents), device=laws.device)[:, None]
    taken = torch.where(is_node, laws[rows, parents, tree.tokens], 0)  # (B, N): P(v's token at v's parent)
    go_on = torch.zeros_like(laws[:, :, 0]).scatter_add(1, parents, taken)
    taken = torch.cat([torch.ones_like(go_on[:, :1]), taken], dim=1)
    # P(all ancestors' tokens): a node's row of the mask names them.
    reached = torch.where(tree.ancestor_mask(), taken[:, None], 1).prod(dim=-1)
    return reached * (1 - go_on).clamp(min=0)


def walk_bonus_law(tree: DraftTree, laws: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the law of the token behind a walk: that of its last node without the node's children.

    Args:
        tree (`DraftTree`): the draft.
        laws (`torch.Tensor` of shape `(B, N + 1, V)`): of the next token at each node.
        ends (`torch.Tensor` of shape `(B,)`, int64): the last nodes.

    Returns:
        `torch.Tensor` of shape `(B, V)`.
    """
    parents, is_node = _parents(tree, laws.device)
    law = _row(laws, ends)
    is_child = (is_node & (parents == ends[:, None])).to(law.dtype)
    # What is larger than any probability leaves nothing of a child's token.
    return residual(law, torch.zeros_like(law).scatter_add(1, tree.tokens, 2 * is_child))


def _parents(tree: DraftTree, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parents `(B, N)` int64 of all nodes, and which are nodes at all, `(B, N)` bool: filler has none."""
    if tree.layout is not None:
        return tree.layout.parents.clamp(min=0), tree.layout.parents >= 0
    rows = [row + [-1] * (tree.num_tokens - len(row)) for row in tree.parents]
    parents = to_device(rows, device).view(len(rows), tree.num_tokens)
    return parents.clamp(min=0), parents >= 0


def sampled_child_law(target_probs: torch.Tensor, draft_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the law of the target's next token at a node, given the token that was drawn as its child.

    With q the law that x was drawn from: x with probability a = min(1, p(x) / q(x)), else a token of norm(max(p - q, 0)). Over
    the draw of x that is min(p, q) + max(p - q, 0) = p. The other children are where q is 0, so their tokens come up whenever
    the target wants them: a node accepts p(siblings) + sum min(p, q).

    Args:
        target_probs (`torch.Tensor` of shape `(..., V)`): p at the node.
        draft_probs (`torch.Tensor` of shape `(..., V)`): q, 0 on the siblings of x.
        tokens (`torch.Tensor` of shape `(...)`, int64): x.

    Returns:
        `torch.Tensor` of shape `(..., V)`: to draw the next token from.

    Lossless when: x was drawn from q, which other children there are was settled before, and nothing in the tree depends on x
    but the token of that one node.
    Source: the node rule of arXiv:2502.18779 ("greedy draft"), for trees as in arXiv:2609.21827.
    """
    index = tokens[..., None]
    accept = (target_probs.gather(-1, index) / draft_probs.gather(-1, index)).clamp(max=1)
    return ((1 - accept) * residual(target_probs, draft_probs)).scatter_add(-1, index, accept)


def select_draft(drafts: list[list[int]], path_probs: dict[int, float]) -> list[int]:
    """Return the draft with the largest expected accepted length under the target; the first of several.

    Args:
        drafts (`list[list[int]]`): the nodes of each draft, root to leaf.
        path_probs (`dict[int, float]`): for each node the product of the target's probabilities down to it.

    Returns:
        `list[int]`: the nodes of the chosen draft.

    Lossless when: what follows accepts its tokens one by one with probability p, else draws from p without the token, which is
    drawing from p and comparing. The choice reads the drafts and p only, no randomness that is used again.
    Source: SpecDiff-2, arXiv:2511.00606, Algorithm 1; the score is sum_m prod_{j<=m} p(x_j).
    """
    return max(drafts, key=lambda draft: sum(path_probs[node] for node in draft))


def ratio_num_accepted_law(draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Return P(num_accepted = k | draft) under the ratio rule.

    With a_i = min(1, p_i(x_i) / q_i(x_i)): P(k) = a_1 ... a_k (1 - a_{k+1}) for k < G, and P(G) = a_1 ... a_G.

    Args:
        draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): x.
        draft_probs (`torch.Tensor` of shape `(B, G, V)`): q.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`): p.

    Returns:
        `torch.Tensor` of shape `(B, G + 1)`.
    """
    accept = _ratios(draft_tokens, draft_probs, target_probs).clamp(max=1)
    one = torch.ones_like(target_probs[:, 0, :1])  # (B, 1)
    survive = torch.cat([one, accept.cumprod(dim=1)], dim=1)  # (B, G + 1)
    reject = torch.cat([1 - accept, one], dim=1)
    return survive * reject


def ratio_bonus_law(draft_probs: torch.Tensor, target_probs: torch.Tensor, num_accepted: torch.Tensor) -> torch.Tensor:
    """Return the law of the bonus token under the ratio rule.

    Args:
        draft_probs (`torch.Tensor` of shape `(B, G, V)`): q.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`): p.
        num_accepted (`torch.Tensor` of shape `(B,)`, int64): k.

    Returns:
        `torch.Tensor` of shape `(B, V)`: norm(max(p_k - q_k, 0)) for k < G, p_G for k = G.
    """
    # Past the last drafted token q is 0, so the residual there is p itself.
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    return residual(_row(target_probs, num_accepted), _row(padded, num_accepted))


def block_weights(draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Return w_0 = 1 and w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)), shape `(B, G + 1)`; arguments as above."""
    ratios = _ratios(draft_tokens, draft_probs, target_probs)
    weights = [torch.ones_like(target_probs[:, 0, 0])]
    for i in range(draft_tokens.shape[1]):
        weights.append((weights[-1] * ratios[:, i]).clamp(max=1))
    return torch.stack(weights, dim=1)


def block_num_accepted_law(draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Return P(num_accepted = k | draft) under block verification.

    With S_i = sum_x max(w_i p_{i+1}(x) - q_{i+1}(x), 0), h_i = S_i / (S_i + 1 - w_i) for i < G and h_G = w_G, the accepted
    length is the largest i whose own coin of bias h_i shows heads: P(k) = h_k (1 - h_{k+1}) ... (1 - h_G), h_0 = 1.

    Args:
        draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): x.
        draft_probs (`torch.Tensor` of shape `(B, G, V)`): q.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`): p.

    Returns:
        `torch.Tensor` of shape `(B, G + 1)`.
    """
    weights = block_weights(draft_tokens, draft_probs, target_probs)
    excess = (weights[:, :-1, None] * target_probs[:, :-1] - draft_probs).clamp(min=0).sum(dim=-1)  # (B, G)
    # In this order of operations rounding cannot push the bias above 1.
    denominator = excess + (1 - weights[:, :-1])
    # 0 / 0 means w_i = 1 and p = q: the next coin shows heads with probability 1, so this one is never asked.
    heads = torch.where(denominator > 0, excess / denominator.clamp(min=torch.finfo(excess.dtype).tiny), 1.0)
    one = torch.ones_like(weights[:, :1])  # (B, 1)
    heads = torch.cat([one, heads[:, 1:], weights[:, 1:][:, -1:]], dim=1)  # (B, G + 1)
    tails_from = (1 - heads).flip(1).cumprod(dim=1).flip(1)  # (B, G + 1)
    return heads * torch.cat([tails_from[:, 1:], one], dim=1)


def block_bonus_law(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor, num_accepted: torch.Tensor
) -> torch.Tensor:
    """Return the law of the bonus token under block verification.

    Args:
        draft_tokens (`torch.Tensor` of shape `(B, G)`, int64): x.
        draft_probs (`torch.Tensor` of shape `(B, G, V)`): q.
        target_probs (`torch.Tensor` of shape `(B, G + 1, V)`): p.
        num_accepted (`torch.Tensor` of shape `(B,)`, int64): k.

    Returns:
        `torch.Tensor` of shape `(B, V)`: norm(max(w_k p_k - q_k, 0)) for k < G, p_G for k = G.
    """
    weights = _row(block_weights(draft_tokens, draft_probs, target_probs), num_accepted)
    is_last = num_accepted == draft_tokens.shape[1]
    scale = torch.where(is_last, torch.ones_like(weights), weights)
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)
    return residual(scale[:, None] * _row(target_probs, num_accepted), _row(padded, num_accepted))


def _ratios(draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Return p_i(x_i) / q_i(x_i), shape `(B, G)`. q_i(x_i) is positive: x_i was drawn from it."""
    index = draft_tokens[:, :, None]
    p = target_probs[:, :-1].gather(2, index).squeeze(2)
    q = draft_probs.gather(2, index).squeeze(2)
    return p / q.clamp(min=torch.finfo(q.dtype).tiny)


def _row(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `table[b, index[b]]` for every b; `table` is `(B, R, ...)`, `index` is `(B,)`."""
    return table[torch.arange(len(index), device=index.device), index]


def _of_chain(draft_tokens: torch.Tensor, num_accepted: torch.Tensor, bonus_tokens: torch.Tensor) -> Acceptance:
    """Return the decision about a chain `(B, G)` from the accepted tokens and the bonus token of each row, both `(B,)`."""
    # One device sync for all that the host side of the round needs to know.
    table = torch.cat([num_accepted[:, None], bonus_tokens[:, None], draft_tokens], dim=1).tolist()
    tokens = [[*drafted[:count], bonus_token] for count, bonus_token, *drafted in table]
    return Acceptance(tokens, [list(range(len(row))) for row in tokens])

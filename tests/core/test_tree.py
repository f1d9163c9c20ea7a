"""Draft trees as such: which nodes they have, who sees whom, and what walking down them is worth."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from hf_specdiff.core.acceptance import accept_by_walk
from hf_specdiff.core.acceptance import accept_on_tree
from hf_specdiff.core.acceptance import coupled_laws
from hf_specdiff.core.acceptance import sampled_child_law
from hf_specdiff.core.acceptance import select_draft
from hf_specdiff.core.acceptance import walk_bonus_law
from hf_specdiff.core.acceptance import walk_end_law
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import SampledChildren
from hf_specdiff.core.tree import TreeShape
from hf_specdiff.core.tree import best_first
from hf_specdiff.core.tree import merge_drafts


def random_marginals(seed: int, gamma: int, vocab_size: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(gamma, vocab_size, generator=generator)).softmax(-1)
    return probs.sort(dim=-1, descending=True).values.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 2, 5, 12])
def test_best_first_finds_the_most_probable_prefixes(seed: int, budget: int) -> None:
    ranked = random_marginals(seed, gamma=3, vocab_size=3)
    everything = []
    for depth in (1, 2, 3):
        for ranks in itertools.product(range(3), repeat=depth):
            everything.append(float(torch.tensor([ranked[i][rank] for i, rank in enumerate(ranks)]).double().prod()))
    shape = best_first(ranked, budget)
    assert shape.values == pytest.approx(sorted(everything, reverse=True)[:budget], rel=1e-5)
    for node, (parent, depth) in enumerate(zip(shape.parents, shape.depths, strict=True), 1):
        assert parent < node
        assert depth == 1 + (shape.depths[parent - 1] if parent else 0)


@pytest.mark.parametrize("seed", range(4))
def test_depth_first_order_is_the_same_tree_with_the_best_path_first(seed: int) -> None:
    shape = best_first(random_marginals(seed, gamma=4, vocab_size=3), budget=20)
    ordered = shape.depth_first()

    def paths(tree: TreeShape) -> dict[tuple[int, ...], float]:
        ranks: list[tuple[int, ...]] = [()]
        for parent, rank in zip(tree.parents, tree.ranks, strict=True):
            ranks.append((*ranks[parent], rank))
        return dict(zip(ranks[1:], tree.values, strict=True))

    assert paths(ordered) == paths(shape)
    assert [len(path) for path in paths(ordered)] == ordered.depths
    deepest = max(len(path) for path in paths(shape) if not any(path))
    assert list(paths(ordered))[:deepest] == [(0,) * (i + 1) for i in range(deepest)]


def test_best_first_leaves_out_what_cannot_be() -> None:
    shape = best_first([[1.0, 0.0], [0.5, 0.5]], budget=10)
    assert sorted(zip(shape.parents, shape.ranks, strict=True)) == [(0, 0), (1, 0), (1, 1)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_ancestor_mask_and_depths_equal_their_definition(num_nodes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(0, node, (), generator=generator)) for node in range(1, num_nodes + 1)]
    chain_row = list(range(num_nodes))
    short_row = parents[: num_nodes // 2 + 1]
    tree = DraftTree(torch.zeros(3, num_nodes, dtype=torch.long), [parents, chain_row, short_row])
    mask, depths = tree.ancestor_mask(), tree.depths()
    for row, row_parents in enumerate(tree.parents):
        for node in range(num_nodes + 1):
            seen, above = {node}, node
            while above and above <= len(row_parents):
                above = row_parents[above - 1]
                seen.add(above)
            if node > len(row_parents):
                seen = {node}
            assert set(mask[row, node].nonzero().flatten().tolist()) == seen
            assert int(depths[row, node]) == len(seen) - 1


def test_equal_beginnings_of_drafts_are_one_path() -> None:
    tokens, parents, paths = merge_drafts([[1, 2, 3], [1, 2, 4], [5, 2, 3], [1, 2, 3]])
    assert paths == [[1, 2, 3], [1, 2, 4], [5, 6, 7], [1, 2, 3]]
    assert tokens == [1, 2, 3, 4, 5, 2, 3]
    assert parents == [0, 1, 2, 2, 0, 5, 6]


def test_a_walk_follows_the_targets_own_tokens() -> None:
    tree = DraftTree.of_rows([[7, 8, 9, 4], [7, 8]], [[0, 0, 1, 3], [0, 1]], torch.device("cpu"))
    wanted = {(0, 0): 7, (0, 1): 9, (0, 3): 5, (1, 0): 8}
    accepted = accept_by_walk(tree.children(), lambda row, path: wanted[row, path[-1]])
    assert accepted.num_accepted == [2, 0]
    assert accepted.tokens == [[7, 9, 5], [8]]
    assert accepted.nodes == [[0, 1, 3], [0]]


def random_law(generator: torch.Generator, size: int) -> torch.Tensor:
    return (2 * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("num_siblings", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_child_leaves_the_targets_law_as_it_is(seed: int, num_siblings: int) -> None:
    """Over the draw of the child, the next token has law p; the node accepts p(siblings) + sum min(p, q)."""
    generator = torch.Generator().manual_seed(seed)
    p, q = random_law(generator, 4), random_law(generator, 4)
    q[:num_siblings] = 0
    q = q / q.sum()
    children = set(range(num_siblings))
    law, accepted = torch.zeros(4, dtype=torch.float64), 0.0
    for token in range(num_siblings, 4):
        given = sampled_child_law(p, q, torch.tensor(token))
        law += q[token] * given
        accepted += float(q[token] * sum(given[child] for child in children | {token}))
    assert float((law - p).abs().sum()) / 2 < 1e-12
    assert accepted == pytest.approx(float(p[:num_siblings].sum() + torch.minimum(p, q)[num_siblings:].sum()), abs=1e-12)


def test_control_a_child_drawn_from_another_law_changes_the_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q, other = random_law(generator, 4), random_law(generator, 4), random_law(generator, 4)
    law = sum(other[token] * sampled_child_law(p, q, torch.tensor(token)) for token in range(4))
    assert float((law - p).abs().sum()) / 2 > 1e-3


def test_control_the_ratio_test_on_the_best_of_several_drafts_changes_the_law() -> None:
    """Why samples with the ratio rule are refused: best of two by p, then accepted as if it were the only draft."""
    generator = torch.Generator().manual_seed(1)
    p, q = random_law(generator, 3), random_law(generator, 3)
    law = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.product(range(3), repeat=2):
        best = max(first, second, key=lambda token: float(p[token]))
        law += q[first] * q[second] * sampled_child_law(p, q, torch.tensor(best))
    assert float((law - p).abs().sum()) / 2 > 1e-3


def random_tree(seed: int, *, is_drawn: bool) -> tuple[DraftTree, torch.Tensor]:
    """Return a tree of two rows, the second one with filler and a node that was taken out, and p at its nodes; V is 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents = [[0, 2, 1, 2, 0], [1, 0, 2]], [[0, 0, 1, 1, 3], [0, -1, 1]]
    tree = DraftTree.of_rows(tokens, parents, torch.device("cpu"))
    if is_drawn:  # the last child of nodes 0, 1 and 3, and of nodes 0 and 1
        laws = (2 * torch.randn(5, 3, generator=generator, dtype=torch.float64)).softmax(-1)
        row_of, child_of = [{0: 0, 1: 1, 3: 2}, {0: 3, 1: 4}], [{0: 2, 1: 4, 3: 5}, {0: 1, 1: 3}]
        laws[0, 0] = laws[1, 1] = 0.0  # siblings: token 0 under the anchor, token 1 under node 1
        tree = DraftTree(tree.tokens, parents, sampled=SampledChildren(laws, row_of, child_of))
    return tree, (2 * torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)).softmax(-1)


def walks(tree: DraftTree, laws: torch.Tensor, row: int) -> dict[tuple[int, int], float]:
    """Return P(last node, token behind it) by the definition of a walk, token by token."""
    children, found = tree.children()[row], {}

    def go(node: int, weight: float) -> None:
        for token in range(laws.shape[-1]):
            mass = weight * float(laws[row, node, token])
            if (node, token) in children:
                go(children[node, token], mass)
            else:
                found[node, token] = mass

    go(0, 1.0)
    return found


@pytest.mark.parametrize("is_drawn", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_two_draws_have_the_law_of_a_walk(seed: int, is_drawn: bool) -> None:
    tree, target_probs = random_tree(seed, is_drawn=is_drawn)
    laws = coupled_laws(tree, target_probs)
    for row, places in enumerate(tree.sampled.row_of if tree.sampled else []):
        for node, place in places.items():
            token = tree.tokens[row, tree.sampled.child_of[row][node] - 1]
            expected = sampled_child_law(target_probs[row, node], tree.sampled.laws[place], token)
            torch.testing.assert_close(laws[row, node], expected)
    ends = walk_end_law(tree, laws)
    for row in range(2):
        exact = walks(tree, laws, row)
        distance = 0.0
        for node in range(6):
            bonus = walk_bonus_law(tree, laws, torch.tensor([node, node]))[row]
            distance += sum(abs(float(ends[row, node] * bonus[token]) - exact.get((node, token), 0.0)) for token in range(3))
        assert distance / 2 < 1e-12


def test_control_a_bonus_token_of_the_whole_law_is_seen() -> None:
    tree, laws = random_tree(0, is_drawn=False)
    ends, exact = walk_end_law(tree, laws)[0], walks(tree, laws, 0)
    found = {(node, token): float(ends[node] * laws[0, node, token]) for node in range(6) for token in range(3)}
    assert sum(abs(mass - exact.get(key, 0.0)) for key, mass in found.items()) / 2 > 1e-2


def test_the_two_draws_are_all_that_accepting_on_a_tree_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, target_probs = random_tree(3, is_drawn=True)
    laws, seen = coupled_laws(tree, target_probs), []

    def record(probs: torch.Tensor) -> torch.Tensor:
        seen.append(probs)
        return torch.tensor([[5, 3], [0, 1]][len(seen) - 1])

    monkeypatch.setattr("hf_specdiff.core.acceptance.draw", record)
    accepted = accept_on_tree(tree, target_probs)
    torch.testing.assert_close(seen[0], walk_end_law(tree, laws))
    torch.testing.assert_close(seen[1], walk_bonus_law(tree, laws, torch.tensor([5, 3])))
    assert accepted.nodes == [[0, 1, 3, 5], [0, 1, 3]]
    assert accepted.tokens == [[0, 1, 0, 0], [1, 2, 1]]
    assert accepted.target_laws.keys() == {(0, 0), (0, 1), (0, 3), (1, 0), (1, 1)}
    assert all(torch.equal(law, target_probs[place]) for place, law in accepted.target_laws.items())


def test_where_children_have_all_the_mass_a_walk_goes_on() -> None:
    tree = DraftTree.of_rows([[0, 1, 2]], [[0, 0, 1]], torch.device("cpu"))
    laws = torch.tensor([[[0.3, 0.7, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    torch.testing.assert_close(walk_end_law(tree, laws), torch.tensor([[0.0, 0.0, 0.7, 0.3]]))
    assert torch.equal(walk_bonus_law(tree, laws, torch.tensor([0])), laws[:, 0])  # never drawn, but by rounding


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_walking_all_drafts_accepts_at_least_as_much_as_selecting_one(seed: int, num_drafts: int) -> None:
    """Expected accepted lengths by enumeration: every node that a walk can reach counts, not those of one draft alone."""
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.randint(0, 3, (num_drafts, 3), generator=generator).tolist()
    tokens, parents, paths = merge_drafts(drafts)
    laws = [random_law(generator, 3) for _ in range(len(tokens) + 1)]

    def expected_length(tree: DraftTree) -> float:
        children = tree.children()[0]

        def below(node: int) -> float:
            reached = [(token, children[node, token]) for token in range(3) if (node, token) in children]
            return sum(float(laws[node][token]) * (1 + below(child)) for token, child in reached)

        return below(0)

    path_probs = {0: 1.0}
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1):
        path_probs[node] = path_probs[parent] * float(laws[parent][token])
    chosen = select_draft(paths, path_probs)
    device = torch.device("cpu")
    everything = DraftTree.of_rows([tokens], [parents], device)
    alone = DraftTree.of_rows([tokens], [[parent if node in chosen else -1 for node, parent in enumerate(parents, 1)]], device)
    assert expected_length(everything) >= expected_length(alone) - 1e-12
    assert expected_length(alone) == pytest.approx(max(sum(path_probs[node] for node in path) for path in paths))
    if num_drafts == 1:
        assert expected_length(everything) == expected_length(alone)

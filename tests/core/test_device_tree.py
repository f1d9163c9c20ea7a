"""Trees that are built on the device are those that the host builds."""

from dataclasses import replace

import pytest
import torch

import hf_specdiff
from hf_specdiff.core import shapes
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.shapes import draft_tree
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.tree import plant
from tests.conftest import make_drafter
from tests.conftest import make_target


def both(scores: torch.Tensor, budget: int, monkeypatch: pytest.MonkeyPatch) -> tuple[DraftTree, DraftTree]:
    speculation = SpeculationConfig(scores.shape[1], draft_shape="tree", tree_budget=budget)
    host = draft_tree(scores, speculation)
    monkeypatch.setattr(shapes, "builds_trees", lambda device: True)
    device = draft_tree(scores, speculation)
    assert host.layout is None
    assert device.layout is not None
    return host, device


def cut(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Cut filler off, which a row of a tree of the device may end in."""
    assert tensor[..., size:].unique().tolist() in ([], [0], [False], [False, True])
    return tensor[..., :size]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("gamma", "vocab_size", "budget"), [(1, 5, 4), (3, 3, 60), (7, 40, 15), (15, 50, 32), (15, 200, 128)])
def test_best_first_trees_are_the_hosts(
    gamma: int, vocab_size: int, budget: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the last node and in the same order; of the draws here no two prefixes are exactly as probable."""
    torch.manual_seed(0)
    host, device = both(torch.randn(3, gamma, vocab_size) * 3 / temperature, budget, monkeypatch)
    size = host.num_tokens
    assert [device.parents[row] for row in range(3)] == host.parents
    assert torch.equal(device.tokens[:, :size], host.tokens)
    assert torch.equal(device.depths()[:, : size + 1], host.depths())
    assert torch.equal(device.ancestor_mask()[:, : size + 1, : size + 1], host.ancestor_mask())
    assert device.deepest() == host.deepest()


def test_rows_of_different_sizes_end_in_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the drafter is certain a row has few prefixes of positive probability."""
    scores = torch.full((2, 2, 6), -torch.inf)
    scores[0, :, 3] = 0.0
    scores[1] = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.5, 4.4, 3.3, 2.2, 1.1, 0.0]])
    host, device = both(scores, 7, monkeypatch)
    assert list(device.parents) == host.parents
    assert device.num_drafted() == [2, 7]
    assert torch.equal(device.depths(), host.depths())
    assert torch.equal(device.ancestor_mask(), host.ancestor_mask())


def test_of_equal_prefixes_parents_and_lower_ranks_come_first() -> None:
    """A certain token is as probable as the one before it, and equals among siblings are many here."""
    marginals = torch.zeros(1, 4, 8)
    marginals[0, :2, 5] = 1.0
    marginals[0, 2:] = 1 / 8
    tokens, layout = plant(marginals, 12)
    parents = layout.parents[0].tolist()
    assert tokens[0, :2].tolist() == [5, 5]
    assert parents[:2] == [0, 1]
    assert all(0 <= parent < node for node, parent in enumerate(parents, 1))
    siblings: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        siblings.setdefault(parent, []).append(int(tokens[0, node]))
    assert all(len(set(own)) == len(own) for own in siblings.values())


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("more", [{"do_sample": False}, {"do_sample": True, "acceptance": "match", "top_k": 0}])
def test_rounds_are_the_same(num_rows: int, more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = make_target(), make_drafter([0, 2], seed=3)
    ids = torch.arange(3, 3 + num_rows * 4).view(num_rows, 4) % 29
    outputs = []
    for is_built in (False, True):
        monkeypatch.setattr(shapes, "builds_trees", lambda device, is_built=is_built: is_built)
        torch.manual_seed(0)
        settings = {"max_new_tokens": 20, "draft_shape": "tree", "tree_budget": 9, "return_dict_in_generate": True}
        outputs.append(hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **more))
    host, device = outputs
    assert torch.equal(host.sequences, device.sequences)
    for name in ("num_accepted", "draft_depths"):
        assert getattr(host.speculation, name) == getattr(device.speculation, name)


def test_a_tree_on_another_device_takes_its_layout_along(monkeypatch: pytest.MonkeyPatch) -> None:
    device = both(torch.randn(1, 3, 9), 5, monkeypatch)[1]
    moved = device.to(torch.device("meta"))
    assert moved.layout is not None
    assert {moved.layout.parents.device.type, moved.layout.mask.device.type, moved.tokens.device.type} == {"meta"}
    assert replace(device).layout is device.layout

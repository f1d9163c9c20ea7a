"""Which sizes follow the machine by default, and which do not."""

from typing import Any

import pytest

from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.speculation import AUTO_TREE_BUDGET
from hf_specdiff.core.speculation import DEFAULT_TREE_BUDGET
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.speculation import resolve_speculation
from tests.conftest import make_drafter


def unpublished() -> SpecDiffDrafter:
    """Return a drafter that names no size."""
    drafter = make_drafter()
    drafter.generation_config.tree_budget = None
    return drafter


def resolved(drafter: SpecDiffDrafter, **arguments: Any) -> SpeculationConfig:
    return resolve_speculation(arguments, drafter, do_sample=True, why_no_tree=lambda: None)


@pytest.mark.parametrize("shape", ["chain", "tree", "auto"])
def test_sizes_follow_the_machine_where_nobody_names_one(shape: str) -> None:
    assert resolved(unpublished(), draft_shape=shape).is_adaptive
    assert resolved(unpublished(), draft_shape=shape).tree_budget == AUTO_TREE_BUDGET


@pytest.mark.parametrize("name", ["gamma", "tree_budget"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_drafter_that_was_published_with_a_measured_size_keeps_it(shape: str, name: str) -> None:
    drafter = unpublished()
    setattr(drafter.generation_config, name, 4)
    speculation = resolved(drafter, draft_shape=shape)
    assert not speculation.is_adaptive
    assert speculation.gamma == (4 if name == "gamma" else 5)
    assert speculation.tree_budget == (4 if name == "tree_budget" else DEFAULT_TREE_BUDGET)
    # The user's word comes first.
    assert resolved(drafter, draft_shape=shape, **{name: "auto"}).is_adaptive
    setattr(drafter.generation_config, name, "auto")
    assert resolved(drafter, draft_shape=shape).is_adaptive


def test_a_size_that_the_user_names_is_fixed_in_its_own_shape() -> None:
    drafter = unpublished()
    assert not resolved(drafter, draft_shape="chain", gamma=3).is_adaptive
    assert not resolved(drafter, draft_shape="tree", tree_budget=7).is_adaptive
    # A window says nothing of how many nodes a tree has in it, nor a tree's size of a chain's.
    narrow = resolved(drafter, draft_shape="tree", gamma=3)
    assert (narrow.gamma, narrow.tree_budget, narrow.is_adaptive) == (3, AUTO_TREE_BUDGET, True)
    assert resolved(drafter, draft_shape="chain", tree_budget=7).is_adaptive


@pytest.mark.parametrize("arguments", [{"draft_shape": "samples"}, {"num_denoising_steps": 2}])
def test_sizes_stay_whole_where_no_pass_says_what_each_would_bring(arguments: dict[str, Any]) -> None:
    speculation = resolved(unpublished(), **arguments)
    assert not speculation.is_adaptive
    assert speculation.gamma == 5
    for name in ("gamma", "tree_budget"):
        with pytest.raises(ValueError, match="must be integers with"):
            resolved(unpublished(), **arguments, **{name: "auto"})

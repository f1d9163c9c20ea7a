"""Every kernel is timed at every width, and the model is left as it was."""

from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks import experts
from hf_specdiff import generate
from tests.core.oracle import drafter_for


def test_each_kernel_is_timed_at_each_width() -> None:
    target = experts.make_target(torch.device("cpu"))
    usual = target.get_experts_implementation()
    rows = experts.measure(target, (1, 3), num_passes=1)
    assert {(row["width"], row["kernel"]) for row in rows} == {(width, name) for width in (1, 3) for name in experts.KERNELS}
    assert all(row["seconds"] > 0 for row in rows)
    assert target.get_experts_implementation() == usual


def test_the_kernel_is_put_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    target = experts.make_target(torch.device("cpu"))
    usual, forward = target.get_experts_implementation(), target.model.norm.forward

    def broken(states: torch.Tensor) -> Any:
        if target.get_experts_implementation() != usual:
            raise RuntimeError("out of memory")
        return forward(states)

    monkeypatch.setattr(target.model.norm, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        experts.measure(target, (1,), num_passes=1)
    assert target.get_experts_implementation() == usual


@pytest.mark.parametrize("kernel", [None, "batched_mm"])
def test_our_passes_take_the_kernel_that_the_model_has(kernel: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host loads models with `grouped_mm` and keeps it on a CPU; what the user set stays too."""
    target = experts.make_target(torch.device("cpu"))
    assert set(target.get_experts_implementation().values()) == {"grouped_mm"}
    if kernel is not None:
        target.set_experts_implementation(kernel)
    taken = set()
    for name in ("grouped_mm", "batched_mm"):
        run = ALL_EXPERTS_FUNCTIONS[name]

        def watched(*arguments: Any, name: str = name, run: Any = run) -> Any:
            taken.add(name)
            return run(*arguments)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, watched)
    ids = torch.arange(3, 9)[None]
    plain = target.generate(ids, do_sample=False, max_new_tokens=8)
    assert taken == {kernel or "grouped_mm"}
    ours = generate(target, ids, assistant_model=drafter_for(target), draft_shape="tree", do_sample=False, max_new_tokens=8)
    assert torch.equal(ours, plain)
    assert taken == {kernel or "grouped_mm"}

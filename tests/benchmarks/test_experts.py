"""Every kernel is timed at every width, and the model is left as it was."""

from typing import Any

import pytest
import torch

from benchmarks import experts


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

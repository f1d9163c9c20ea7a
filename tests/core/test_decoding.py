"""The loop asks the device once a round; twice where the size or the shape of a draft hangs on the drafter's probabilities."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

import hf_specdiff
from hf_specdiff import Profile
from hf_specdiff.core import decoding
from hf_specdiff.core import shapes
from hf_specdiff.core.decoding import decode
from hf_specdiff.core.record import Round
from tests.conftest import make_drafter
from tests.conftest import shared_target

# What makes the host wait for numbers of the device: methods of tensors, and operations whose result has no shape before.
METHODS = {"tolist", "cpu", "numpy"}
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}


class ReadBacks:
    """Count inside `with` what a device would be waited for; `item`, `int`, `float` and `bool` are `_local_scalar_dense`."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()
        self.modes = [_Methods(self.counts), _Operations(self.counts)]

    def __enter__(self) -> "ReadBacks":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else []
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if name in OPERATIONS or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 1),
    ],
)
def test_the_count_sees(read: Any) -> None:
    numbers = torch.arange(3)
    with ReadBacks() as seen:
        read(numbers)
    assert sum(seen.counts.values()) == 1
    with ReadBacks() as seen:
        torch.where(numbers > 1, numbers, 0).gather(0, numbers)[numbers].cumsum(0)
    assert not seen.counts


PROFILE = Profile([1, 2, 65], [0.010, 0.0101, 0.011], drafter_seconds=0.0005)
CHAIN, TREE = {"draft_shape": "chain", "gamma": 5}, {"draft_shape": "tree", "tree_budget": 15}
RATIO, BLOCK, MATCH = ({"do_sample": True, "top_k": 0, "acceptance": rule} for rule in ("ratio", "block", "match"))
GREEDY = {"do_sample": False}
AUTO = {"gamma": "auto", "tree_budget": "auto", "profile": PROFILE}


def per_round(monkeypatch: pytest.MonkeyPatch, layers: list[int] | None, num_rows: int, settings: dict[str, Any]) -> set[int]:
    """Return the read-backs of a call's rounds that draft something, without the first, which tries the drafter's weights."""
    seen: list[tuple[int, int]] = []

    def watched(*arguments: Any) -> Iterator[Round]:
        for addition in decode(*arguments):
            seen.append((sum(read_backs.counts.values()), addition.outcome.draft.num_tokens))
            yield addition

    monkeypatch.setattr(decoding, "decode", watched)
    with ReadBacks() as read_backs:
        hf_specdiff.generate(
            shared_target(),
            torch.arange(3, 3 + num_rows * 4).view(num_rows, 4) % 29,
            assistant_model=make_drafter(layers, seed=3),
            max_new_tokens=16,
            eos_token_id=2 if num_rows > 1 else -1,  # looked for in any case; of several rows some may end
            **settings,
        )
    counts = [now - before for (before, _), (now, size) in pairwise(seen) if size > 0]
    assert len(counts) > 4
    return set(counts[1:])


ROUNDS = {
    "chain": (CHAIN | GREEDY, 1),
    "chain by match": (CHAIN | MATCH, 1),
    "chain by ratio": (CHAIN | RATIO, 1),
    "chain by block": (CHAIN | BLOCK, 1),
    # The host builds the tree from the drafter's likeliest tokens, which it reads before the target's pass.
    "tree": (TREE | GREEDY, 2),
    "tree by match": (TREE | MATCH, 2),
    "tree by ratio": (TREE | RATIO, 2),
    # How many tokens the target reads is decided by the host, from the drafter's probabilities.
    "auto chain": (CHAIN | GREEDY | AUTO, 2),
}


BUILT = {
    "tree": (TREE | GREEDY, 1),
    "tree by match": (TREE | MATCH, 1),
    "tree by ratio": (TREE | RATIO, 2),
    # What is copied is looked up in the text, and weighed by the drafter's probabilities row by row.
    "tree with copies": (TREE | GREEDY | {"prompt_lookup_num_tokens": 4}, 6),
}


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("name", ROUNDS)
def test_read_backs_of_a_round(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, expected = ROUNDS[name]
    torch.manual_seed(0)
    assert per_round(monkeypatch, [0, 2], num_rows, settings) == {expected}


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("name", ["tree", "tree by match", "tree by ratio", "tree with copies"])
def test_read_backs_where_the_device_builds_trees(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn and copied nodes are placed by the host, which reads the likeliest tokens for it."""
    monkeypatch.setattr(shapes, "builds_trees", lambda device: True)
    settings, expected = BUILT[name]
    torch.manual_seed(0)
    counts = per_round(monkeypatch, [0, 2], num_rows, settings)
    assert counts == {expected} or ("copies" in name and max(counts) <= expected)


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("name", ["chain", "tree", "tree by ratio"])
def test_read_backs_over_a_static_cache(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as over a dynamic one: what is taken back and moved is known without asking."""
    monkeypatch.setattr(shapes, "builds_trees", lambda device: True)
    settings, expected = (BUILT | {"chain": ROUNDS["chain"]})[name]
    torch.manual_seed(0)
    assert per_round(monkeypatch, [0, 2], num_rows, settings | {"cache_implementation": "static"}) == {expected}


@pytest.mark.parametrize("name", ["chain", "tree by ratio"])
def test_read_backs_of_a_round_of_a_drafter_that_reads_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, expected = ROUNDS[name]
    torch.manual_seed(0)
    assert per_round(monkeypatch, None, 8, settings) == {expected}


class Never(StoppingCriteria):
    """Asks the device after every token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == -1


def test_control_what_asks_token_by_token_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(per_round(monkeypatch, None, 1, CHAIN | GREEDY | {"stopping_criteria": [Never()]})) > 1

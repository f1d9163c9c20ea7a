"""A target on two devices, its drafter on a third: nothing meets that lies apart, and little crosses in a round.

No machine that runs these tests has three devices. Tensors here lie on the CPU and say that they lie elsewhere. An operation
that reads tensors of two places is an error, as on real devices, and moves between places are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils._pytree import tree_map_only

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from tests.conftest import make_drafter
from tests.conftest import make_target

# The one kind of device that every build knows and that holds nothing; its numbers tell the places apart.
FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")
CPU = torch.device("cpu")
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# They read places in one tensor and values of another: numbers of the host may name the places.
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
_crossings: list[str] = []


class Placed(torch.Tensor):
    """A tensor that says it lies on some device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "Placed":
        placed = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )
        placed.held = held
        return placed

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held!r}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Borders(TorchDispatchMode):
    """Lets tensors be made on devices that there are not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Making(TorchFunctionMode):
    """Lets numbers become tensors there, also those in an index: torch's own way asks the device for memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if func is torch.Tensor.__getitem__:
            args = (args[0], as_tensors(args[1]))
        if func is not torch.tensor or wanted is None or torch.device(wanted) == CPU:
            return func(*args, **kwargs)
        return Placed(func(*args, **{**kwargs, "device": CPU}), torch.device(wanted))


def as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation where its tensors say they lie; refuse one over two places."""
    places = places_of(func, args, kwargs)
    wanted = kwargs.get("device")
    if func in MOVES:
        goal = wanted if func is torch.ops.aten._to_copy.default else args[0].device
        place = args[0].device if goal is None else torch.device(goal)
        if len(places | {place}) > 1:
            _crossings.append(str(func))
    else:
        if len(places) > 1:
            raise RuntimeError(f"{func} reads tensors of several devices: {sorted(map(str, places))}")
        place = torch.device(wanted) if wanted is not None else next(iter(places), CPU)
    if wanted is not None:
        kwargs = {**kwargs, "device": CPU, **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    result = func(*tree_map_only(Placed, lambda t: t.held, args), **tree_map_only(Placed, lambda t: t.held, kwargs))
    if func._schema.is_mutable and isinstance(result, torch.Tensor):
        return args[0]
    return result if place == CPU else tree_map_only(torch.Tensor, lambda t: Placed(t, place), result)


def places_of(func: Any, args: Any, kwargs: Any) -> set[torch.device]:
    """Return where the tensors of an operation lie; single numbers on the CPU may join any others."""
    read = args[:1] + args[2:] if func in INDEXING else args
    tensors = [value for value in tree_flatten((read, kwargs))[0] if isinstance(value, torch.Tensor)]
    return {tensor.device for tensor in tensors if tensor.dim() > 0 or isinstance(tensor, Placed)}


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Put a module on a device, and let it fetch what it is given."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and not isinstance(weight, Placed):
                part._parameters[name] = torch.nn.Parameter(Placed(weight.data, device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Placed):
                part._buffers[name] = Placed(buffer, device)

    def fetch(module: Any, args: Any, kwargs: Any) -> Any:
        def to(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device) if tensor.device != device else tensor

        return tree_map_only(torch.Tensor, to, args), tree_map_only(torch.Tensor, to, kwargs)

    module.register_forward_pre_hook(fetch, with_kwargs=True)


def spread_target() -> Any:
    """Return a target whose last layer and head lie apart from the rest."""
    model = make_target(attn_implementation="eager")
    for layer in (model.model.embed_tokens, model.model.rotary_emb, model.model.layers[0], model.model.layers[1]):
        place(layer, FIRST)
    for layer in (model.model.layers[2], model.model.norm, model.lm_head):
        place(layer, SECOND)
    return model


@contextmanager
def borders() -> Iterator[list[str]]:
    _crossings.clear()
    with Borders(), Making(), torch.no_grad():
        yield _crossings


def test_tensors_of_two_devices_do_not_meet() -> None:
    """The control: what real devices refuse is refused here."""
    with borders() as crossings:
        first, second = Placed(torch.ones(3), FIRST), Placed(torch.ones(3), SECOND)
        assert torch.arange(3, device=SECOND).device == SECOND
        with pytest.raises(RuntimeError, match="several devices"):
            first + second
        with pytest.raises(RuntimeError, match="several devices"):
            first + torch.ones(3)
        assert not crossings
        assert (first + second.to(FIRST)).tolist() == [2.0, 2.0, 2.0]
        assert len(crossings) == 1


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_target_on_two_devices_with_its_drafter_on_a_third(shape: str, drafter: SpecDiffDrafter) -> None:
    prompts = torch.randint(3, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "max_new_tokens": 14, "draft_shape": shape, "return_dict_in_generate": True}
    want = {rows: make_target().generate(prompts[:rows], do_sample=False, max_new_tokens=14) for rows in (1, 2)}
    model = spread_target()
    for num_rows, ids in want.items():
        with borders() as crossings:
            inputs = Placed(prompts[:num_rows].clone(), FIRST)
            hf_specdiff.generate(model, inputs, assistant_model=drafter, **settings | {"max_new_tokens": 3})  # tries the model
            crossings.clear()
            output = hf_specdiff.generate(model, inputs, assistant_model=drafter, **settings)
            num_moves = len(crossings)
        assert output.sequences.tolist() == ids.tolist()
        assert num_moves / (1 + output.speculation.num_rounds) <= 20, num_moves


def test_a_drafter_beside_the_last_layer(prompt: torch.Tensor) -> None:
    want = make_target().generate(prompt, do_sample=False, max_new_tokens=14)
    drafter = make_drafter([0, 2])
    place(drafter, SECOND)
    with borders():
        output = hf_specdiff.generate(
            spread_target(), Placed(prompt.clone(), FIRST), assistant_model=drafter, do_sample=False, max_new_tokens=14
        )
    assert output.tolist() == want.tolist()

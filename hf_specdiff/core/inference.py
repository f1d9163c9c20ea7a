"""torch's inference mode around the loop: what may run in it, and how what comes out leaves it.

In that mode operations keep no books for autograd, which makes a round of a small model 5 to 9 % quicker. Its tensors can never
be part of a graph again, so nothing of it may reach the user: neither does the code of others, which may want gradients, run in
it, nor does a tensor leave the entry that was made in it. Knows no model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isfunction
from inspect import ismethod
from typing import Any

import torch
from torch.nn.modules import module as global_hooks
from torch.utils._pytree import tree_map_only
from transformers import Cache
from transformers.utils import ModelOutput

OWN_AND_HOST = ("transformers.", __name__.rsplit(".", 1)[0] + ".")


@contextmanager
def inference(models: list[torch.nn.Module], callbacks: list[Any], cache: Cache | None = None) -> Iterator[None]:
    """Run what is inside `with` in inference mode, unless something might not take it, and leave no trace of the mode.

    Args:
        models (`list[torch.nn.Module]`): target and drafter. Compiled ones would be compiled once more for this mode, offloaded
            or sharded weights are moved by hooks, and hooks of others may keep what they see, or want gradients.
        callbacks (`list`): logits processors, stopping criteria and streamers; `None` for none. The host's read ids and scores;
            those of others, and functions of others inside the host's, may do anything.
        cache (`transformers.Cache`, *optional*): the caller's; made ordinary again also when the loop breaks off.

    Yields:
        Nothing.
    """
    if torch.is_inference_mode_enabled() or not (all(map(_is_known, callbacks)) and all(map(_is_plain, models))):
        yield  # not under `inference_mode(False)`, which would switch gradients on
        return
    try:
        with torch.inference_mode():
            yield
    finally:
        if cache is not None:
            make_ordinary(cache)
        for model in models:
            for module in _modules(model):
                # Rotary embeddings that follow the text's length keep new frequencies; torch's own modules keep nothing.
                if not type(module).__module__.startswith("torch."):
                    _make_ordinary_in(module._buffers)
                    _make_ordinary_in(vars(module))


def ordinary(output: ModelOutput) -> ModelOutput:
    """Make the tensors of an output ones that autograd takes, in place, unless the caller is in inference mode too.

    Args:
        output (`ModelOutput`): of the loop.

    Returns:
        `ModelOutput`: the same object.
    """
    for name, value in output.items():
        if isinstance(value, Cache):
            make_ordinary(value)
        else:
            output[name] = tree_map_only(torch.Tensor, _ordinary_tensor, value)
    return output


def make_ordinary(cache: Cache) -> None:
    """Make a cache's tensors ones that autograd takes, layer by layer, unless the caller is in inference mode too.

    Args:
        cache (`transformers.Cache`): changed in place.
    """
    for layer in cache.layers:
        _make_ordinary_in(vars(layer))
        for value in vars(layer).values():
            if isinstance(value, dict):  # running states
                _make_ordinary_in(value)


def _make_ordinary_in(values: dict[Any, Any]) -> None:
    # Quantized layers keep a tuple of a tensor and its scale.
    for name in [name for name, value in values.items() if isinstance(value, (torch.Tensor, tuple))]:
        value = values[name]
        is_tensor = isinstance(value, torch.Tensor)
        values[name] = _ordinary_tensor(value) if is_tensor else tree_map_only(torch.Tensor, _ordinary_tensor, value)


def _modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield a model and all modules in it; a shared one several times: `Module.modules`, which tells them apart, is slower."""
    left = [model]
    while left:
        module = left.pop()
        yield module
        left += [child for child in module._modules.values() if child is not None]


def _ordinary_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _is_known(callback: Any) -> bool:
    """Return whether all code behind a callback is the host's or our own."""
    is_ours = callback is None or type(callback).__module__.startswith(OWN_AND_HOST)
    return is_ours and not any(isfunction(value) or ismethod(value) for value in getattr(callback, "__dict__", {}).values())


def _is_plain(model: torch.nn.Module) -> bool:
    """Return whether all weights lie in memory as they are, and nothing but the model's own code runs in a pass."""
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        return False
    for module in _modules(model):
        if "_hf_hook" in vars(module):
            return False
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks and not all(_module_of(hook).startswith(OWN_AND_HOST) for hook in hooks.values()):
                return False
        for parameter in module._parameters.values():
            if parameter is not None and (parameter.is_meta or hasattr(parameter, "device_mesh")):
                return False
    return not (global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def _module_of(function: Any) -> str:
    return getattr(function, "__module__", None) or ""

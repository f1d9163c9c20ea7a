"""torch's inference mode around the loop: what may run in it, and how what comes out leaves it.

In that mode operations keep no books for autograd, which makes a round of a small model 5 to 9 % quicker. Its tensors can never
be part of a graph again, so nothing of it may reach the user: neither does the code of others, which may want gradients, run in
it, nor does a tensor leave the entry that was made in it. Knows no model. Imported by the entry.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import Cache
from transformers.utils import ModelOutput

OWN_AND_HOST = ("transformers.", __name__.rsplit(".", 1)[0] + ".")


def inference(models: Iterable[torch.nn.Module], callbacks: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return inference mode for `with`, or nothing where something might not take it.

    Args:
        models (`Iterable[torch.nn.Module]`): target and drafter. Compiled ones would be compiled once more for this mode, and
            offloaded or sharded weights are moved and gathered by hooks, which must not leave such tensors in the model.
        callbacks (`Iterable`): logits processors, stopping criteria and streamers; `None` for none. The host's read ids and
            scores; those of others may do anything, gradients included.

    Returns:
        A context manager.
    """
    is_known = all(type(each).__module__.startswith(OWN_AND_HOST) for each in callbacks if each is not None)
    # Not `inference_mode(False)`, which would switch gradients on.
    return torch.inference_mode() if is_known and all(_is_plain(model) for model in models) else nullcontext()


def _is_plain(model: torch.nn.Module) -> bool:
    """Return whether all weights lie in memory as they are, and the forward pass is Python's own."""
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    parameters = list(model.parameters())
    is_here = all(parameter.device.type != "meta" and not hasattr(parameter, "device_mesh") for parameter in parameters)
    return is_here and not is_compiled


def ordinary(output: ModelOutput) -> ModelOutput:
    """Make the tensors of an output ones that autograd takes, in place, unless the caller is in inference mode too.

    Args:
        output (`ModelOutput`): of the loop.

    Returns:
        `ModelOutput`: the same object.
    """
    for name, value in output.items():
        if not isinstance(value, Cache):
            output[name] = tree_map_only(torch.Tensor, _ordinary_tensor, value)
    return output


def make_ordinary(cache: Cache) -> None:
    """Make a cache's tensors ones that autograd takes, layer by layer, unless the caller is in inference mode too.

    Args:
        cache (`transformers.Cache`): changed in place.
    """
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                setattr(layer, name, _ordinary_tensor(value))


def _ordinary_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor

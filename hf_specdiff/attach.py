"""Let a target's own `generate` run the full loop, so that pipelines and everything else that calls it do.

Knows how a method of one object is replaced and given back.
"""

import inspect
from functools import wraps
from typing import Any

from transformers import GenerationMixin

from hf_specdiff.core.generate import generate
from hf_specdiff.core.own_drafter import is_own_drafter

# On the wrapper, under this name: the `generate` that the object itself carried before, or None where its class's own showed.
REPLACED = "_hf_specdiff_replaced"


def attach(model: Any) -> Any:
    """Make `model.generate(assistant_model=drafter)` run the full loop for diffusion drafters and drafters of your own.

    Every other call of `model.generate` is what it was. Only this object changes, not its class; attaching twice is attaching
    once.

    Args:
        model (`transformers.PreTrainedModel`): the target.

    Returns:
        `transformers.PreTrainedModel`: the same object.

    Raises:
        TypeError: if the model cannot generate.
    """
    if not callable(getattr(type(model), "generate", None)):
        raise TypeError(f"`model` must be a model that can generate, got {type(model).__name__}.")
    detach(model)
    plain_generate = model.generate
    signature = inspect.signature(GenerationMixin.generate)

    @wraps(plain_generate)
    def attached_generate(*args: Any, **kwargs: Any) -> Any:
        drafter = kwargs.get("assistant_model")
        is_ours = getattr(getattr(drafter, "config", None), "model_type", None) == "specdiff" or is_own_drafter(drafter)
        if not is_ours or kwargs.get("custom_generate") is not None or kwargs.get("speculation_type") is not None:
            return plain_generate(*args, **kwargs)
        # Positional arguments of the host's `generate` become named ones; its own keyword rest is laid flat.
        named = signature.bind(model, *args, **kwargs).arguments
        named.pop("self")
        named |= named.pop("kwargs", {})
        return generate(model, **named)

    setattr(attached_generate, REPLACED, vars(model).get("generate"))
    model.generate = attached_generate
    return model


def detach(model: Any) -> Any:
    """Undo `attach`; a model that is not attached stays as it is.

    Args:
        model (`transformers.PreTrainedModel`): the target.

    Returns:
        `transformers.PreTrainedModel`: the same object.
    """
    own = vars(model).get("generate")
    if hasattr(own, REPLACED):
        replaced = getattr(own, REPLACED)
        del model.generate  # the class's own shows again
        if replaced is not None:
            model.generate = replaced
    return model

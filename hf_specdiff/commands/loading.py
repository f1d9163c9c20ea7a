"""Loading targets, drafters and tokenizers for the commands: what goes wrong ends in one line that names the argument."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.formats.loading import load_drafter as load_any_drafter


def load_model(role: str, name: str, *, dtype: str, device_map: str | dict[str, Any]) -> Any:
    """Load a model, or say in one line why not.

    Args:
        role (`str`): the argument's name, for the message.
        name (`str`): folder or Hub repository.
        dtype (`str`): as for `from_pretrained`.
        device_map (`str` or `dict`): as for `from_pretrained`.

    Returns:
        `transformers.PreTrainedModel`: in evaluation mode.

    Raises:
        ValueError: if it cannot be loaded.
    """
    with _one_line(role, name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()


def load_drafter(name: str, target: Any, *, dtype: str, device_map: str | dict[str, Any]) -> Any:
    """Load a drafter of any format.

    Args:
        name (`str`): folder or Hub repository.
        target (`transformers.PreTrainedModel`, *optional*): the model it drafts for.
        dtype (`str`): as for `from_pretrained`.
        device_map (`str` or `dict`): as for `from_pretrained`.

    Returns:
        `SpecDiffDrafter`: in evaluation mode.

    Raises:
        ValueError: if it cannot be loaded.
    """
    with _one_line("drafter", name):
        return load_any_drafter(name, target, dtype=dtype, device_map=device_map)


def is_python_name(name: str) -> bool:
    """Return whether a name is `FILE.py:NAME`, something that a Python file of the user's defines."""
    return name.rpartition(":")[0].endswith(".py")


def load_own_drafter(name: str, target: Any) -> Any:
    """Run a Python file of the user's, and return the drafter that it makes.

    Args:
        name (`str`): `FILE.py:NAME`; what NAME stands for is a drafter (see `Drafter`), or makes one when it is called with the
            target.
        target (`transformers.PreTrainedModel`): the model it drafts for.

    Returns:
        `Drafter`: the user's object.

    Raises:
        ValueError: if there is no such file, or no such name in it.
        TypeError: if what it stands for is no drafter and makes none.
    """
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"`drafters` must name a file that exists, got {path!r} in {name!r}.")
    spec = importlib.util.spec_from_file_location(f"hf_specdiff_own_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data classes look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        raise ValueError(f"`drafters` must name something that {path} defines, got {attribute!r}.")
    drafter = getattr(module, attribute)
    if isinstance(drafter, type) or not is_own_drafter(drafter):
        drafter = drafter(target) if callable(drafter) else drafter
    if not is_own_drafter(drafter):
        raise TypeError(
            f"`drafters` must name an object with `draft` and `target_layer_ids`, or what makes one when it is called with the "
            f"target, got {type(drafter).__name__} from {name!r}."
        )
    return drafter


def load_tokenizer(role: str, name: str) -> Any:
    """Load a tokenizer that pads on the left; arguments and errors as `load_model`."""
    with _one_line(role, name):
        return AutoTokenizer.from_pretrained(name, padding_side="left")


@contextmanager
def _one_line(role: str, name: str) -> Iterator[None]:
    """Turn what loading may raise into one line that names the argument."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{role}` must be a model folder or a Hub repository, got {name!r}: {first_line}") from error

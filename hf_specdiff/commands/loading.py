"""Loading targets, drafters and tokenizers for the commands: what goes wrong ends in one line that names the argument."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

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

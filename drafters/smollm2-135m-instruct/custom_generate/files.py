"""Files of a drafter: written whole, beside their place first and then renamed; weights that are safe to read, and finite.

Knows how the host finds weight files; knows no network.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

# How the names of files end that are not whole yet, or that a killed process left behind.
PARTIAL = ".partial"
INDEX = "model.safetensors.index"
# What says where on the Hub or in its cache a file lies.
PLACE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that no reader ever sees half of it, whatever stops the writer.

    Args:
        path (`pathlib.Path`): the file; its folder must exist. A file that is there is replaced.
        write (`Callable`): called with the path to write to, in the same folder. Its suffix is always `.partial`: a writer that
            chooses a format by the suffix must be told the format.

    Raises:
        Exception: what `write` raises; what it had written is removed, so that a full disk gets its room back.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_whole` does.

    Args:
        path (`pathlib.Path`): the file; its folder must exist.
        text (`str`): all of it.
    """
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def check_weight_files(name: Any, kwargs: dict[str, Any]) -> None:
    """Refuse an index that names anything but safetensors files beside it: the host would unpickle it, or follow it elsewhere.

    Args:
        name (`str` or path): folder or Hub repository.
        kwargs (`dict[str, Any]`): those of `from_pretrained`.

    Raises:
        ValueError: if so, or if the index is none.
    """
    variant = kwargs.get("variant")
    index_name = f"{INDEX}.json" if variant is None else f"{INDEX}.{variant}.json"
    path = _find(name, index_name, kwargs)
    if path is None:
        return
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{index_name}` must be a JSON file in {str(name)!r}, got {type(error).__name__}: {error}."
        ) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"`{index_name}` must have a 'weight_map' and 'metadata' in {str(name)!r}, got {str(index)[:60]}.")
    for file in weight_map.values():
        if not is_safe_name(file):
            raise ValueError(
                f"`{index_name}` must name safetensors files in its own folder, got {str(file)[:60]!r} in {str(name)!r}: other "
                "formats can run code while they are read. Do not use this repository, or save it anew with safetensors."
            )


def is_safe_name(file: Any) -> bool:
    """Return whether a file's name stays in its folder and is that of a safetensors file."""
    return isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\") and ":" not in file


def _find(name: Any, file: str, kwargs: dict[str, Any]) -> str | None:
    """Return where a file of a folder or a repository lies on this machine, `None` if there is none."""
    if os.path.isdir(name):
        path = Path(name, kwargs.get("subfolder") or "", file)
        return str(path) if path.is_file() else None
    place = {key: kwargs[key] for key in PLACE_ARGUMENTS if kwargs.get(key) is not None}
    # What is wrong with the repository itself the host says when it loads.
    return cached_file(
        str(name),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **place,
    )


def check_finite(model: torch.nn.Module, name: Any) -> None:
    """Refuse weights that hold an infinity or no number: sampling would fail on them later, in the middle of a text.

    Args:
        model (`torch.nn.Module`): as it was loaded; weights that are not in memory are passed over.
        name (`str` or path): where it came from, for the message.

    Raises:
        ValueError: for the first that is not finite.
    """
    for key, tensor in model.named_parameters():
        if tensor.is_meta or tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold finite weights, got nan or inf in {key!r} of {str(name)!r}. Was "
                "the training diverging, or the dtype too narrow?"
            )


def check_drafted_ids(model: Any, name: Any) -> None:
    """Refuse a reduced vocabulary that leaves the target's or names a token twice.

    Args:
        model (`SpecDiffDrafter`): as it was loaded; a table that is not in memory is passed over.
        name (`str` or path): where it came from, for the message.

    Raises:
        ValueError: if so.
    """
    ids, most = model.drafted_ids, model.config.vocab_size
    if ids is None or ids.is_meta:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= most or len(ids.unique()) < len(ids):
        raise ValueError(
            f"the tensor `d2t` of {str(name)!r} must lead to different ids from 0 to {most - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}, {len(ids.unique())} of {len(ids)} different. Is the drafter made for another vocabulary?"
        )

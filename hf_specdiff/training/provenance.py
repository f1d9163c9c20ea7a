"""What a folder was made from, written down beside it, so that two runs never mix."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.repository import cached_revision

# Elements of each weight that a digest reads: another training changes all of them.
NUM_DIGESTED = 64


def target_digest(target: Any) -> str:
    """Return what tells a target's weights from others', in whatever precision and from whichever folder they were loaded.

    Args:
        target (`transformers.PreTrainedModel`): the target.

    Returns:
        `str`: 16 hexadecimal digits, of all names and shapes and of the first elements of each weight, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(target.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        head = weight.flatten()[:NUM_DIGESTED].to(torch.bfloat16).cpu()
        digest.update(head.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def identity_of(target: Any) -> dict[str, str | None]:
    """Return a target's name, its revision on the Hub and its digest."""
    name = target.name_or_path or None
    return {"target": name, "target_revision": cached_revision(target.name_or_path), "target_digest": target_digest(target)}


def read_claim(path: Path) -> dict[str, Any] | None:
    """Return what `claim` wrote, or `None` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_claim(path: Path, settings: dict[str, Any], folder: Path, also: tuple[str, ...] = ()) -> None:
    """Refuse a folder that holds something made with other settings; writes nothing.

    Args:
        path (`pathlib.Path`): the file that `claim` writes.
        settings (`dict`): all that decides what the folder will hold.
        folder (`pathlib.Path`): the folder, for the message.
        also (`tuple[str, ...]`): names of settings that may differ: a target's name, where its digest tells.

    Raises:
        ValueError: if the file is there and says otherwise.
    """
    earlier = read_claim(path)
    if earlier is None:
        return
    settings = json.loads(json.dumps(settings))  # as they look when they are read back
    changed = {name: (earlier.get(name), value) for name, value in settings.items() if earlier.get(name) != value}
    changed = {name: values for name, values in changed.items() if name not in also}
    if changed:
        raise ValueError(
            f"`output` must be a fresh folder or hold a run with the same settings, got {str(folder)!r} with other "
            f"ones: {changed} (earlier, now). Pass the same settings to resume, or another folder."
        )


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Write down what decides a folder's content, unless that is done; call `check_claim` first."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, json.dumps(settings, indent=2))

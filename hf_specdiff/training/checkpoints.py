"""A run's checkpoints and the finished folder: whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and remove newer ones that were not.

    The host writes a checkpoint's files in place, `trainer_state.json` last, and resumes from the highest number.

    Args:
        folder (`pathlib.Path`): of the checkpoints; need not exist.

    Returns:
        `str`, *optional*: a checkpoint's folder; `None` if there is none.
    """
    while folder.is_dir() and (newest := get_last_checkpoint(folder)) is not None:
        try:
            json.loads((Path(newest) / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(newest)
            continue
        return newest
    return None


def save_whole(model: Any, output: Path) -> None:
    """Save a model beside its place, then move its files in, the configuration last: a folder that loads is complete.

    Args:
        model (`transformers.PreTrainedModel`): the drafter.
        output (`pathlib.Path`): its folder; the place beside is in its `work` subfolder.
    """
    partial = output / "work" / "finished"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        place = output / path.name
        if place.is_dir():
            shutil.rmtree(place)  # the code of an earlier run's drafter
        os.replace(path, place)
    partial.rmdir()

"""Where prompts come from: a file of texts, a data set on disk, a data set of the Hub."""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import DatasetDict
from datasets import load_dataset
from datasets import load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.exceptions import DatasetsError

from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import prompt_of
from hf_specdiff.training.prompts import read_prompts
from hf_specdiff.training.prompts import without_blank

FIELDS = ("prompt", "text", "messages")
FILES = (".txt", ".jsonl", ".json", ".parquet", ".arrow")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_corpus(source: str, *, as_is: bool = False, field: str | None = None) -> list[Prompt]:
    """Read prompts from wherever they are.

    Args:
        source (`str`): a text or JSON-lines file; a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; a
            `.parquet` or `.arrow` file; or `org/name` of a data set on the Hub. Where there are splits, `train` is read, or the
            one behind a colon: `folder:test`, `org/name:test`, and of the Hub's also a part, `org/name:train[:5000]`.
        as_is (`bool`): see `prompt_of`.
        field (`str`, *optional*): see `prompt_of`.

    Returns:
        `list`: the prompts, blank ones left out.

    Raises:
        ValueError: if there is nothing of that name, no such split, or no prompt in it.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        return read_prompts(path, as_is=as_is, field=field)
    records = _load(source)
    fields = FIELDS if field is None else (field,)
    names = [name for name in fields if name in records.column_names]
    if not names:
        raise ValueError(
            f"`prompts` must have a column {', '.join(fields)}, got {', '.join(records.column_names)} in {source!r}."
        )
    rows = enumerate(records.select_columns(names), 1)  # the others need not even be decoded
    return without_blank(
        [prompt_of(row, f"row {number} of {source!r}", as_is=as_is, field=field) for number, row in rows], source
    )


def _load(source: str) -> Any:
    """Return the `datasets.Dataset` that a source names."""
    name, _, split = (source, "", "") if Path(source).exists() else source.partition(":")
    path = Path(name)
    is_hub_name = HUB_NAME.fullmatch(name) and path.suffix not in FILES
    if not path.exists() and not is_hub_name:
        raise ValueError(
            f"`prompts` must be a text or JSON-lines file, a data set on disk or the name of one on the Hub, got {name!r}, "
            "which does not exist."
        )
    try:
        if path.is_dir():
            return _split_of(load_from_disk(name), split, name)
        if path.suffix == ".parquet":
            return Dataset.from_parquet(name)
        if path.suffix == ".arrow":
            return Dataset.from_file(name)
        return load_dataset(name, split=split or "train")
    except (OSError, DatasetsError, ValueError) as error:
        # This one only says that there was another.
        first = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = (str(first).strip() or repr(first)).splitlines()[0]
        raise ValueError(f"`prompts` must be a data set that can be loaded, got {source!r}: {reason}") from error


def _split_of(loaded: Dataset | DatasetDict, split: str, name: str) -> Dataset:
    """Return one split of what was saved with `save_to_disk`."""
    if isinstance(loaded, Dataset):
        if split:
            raise ValueError(f"{name!r} holds one data set and no splits. Leave ':{split}' out.")
        return loaded
    if (split or "train") not in loaded:
        raise ValueError(f"there is no split {split or 'train'!r}. Name one of {', '.join(loaded)} behind a colon.")
    return loaded[split or "train"]

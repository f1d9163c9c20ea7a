"""What a benchmark has seen so far, line by line in a file, so that an interrupted run goes on.

Knows JSON lines; knows neither models nor figures.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_specdiff.core.files import PARTIAL
from hf_specdiff.core.files import write_text_whole

SETTINGS = "settings.json"
LINES = "journal.jsonl"


class Journal:
    """Records of a run, in memory and, with a folder, on disk.

    Args:
        folder (`pathlib.Path`, *optional*): made if it is not there.
        settings (`dict`): everything that decides what is measured; a folder of another run is refused.

    Raises:
        ValueError: if the folder holds a run with other settings, or files of something else.
    """

    def __init__(self, folder: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.folder = folder
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` must be a folder, got {str(folder)!r}, which is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        # Through JSON and back, as it will be read.
        self._claim(folder, json.loads(json.dumps(settings or {})))
        if (folder / LINES).is_file():
            self.records = _whole_lines(folder / LINES)

    def _claim(self, folder: Path, settings: dict[str, Any]) -> None:
        path = folder / SETTINGS
        if path.is_file():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name))
            if names:
                raise ValueError(
                    f"`output` must be a new folder or one of a run with the same settings, got {str(folder)!r}, where "
                    f"{', '.join(names)} differ{'s' if len(names) == 1 else ''}. Take another folder."
                )
            return
        if any(not other.name.startswith(".") and other.suffix != PARTIAL for other in folder.iterdir()):
            raise ValueError(f"`output` must be empty or of an earlier run, got {str(folder)!r}, which holds other files.")
        write_text(path, json.dumps(settings, indent=1) + "\n")

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records that belong together: after an interruption all of them are there, or none counts.

        Args:
            records (`Iterable[dict]`): of values that JSON knows.
        """
        group = list(records)
        self.records += group
        if self.folder is not None:
            with (self.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(group) + "\n")

    def select(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the records that have these values, in their order."""
        return [record for record in self.records if all(record.get(name) == value for name, value in fields.items())]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a journal, and cut off what an interruption left half-written."""
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        write_text(path, whole + "\n" if whole else "")
    return [record for line in whole.splitlines() for record in json.loads(line)]


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, text)

"""Files that are whole or absent: written beside their place first, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path

# How the names of files end that are not whole yet, or that a killed process left behind.
PARTIAL = ".partial"


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

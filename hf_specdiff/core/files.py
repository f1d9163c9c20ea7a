"""Files that are whole or absent: written beside their place first, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that no reader ever sees half of it, whatever stops the writer.

    Args:
        path (`pathlib.Path`): the file; its folder must exist. A file that is there is replaced.
        write (`Callable`): called with the path to write to: in the same folder and with the same suffix, since some writers
            choose a format by it.

    Raises:
        Exception: what `write` raises; what it had written is removed, so that a full disk gets its room back.
    """
    beside = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

"""A full disk, said in one way: each library that writes has words of its own for it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors passes the system's words on; torch's writer only notices that less was written than it gave.
_WORDS = ("No space left on device", "Disk quota exceeded", "enforce fail at inline_container.cc")


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Turn what writing to a full disk raises into an error that names the folder.

    Args:
        folder (`pathlib.Path`): what is written to inside `with`.

    Raises:
        OSError: with `errno.ENOSPC`, if a file could not be written for want of room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error):
            raise
        what = "the disk is full. Files that are whole are kept: make room, and the same call goes on"
        raise OSError(errno.ENOSPC, what, str(folder)) from error


def is_full(error: Exception) -> bool:
    """Return whether an error means that there is no room left to write."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(words in str(error) for words in _WORDS)

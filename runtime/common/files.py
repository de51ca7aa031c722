"""Files that other processes see whole or not at all, and files that one process has for itself."""

from __future__ import annotations

from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or the process ends; False when another has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def write_by_rename(path: Path, data: bytes) -> None:
    """Write under a hidden name, then rename: whoever looks finds the file whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise

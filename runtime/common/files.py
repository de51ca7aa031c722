"""Files that are whole or absent, and files that one process has for itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from .errors import AgptError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, data: bytes) -> None:
    """Write beside ``path``, flush to the disk, rename.

    Raises:
        AgptError: the folder or the disk does not take the file; an older file stays as it was.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staging, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise AgptError(
            f"cannot write {path} ({error.strerror}): choose a folder you can write to"
        ) from error


def write_by_rename(path: Path, data: bytes) -> None:
    """``write_whole`` without waiting for the disk: after a power cut the file may be lost.

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

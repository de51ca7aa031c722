"""Atomic writing of files, and files that only one process at a time may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from .errors import AgptError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or the process ends; False when another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def write_whole(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Write a file atomically: under a hidden name beside ``path``, which is then renamed.

    Args:
        flush: write through to the disk, so that the file survives a power cut.

    Raises:
        AgptError: the file cannot be written; an older file stays unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise AgptError(
            f"cannot write {path} ({error.strerror}): free some space, or choose a folder you can write to"
        ) from error


def flush(path: Path) -> None:
    """Write a file or a folder's entries through to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

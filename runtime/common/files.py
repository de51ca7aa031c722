"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import AgptError


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

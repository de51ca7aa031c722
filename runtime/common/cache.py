"""The cache folder: files that can be computed again and are valid on this machine only, unlike those of a bundle."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

VARIABLE = "AGPT_CACHE"


def cache_folder(purpose: str) -> Path:
    """A folder only its user can write to: ``$AGPT_CACHE``, else ``$XDG_CACHE_HOME/anomalygpt-edge``, ``~/.cache/…``.

    Native code is loaded from it, so a folder that others can write to is refused.

    Raises:
        ConfigError: it cannot be created, belongs to another user, or others can write to it.
    """
    root = os.environ.get(VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "anomalygpt-edge")
    folder = Path(root).expanduser() / purpose
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"cannot use the cache folder {folder} ({error.strerror}): set {VARIABLE}"
        ) from error
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise ConfigError(
            f"the cache folder {folder} can be written by others: chmod 700 it, or set {VARIABLE}"
        )
    return folder

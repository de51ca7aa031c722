"""Which image files a path of the command line means."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..common.errors import ImageError
from .images import is_image


def image_paths(paths: Iterable[Path]) -> list[Path]:
    """Image files, folders among them replaced by the images they hold.

    Raises:
        ImageError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(filter(is_image, path.iterdir())) if path.is_dir() else [path]
        if not inside:
            raise ImageError(f"{path} holds no image: put pictures of good parts in")
        found += inside
    return found

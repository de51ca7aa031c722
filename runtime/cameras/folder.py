"""A folder of images, or one image, replayed in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..common.errors import CameraError, ImageError
from ..vision.images import SUFFIXES, is_image, read_image
from .base import Frame


class FolderCamera:
    """Every image below a folder. One that does not decode becomes a frame without pixels, not a stop."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._root = path if path.is_dir() else path.parent
        self._paths = sorted(filter(is_image, path.rglob("*"))) if path.is_dir() else [path]
        if not self._paths:
            raise CameraError(f"{path} holds no image ({', '.join(SUFFIXES)}): put some in")

    def frames(self) -> Iterator[Frame]:
        for path in self._paths:
            yield self._read(path)

    def _read(self, path: Path) -> Frame:
        part_id = path.relative_to(self._root).with_suffix("").as_posix()
        try:
            return Frame(part_id, str(path), read_image(path))
        except (ImageError, OSError) as error:
            return Frame(part_id, str(path), None, problem=str(error))

    def close(self) -> None:
        pass

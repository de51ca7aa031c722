"""The images of a folder in natural order of their names, or a single image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..common.errors import CameraError, ImageError
from ..vision.image_files import find_images
from ..vision.images import SUFFIXES, read_image
from .base import Camera, Frame, moment


class FolderCamera(Camera):
    """Every image that ``find_images`` selects. One that does not decode becomes a frame without pixels."""

    def __init__(self, path: Path, out: Path | None = None) -> None:
        """
        Args:
            path: the folder, or one image.
            out: the run's own output folder, whose images are left out.

        Raises:
            CameraError: the folder contains no image.
        """
        self.name = str(path)
        root = path.parent
        paths: tuple[Path, ...] = (path,)
        if path.is_dir():
            found = find_images(path, out)
            root, paths, self.remark = path, found.paths, found.remark()
            if not paths:
                kinds = ", ".join(SUFFIXES)
                remark = f" ({self.remark})" if self.remark else ""
                raise CameraError(f"{path} contains no image{remark}: add some ({kinds})")
        self._parts = name_parts(paths, root)
        self.num_frames = len(paths)

    def frames(self) -> Iterator[Frame]:
        for part_id, path in self._parts.items():
            yield self._read(part_id, path)

    def _read(self, part_id: str, path: Path) -> Frame:
        begun = moment()
        try:
            return Frame(part_id, str(path), read_image(path), **begun)
        except (ImageError, OSError) as error:
            return Frame(part_id, str(path), None, problem=str(error), **begun)

    def close(self) -> None:
        pass


def name_parts(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """Part id -> path. The id is the path below ``root`` without its suffix, or with it where ids would be equal."""
    names = {path.relative_to(root).as_posix(): path for path in paths}
    stems = {name: Path(name).with_suffix("").as_posix() for name in names}
    taken = Counter([*names, *stems.values()])
    return {stems[name] if taken[stems[name]] == 1 else name: path for name, path in names.items()}

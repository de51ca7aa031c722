"""Sources of frames, one module each, imported when first used.

``demo`` is the built-in line, a number is a camera, the images of a folder or a single image are
read, any other file is a video.
"""

from __future__ import annotations

from pathlib import Path

from ..common.errors import CameraError
from ..vision.images import is_image, read_image
from .base import Camera, Frame

__all__ = ["Camera", "Frame", "open_camera"]

SOURCES = "demo, a folder of images, an image, a video file or a camera's number"


def open_camera(
    source: str, *, num_parts: int | None = None, seed: int = 0, out: Path | None = None
) -> Camera:
    """Open the source that a command line names.

    Args:
        source: "demo", a camera's index ("0"), a folder, an image or a video file.
        num_parts: number of parts on the demo line; other sources end by themselves.
        seed: seed of the parts on the demo line.
        out: the run's own output folder; its images are not inspected when it is inside the source folder.

    Raises:
        CameraError: the source does not exist or cannot be opened.
        ImageError: the source is one image, and it does not decode.
    """
    if not source.strip():
        raise CameraError(f"the source is empty: give {SOURCES}")
    path = Path(source)
    if source == "demo":
        from .demo import DemoLine

        return DemoLine(num_parts, seed)
    if source.isdecimal() and not path.exists():
        from .device import DeviceCamera

        return DeviceCamera(int(source))
    if not path.exists():
        raise CameraError(f"there is no source {source!r}: give {SOURCES}")
    from .folder import FolderCamera

    if path.is_dir():
        return FolderCamera(path, out)
    if is_image(path):
        read_image(path)  # a single image that does not decode is a user error, not a NO_RESULT part
        return FolderCamera(path)
    from .video import VideoCamera

    return VideoCamera(path)

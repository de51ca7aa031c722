"""A camera on this machine, by number (V4L2 on Linux), through OpenCV."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from ..common.errors import CameraError
from .base import Camera, Frame, moment
from .capture import open_capture


def present_cameras() -> list[int]:
    """Numbers of the video devices that Linux lists; some of them may not be cameras."""
    names = (path.name.removeprefix("video") for path in Path("/dev").glob("video*"))
    return sorted(int(name) for name in names if name.isdecimal())


class DeviceCamera(Camera):
    """Frames of a live camera, until it fails."""

    def __init__(self, index: int) -> None:
        self.name = f"camera {index}"
        if sys.platform == "linux" and index not in present_cameras():
            raise CameraError(f"{self.name} was not found: {self._present()}; check its cable and its number")
        capture = open_capture(index)
        if capture is None:
            raise CameraError(
                f"{self.name} cannot be opened: close other programs that use it, or join the group 'video'"
            )
        self._capture = capture

    @staticmethod
    def _present() -> str:
        numbers = present_cameras()
        return f"this machine has {', '.join(map(str, numbers))}" if numbers else "this machine has no camera"

    def frames(self) -> Iterator[Frame]:
        position = 0
        while True:
            delivered = self._capture.grab()
            grabbed = moment()
            if delivered:
                delivered, pixels = self._capture.retrieve()
            if not delivered:
                raise CameraError(
                    f"{self.name} stopped after {position} frames: check its cable and its power"
                )
            yield Frame(f"{position:06d}", f"{self.name}#{position}", pixels, **grabbed)
            position += 1

    def close(self) -> None:
        self._capture.release()

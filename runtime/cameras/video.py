"""A video file: every frame is a part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2

from ..common.errors import CameraError
from .base import Camera, Frame, moment
from .capture import open_capture


class VideoCamera(Camera):
    """Frames of a video file, as fast as they are requested."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._stem = path.stem
        capture = open_capture(str(path))
        if capture is None:
            raise CameraError(
                f"{path} is neither an image nor a video OpenCV can read: convert it to MP4 (H.264)"
            )
        self._capture = capture
        self._num_declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less where it is unknown

    def frames(self) -> Iterator[Frame]:
        position = 0
        while True:
            delivered = self._capture.grab()
            grabbed = moment()
            if delivered:
                delivered, pixels = self._capture.retrieve()
            if not delivered:
                break
            yield Frame(f"{self._stem}-{position:06d}", f"{self.name}#{position}", pixels, **grabbed)
            position += 1
        # Containers often declare one frame more than they contain.
        if position < self._num_declared - 1:
            raise CameraError(
                f"{self.name} ends after {position} of {self._num_declared} frames: the file is damaged; copy it again"
            )

    def close(self) -> None:
        self._capture.release()

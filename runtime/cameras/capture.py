"""OpenCV's VideoCapture, opened without the noise its back ends print."""

from __future__ import annotations

import os

# Read by OpenCV when FFmpeg first opens something; the errors are reported by us, in a sentence.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2


def open_capture(source: int | str) -> cv2.VideoCapture | None:
    """A capture that delivers, or None."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(source)
    except cv2.error:
        return None
    if capture.isOpened():
        return capture
    capture.release()
    return None

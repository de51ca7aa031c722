"""OpenCV's VideoCapture, with the log output of its back ends turned off."""

from __future__ import annotations

import os

# OpenCV reads this when FFmpeg first opens a file. Our own error messages replace FFmpeg's.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2


def open_capture(source: int | str) -> cv2.VideoCapture | None:
    """An open capture, or None where the source cannot be opened."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(source)
    except cv2.error:
        return None
    if capture.isOpened():
        return capture
    capture.release()
    return None

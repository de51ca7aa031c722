"""Reads image files as frames: a few formats, with size limits that are checked before a decoder runs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from ..common.errors import ImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 100_000_000  # 10,000 × 10,000: 300 MB decoded


def is_image(path: Path) -> bool:
    """Whether a path is a file with the suffix of a format that ``read_image`` reads."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_image(path: Path | str) -> np.ndarray:
    """Decode a PNG, JPEG, BMP, TIFF or WebP file: uint8 [H, W, 3], BGR.

    As in the original AnomalyGPT code, grayscale and palette images are expanded to three channels, alpha is dropped
    without blending, and the EXIF orientation is ignored.

    Raises:
        ImageError: the file is missing, too large, of another format, over 8 bits a channel, or does not decode.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path} is over {MAX_FILE_BYTES >> 20} MiB: give a smaller image")
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path} ({error.strerror}): give an image file") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """``read_image`` for the bytes of a file, which error messages call ``name``."""
    width, height = _size_in_header(data, name)
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels: give one with 1 to {MAX_PIXELS:,}")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise ImageError(f"{name} does not decode because it is damaged: save it again")
    if image.dtype != np.uint8:
        raise ImageError(f"{name} has {image.dtype} pixels: convert it to 8 bits a channel")
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(image[:, :, :3])


def check_frame(frame: np.ndarray) -> np.ndarray:
    """Check that a frame is uint8 [H, W, 3], BGR and not empty; returns it unchanged.

    Raises:
        ImageError: it is not; the message names the conversion that it needs.
    """
    if not isinstance(frame, np.ndarray):
        raise ImageError(
            f"the frame is a {type(frame).__name__}: convert it to a NumPy array uint8 [H, W, 3]"
        )
    if frame.size == 0:
        raise ImageError(f"the frame is empty {list(frame.shape)}: check the camera")
    if frame.dtype != np.uint8:
        raise ImageError(f"the frame has {frame.dtype} pixels: convert it to 8 bits a channel")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise ImageError(f"the frame is {list(frame.shape)}: convert it to three channels BGR [H, W, 3]")
    if frame.shape[0] * frame.shape[1] > MAX_PIXELS:
        raise ImageError(f"the frame has over {MAX_PIXELS:,} pixels: give a smaller one")
    return frame


def _size_in_header(data: bytes, name: str) -> tuple[int, int]:
    """Width and height given in the file's header, read without a decoder."""
    for magic, at, read_size in _FORMATS:
        if data[at : at + len(magic)] == magic:
            try:
                return read_size(data)
            except (struct.error, IndexError, ValueError) as error:
                raise ImageError(
                    f"{name} does not decode because its header is damaged: save it again"
                ) from error
    raise ImageError(f"{name} is not a PNG, JPEG, BMP, TIFF or WebP image: convert it to one of these")


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 16)


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # OS/2 header
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # a negative height means rows from the top


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the segments to the frame header (SOF0–SOF15 without DHT, JPG and DAC)."""
    position = 2
    while True:
        while data[position] == 0xFF:  # a marker may be padded with FF
            position += 1
        marker = data[position]
        position += 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 3)
            return width, height
        position += struct.unpack_from(">H", data, position)[0]
        if data[position] != 0xFF:
            raise ValueError("no marker after a segment")


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Tags 256 (width) and 257 (height) of the first directory."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    found = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):
            (found[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)
    if len(found) != 2:
        raise ValueError("no width or height")
    return found[256], found[257]


# Magic bytes, their offset, and the function that reads the size.
_FORMATS: list[tuple[bytes, int, Callable[[bytes], tuple[int, int]]]] = [
    (b"\x89PNG\r\n\x1a\n", 0, _png_size),
    (b"\xff\xd8\xff", 0, _jpeg_size),
    (b"BM", 0, _bmp_size),
    (b"II*\0", 0, _tiff_size),
    (b"MM\0*", 0, _tiff_size),
    (b"WEBPVP8", 8, _webp_size),
]

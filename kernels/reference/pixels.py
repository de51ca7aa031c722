"""Pixels in NumPy: colour conversion as OpenCV's integer arithmetic, resizing as Pillow's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..sampling import PRECISION_BITS, Sampling, Taps

BLOCK = 32  # output pixels of one matrix product: enough to be efficient, few enough to stay banded
ROWS = 64  # frame rows of one matrix product

# OpenCV's BT.601 studio-range coefficients in 1 / 2**20: Y, V to R, V and U to G, U to B.
YUV_Y, YUV_VR, YUV_VG, YUV_UG, YUV_UB = 1220542, 1673527, -852492, -409993, 2116026


def preprocess(
    frame: np.ndarray,
    format: str,
    samplings: Sequence[Sampling],
    table: np.ndarray,
    out: np.ndarray,
    threads: int,
) -> None:
    for square, sampled in zip(out, samplings, strict=True):
        levels = resize(cut(frame, format, sampled), sampled)
        for channel in range(3):
            square[channel] = table[channel].astype(out.dtype)[levels[2 - channel]]


def cut(frame: np.ndarray, format: str, sampled: Sampling) -> np.ndarray:
    """The box of a frame, uint8 [h, w, 3] BGR."""
    box = sampled.box
    height, width = int(box.height), int(box.width)
    if sampled.rotation is None:
        x, y = int(box.x), int(box.y)
        if format in ("BGR8", "RGB8"):
            pixels = frame[y : y + height, x : x + width]
            return pixels if format == "BGR8" else pixels[..., ::-1]
        return to_bgr(frame, format, np.arange(y, y + height)[:, None], np.arange(x, x + width)[None])
    rows, columns = frame.shape[0] * 2 // 3 if format == "NV12" else frame.shape[0], frame.shape[1]
    u, v = np.arange(width, dtype=np.int64)[None], np.arange(height, dtype=np.int64)[:, None]
    r = sampled.rotation
    x, y = ((r[i] * u + r[i + 1] * v + r[i + 2] + (1 << 23)) >> 24 for i in (0, 3))
    total = np.zeros((height, width, 3), np.int64)
    for dy, weight_y in ((0, 256 - (y & 255)), (1, y & 255)):
        for dx, weight_x in ((0, 256 - (x & 255)), (1, x & 255)):
            row, column = np.clip((y >> 8) + dy, 0, rows - 1), np.clip((x >> 8) + dx, 0, columns - 1)
            total += (weight_y * weight_x)[..., None] * to_bgr(frame, format, row, column)
    return ((total + (1 << 15)) >> 16).astype(np.uint8)


def to_bgr(frame: np.ndarray, format: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixels of a frame at rows and columns that broadcast to [h, w]: uint8 [h, w, 3] BGR."""
    if format == "BGR8":
        return frame[rows, columns]
    if format == "RGB8":
        return frame[rows, columns, ::-1]
    if format == "Mono8":
        return np.repeat(frame[rows, columns][..., None], 3, axis=-1)
    if format == "BayerRG8":
        return _demosaic(frame, rows, columns)
    if format == "NV12":
        chroma = len(frame) * 2 // 3 + rows // 2
        return _yuv_to_bgr(frame[rows, columns], frame[chroma, columns & -2], frame[chroma, columns | 1])
    return _yuv_to_bgr(frame[rows, columns, 0], frame[rows, columns & -2, 1], frame[rows, columns | 1, 1])


def _yuv_to_bgr(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    luma = np.maximum(y.astype(np.int32) - 16, 0) * YUV_Y + (1 << 19)
    u, v = u.astype(np.int32) - 128, v.astype(np.int32) - 128
    sums = (luma + YUV_UB * u, luma + YUV_VG * v + YUV_UG * u, luma + YUV_VR * v)
    return np.clip(np.stack(sums, axis=-1) >> 20, 0, 255).astype(np.uint8)


def _demosaic(frame: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear, rounding halves up. Even rows hold R G R G …, odd rows G B G B …"""
    rows, columns = np.clip(rows, 1, frame.shape[0] - 2), np.clip(columns, 1, frame.shape[1] - 2)

    def at(dy: int, dx: int) -> np.ndarray:
        return frame[rows + dy, columns + dx].astype(np.int32)

    own = at(0, 0)
    across, down = (at(0, -1) + at(0, 1) + 1) >> 1, (at(-1, 0) + at(1, 0) + 1) >> 1
    cross = (at(0, -1) + at(0, 1) + at(-1, 0) + at(1, 0) + 2) >> 2
    corners = (at(-1, -1) + at(-1, 1) + at(1, -1) + at(1, 1) + 2) >> 2
    red_row, even = rows % 2 == 0, columns % 2 == 0
    green = np.where(red_row == even, cross, own)
    red = np.where(red_row, np.where(even, own, across), np.where(even, down, corners))
    blue = np.where(red_row, np.where(even, corners, down), np.where(even, across, own))
    return np.stack([blue, green, red], axis=-1).astype(np.uint8)


def resize(pixels: np.ndarray, sampled: Sampling) -> np.ndarray:
    """Both passes: uint8 [h, w, 3] → uint8 [3, S, S], channels in the same order."""
    across, down = _blocks(sampled.across), _blocks(sampled.down)
    narrow = _shrink_columns(pixels, across, down[0].start, down[-1].stop)
    size = len(sampled.down.starts)
    small = np.empty((3, size, size))
    for block in down:
        taps = narrow[:, block.start - down[0].start : block.stop - down[0].start]
        np.matmul(block.weights, taps, out=small[:, block.first : block.first + len(block.weights)])
    _round_to_grey_levels(small)
    return small.astype(np.uint8)


class _Block(NamedTuple):
    """Output pixels from ``first`` on, as a product of ``weights`` with input pixels [start, stop)."""

    first: int
    start: int
    stop: int
    weights: np.ndarray  # float64 [outputs, stop - start], integers of 1 / 2**22


@lru_cache(maxsize=64)
def _blocks(taps: Taps) -> tuple[_Block, ...]:
    """The filter cut into bands, so that matrix products multiply few zeros."""
    blocks = []
    for first in range(0, len(taps.starts), BLOCK):
        starts, counts = taps.starts[first : first + BLOCK], taps.counts[first : first + BLOCK]
        start, stop = int(starts[0]), int((starts + counts).max())
        weights = np.zeros((len(starts), stop - start))
        for row, (left, count) in enumerate(zip(starts - start, counts, strict=True)):
            weights[row, left : left + count] = taps.weights[first + row, :count]
        blocks.append(_Block(first, start, stop, weights))
    return tuple(blocks)


def _shrink_columns(pixels: np.ndarray, blocks: tuple[_Block, ...], top: int, bottom: int) -> np.ndarray:
    """The horizontal pass over rows [top, bottom): float64 [3, rows, S] of whole grey levels."""
    left, right = blocks[0].start, blocks[-1].stop
    size = blocks[-1].first + len(blocks[-1].weights)
    narrow = np.empty((3, bottom - top, size))
    for row in range(top, bottom, ROWS):  # a few rows at a time stay in the cache
        strip = pixels[row : min(row + ROWS, bottom), left:right]
        planes = strip.transpose(2, 0, 1).astype(np.float64, order="C")  # sums below 2**53 are exact
        out = narrow[:, row - top : row - top + len(strip)]
        for block in blocks:
            taps = planes[:, :, block.start - left : block.stop - left]
            np.matmul(taps, block.weights.T, out=out[:, :, block.first : block.first + len(block.weights)])
        _round_to_grey_levels(out)
    return narrow


def _round_to_grey_levels(sums: np.ndarray) -> None:
    """In place: sums of 1 / 2**22 grey levels to whole levels 0..255, halves up."""
    sums *= 1 / (1 << PRECISION_BITS)
    sums += 0.5
    np.floor(sums, out=sums)
    np.clip(sums, 0, 255, out=sums)

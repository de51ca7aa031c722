"""Pillow's antialiased bicubic filter as tables, made once for each box and size, for every implementation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .geometry import Box, Resize, box_to_frame, resize_window

BICUBIC_SUPPORT = 2.0  # in output pixels when shrinking, in input pixels when enlarging
PRECISION_BITS = 22  # Pillow's 8-bit resampling: coefficients are integers of 1 / 2**22
MAX_WEIGHTS = 1 << 24  # of one table: 64 MiB
COORDINATE_BITS = 32  # rotated boxes: coordinates are integers of 1 / 2**32 pixel


@dataclass(frozen=True, eq=False)
class Taps:
    """One pass of the filter: output pixel i is the sum of ``weights[i, k]`` × input pixel ``starts[i] + k``.

    Attributes:
        starts: int32 [S], non-decreasing; starts[i] + counts[i] is at most the input's size.
        counts: int32 [S], at least 1.
        weights: int32 [S, K], integers of 1 / 2**22, 0 from ``counts[i]`` on. A sum becomes a grey level by
            adding 2**21, shifting right by 22 and clamping to 0..255; it fits in int32.
    """

    starts: np.ndarray
    counts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Sampling:
    """How one box becomes a square of ``size`` pixels: cut, horizontal pass, 8-bit image, vertical pass.

    Attributes:
        box: upright, in whole pixels, unless ``rotation`` is given.
        rotation: int64 [6] or None. Pixel (column u, row v) of the cut lies at frame coordinates
            x = (r0·u + r1·v + r2) / 2**32, y = (r3·u + r4·v + r5) / 2**32 (pixel centres at whole numbers),
            rounded to 1/256 pixel by adding 2**23 and shifting right by 24. Its value is interpolated there
            bilinearly with integer weights of 1/256 and the frame's edge repeated, ``(sum + 2**15) >> 16``.
        across, down: the two passes, over the cut's columns and rows.
    """

    box: Box
    rotation: np.ndarray | None
    across: Taps
    down: Taps


@lru_cache(maxsize=1024)
def sampling(box: Box, size: int, resize: Resize) -> Sampling:
    """The tables of one box.

    Raises:
        ValueError: the box is so long that a table would have more than ``MAX_WEIGHTS`` weights.
    """
    height, width = int(box.height), int(box.width)
    window = resize_window(height, width, size, resize)
    rotation = None
    if box.angle % 360:
        xx, xy, x0, yx, yy, y0 = box_to_frame(box)
        # From the centre of the cut's first pixel to frame coordinates whose pixel centres are whole numbers.
        values = (xx, xy, x0 + (xx + xy) / 2 - 0.5, yx, yy, y0 + (yx + yy) / 2 - 0.5)
        rotation = np.array([round(value * (1 << COORDINATE_BITS)) for value in values], np.int64)
    across = _taps(width, window.width, window.left, size)
    return Sampling(box, rotation, across, _taps(height, window.height, window.top, size))


@lru_cache(maxsize=256)
def _taps(input_size: int, resized: int, offset: int, size: int) -> Taps:
    """The filter for output pixels [offset, offset + size) of ``input_size`` → ``resized`` pixels."""
    scale = input_size / resized
    stretch = max(scale, 1.0)
    support = BICUBIC_SUPPORT * stretch
    if size * (2 * support + 1) > MAX_WEIGHTS:
        raise ValueError(
            f"{input_size} pixels are too many to become {resized} in one step: cut them into tiles"
        )
    centers = (np.arange(offset, offset + size) + 0.5) * scale
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + support + 0.5).astype(np.int64), input_size) - starts
    steps = np.arange(counts.max())
    weights = _bicubic((steps + starts[:, None] - centers[:, None] + 0.5) / stretch)
    weights[steps >= counts[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    whole = _round_half_away(weights * (1 << PRECISION_BITS)).astype(np.int32)
    return Taps(starts.astype(np.int32), counts.astype(np.int32), np.ascontiguousarray(whole))


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _round_half_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + np.copysign(0.5, x))


@lru_cache(maxsize=8)
def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each grey level of each RGB channel becomes, ``(level / 255 − mean) / std``."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean_column, std_column = (np.asarray(values, np.float32)[:, None] for values in (mean, std))
    with np.errstate(divide="ignore", invalid="ignore"):  # the caller refuses what is not finite
        return (levels - mean_column) / std_column

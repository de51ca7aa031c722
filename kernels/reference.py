"""The operations around the networks in NumPy: short, obviously right, and fast enough for a small line."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

BICUBIC_SUPPORT = 2.0  # in output pixels when shrinking, in input pixels when enlarging
PRECISION_BITS = 22  # Pillow's 8-bit resampling: coefficients are integers of 1 / 2**22
BLOCK = 32  # output pixels of one matrix product: enough to be efficient, few enough to stay banded
ROWS = 64  # frame rows of one matrix product


class Window(NamedTuple):
    """Where the network's square lies in the resized frame."""

    height: int  # of the resized frame
    width: int
    top: int  # of the square inside it
    left: int


def resize_window(height: int, width: int, size: int, resize: Literal["crop", "stretch"]) -> Window:
    """The original's geometry for a frame of ``height`` × ``width`` pixels.

    "crop": the shorter side becomes ``size``, the other is truncated to an integer, the centre square is cut
    (halves round to even). "stretch": both sides become ``size``.
    """
    if resize == "stretch":
        return Window(size, size, 0, 0)
    short, long = sorted((height, width))
    # Integer arithmetic would differ from the original, which truncates a float quotient.
    long = int(size * long / short)
    resized_height, resized_width = (size, long) if height <= width else (long, size)
    return Window(
        resized_height, resized_width, round((resized_height - size) / 2), round((resized_width - size) / 2)
    )


def preprocess(
    frame: np.ndarray,
    size: int,
    resize: Literal["crop", "stretch"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> np.ndarray:
    """Camera pixels to the encoder's input, equal to Pillow 10's bicubic resize bit for bit.

    Pillow resizes in two passes with an 8-bit image between, columns first; only the pixels that survive the
    crop are computed.

    Args:
        frame: uint8 [H, W, 3], BGR.
        size: side of the output in pixels.
        resize: see ``resize_window``.
        mean: three channel means in RGB order, for pixels in 0..1.
        std: three channel standard deviations in RGB order.

    Returns:
        float32 [3, size, size], RGB, ``(x / 255 - mean) / std``.

    Raises:
        ValueError: ``frame`` is not uint8 [H, W, 3] with at least one pixel.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(f"preprocess takes uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
    height, width = frame.shape[:2]
    window = resize_window(height, width, size, resize)
    across = _resize_blocks(width, window.width, window.left, size)
    down = _resize_blocks(height, window.height, window.top, size)
    narrow = _shrink_columns(frame, across, down[0].start, down[-1].stop)
    small = np.empty((3, size, size))
    for block in down:
        taps = narrow[:, block.start - down[0].start : block.stop - down[0].start]
        np.matmul(block.weights, taps, out=small[:, block.first : block.first + len(block.weights)])
    _round_to_grey_levels(small)
    table = _normalisation_table(tuple(mean), tuple(std))
    return np.stack([table[c][small[2 - c].astype(np.uint8)] for c in range(3)])


def normalise(features: np.ndarray) -> np.ndarray:
    """Unit length along the last axis: float32 [..., V] → float32 [..., V]; a zero vector stays zero."""
    length = np.sqrt(np.einsum("...v,...v->...", features, features))[..., None]
    return features / np.maximum(length, np.float32(1e-8))


def match(patch_features: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The original's few-shot distance: 1 − max cosine similarity with any normal patch, mean over the taps.

    Args:
        patch_features: float32 [B, T, P, V], raw taps of the queries.
        bank: float32 [T, N, V], unit length (``normalise``).

    Returns:
        float32 [B, P], 0 = identical to some normal patch.
    """
    if patch_features.shape[1::2] != bank.shape[::2] or bank.shape[1] == 0:
        raise ValueError(
            f"match takes features [B, T, P, V] and a bank [T, N, V] of the same T and V with N >= 1, "
            f"not {list(patch_features.shape)} and {list(bank.shape)}"
        )
    queries = normalise(patch_features)
    similarity = sum((queries[:, tap] @ bank[tap].T).max(axis=-1) for tap in range(len(bank)))
    return 1 - similarity / np.float32(len(bank))


def upsample(patch_map: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with aligned corners, as in the original: float32 [B, G * G] → float32 [B, size, size]."""
    grid = round(patch_map.shape[-1] ** 0.5)
    weights = _bilinear_weights(grid, size)
    return weights @ patch_map.reshape(-1, grid, grid) @ weights.T


class _Block(NamedTuple):
    """Output pixels from ``first`` on, as a product of ``weights`` with input pixels [start, stop)."""

    first: int
    start: int
    stop: int
    weights: np.ndarray  # float64 [outputs, stop - start], integers of 1 / 2**22


def _shrink_columns(frame: np.ndarray, blocks: tuple[_Block, ...], top: int, bottom: int) -> np.ndarray:
    """The horizontal pass over frame rows [top, bottom): float64 [3, rows, size] of whole grey levels."""
    left, right = blocks[0].start, blocks[-1].stop
    size = blocks[-1].first + len(blocks[-1].weights)
    narrow = np.empty((3, bottom - top, size))
    for row in range(top, bottom, ROWS):  # a few rows at a time stay in the cache
        strip = frame[row : min(row + ROWS, bottom), left:right]
        planes = strip.transpose(2, 0, 1).astype(np.float64, order="C")  # sums below 2**53 are exact
        out = narrow[:, row - top : row - top + len(strip)]
        for block in blocks:
            taps = planes[:, :, block.start - left : block.stop - left]
            np.matmul(taps, block.weights.T, out=out[:, :, block.first : block.first + len(block.weights)])
        _round_to_grey_levels(out)
    return narrow


@lru_cache(maxsize=64)
def _resize_blocks(input_size: int, resized: int, offset: int, size: int) -> tuple[_Block, ...]:
    """Pillow's antialiased bicubic filter for output pixels [offset, offset + size), cut into bands."""
    scale = input_size / resized
    stretch = max(scale, 1.0)
    support = BICUBIC_SUPPORT * stretch
    centers = (np.arange(offset, offset + size) + 0.5) * scale
    starts = np.maximum((centers - support + 0.5).astype(int), 0)
    stops = np.minimum((centers + support + 0.5).astype(int), input_size)
    blocks = []
    for first in range(0, size, BLOCK):
        rows = slice(first, min(first + BLOCK, size))
        start, stop = starts[rows.start], stops[rows.stop - 1]
        taps = np.arange(start, stop)
        weights = _bicubic((taps - centers[rows, None] + 0.5) / stretch)
        weights[(taps < starts[rows, None]) | (taps >= stops[rows, None])] = 0
        weights /= weights.sum(axis=1, keepdims=True)
        blocks.append(_Block(first, int(start), int(stop), _round_half_away(weights * (1 << PRECISION_BITS))))
    return tuple(blocks)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _round_half_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + np.copysign(0.5, x))


def _round_to_grey_levels(sums: np.ndarray) -> None:
    """In place: sums of 1 / 2**22 grey levels to whole levels 0..255, halves up."""
    sums *= 1 / (1 << PRECISION_BITS)
    sums += 0.5
    np.floor(sums, out=sums)
    np.clip(sums, 0, 255, out=sums)


@lru_cache(maxsize=8)
def _normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: what each grey level of each RGB channel becomes."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    mean_column, std_column = (np.asarray(values, np.float32)[:, None] for values in (mean, std))
    return (levels - mean_column) / std_column


@lru_cache(maxsize=8)
def _bilinear_weights(grid: int, size: int) -> np.ndarray:
    """float32 [size, grid]: interpolation between ``grid`` samples with the corners aligned."""
    positions = np.linspace(0, grid - 1, size)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(grid))).astype(np.float32)

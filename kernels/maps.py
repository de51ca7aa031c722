"""From patches to anomaly maps, from maps to frames, from maps to figures and regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .choice import implementation
from .geometry import Box, Resize, check_box, placements
from .types import MAX_CELLS, aligned, check_host

TOP_FRACTION = 0.01
MAX_MAP_SIDE = 1 << 14


class Summary(NamedTuple):
    """Figures of one map; all NaN when a value of it is not finite."""

    peak: float
    lowest: float
    median: float
    top_mean: float  # mean of the highest 1 %: steadier than the peak


class Component(NamedTuple):
    """Pixels of a map at or above a level that touch each other, at corners too."""

    x: int
    y: int
    width: int
    height: int
    area: int  # pixels
    peak: float


def localise(logits: np.ndarray, size: int, *, threads: int = 1) -> np.ndarray:
    """The original's zero-shot map: upsample (bilinear, corners aligned), softmax of two classes, mean of the taps.

    The softmax of two classes depends only on their difference, so the difference is upsampled.

    Args:
        logits: float32 [B, T, G * G, 2], of each patch for the normal and for the abnormal text.
        size: side S of the map in pixels.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [B, S, S], 1 = abnormal; all NaN for an image with a logit that is not finite.

    Raises:
        ValueError: another shape or type.
    """
    check_host("localise", logits)
    if logits.ndim != 4 or logits.shape[-1] != 2 or logits.dtype != np.float32 or 0 in logits.shape:
        raise ValueError(f"localise takes float32 logits [B, T, G * G, 2], not {_found(logits)}")
    _check_sides(logits.shape[2], size)
    out = np.empty((len(logits), size, size), np.float32)
    implementation().localise(aligned(logits), out, threads)
    return out


def upsample(patch_map: np.ndarray, size: int, *, threads: int = 1) -> np.ndarray:
    """Upsample patch maps bilinearly with aligned corners, as the original does for its few-shot map.

    Args:
        patch_map: float32 [B, G * G].
        size: side S of the map in pixels.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [B, S, S]; all NaN for an image with a value that is not finite.

    Raises:
        ValueError: another shape or type.
    """
    check_host("upsample", patch_map)
    if patch_map.ndim != 2 or patch_map.dtype != np.float32 or 0 in patch_map.shape:
        raise ValueError(f"upsample takes float32 [B, G * G], not {_found(patch_map)}")
    _check_sides(patch_map.shape[1], size)
    out = np.empty((len(patch_map), size, size), np.float32)
    implementation().upsample(aligned(patch_map), out, threads)
    return out


def project(
    maps: np.ndarray,
    boxes: Sequence[Box] | None,
    resize: Resize,
    frame_size: tuple[int, int],
    *,
    size: tuple[int, int] | None = None,
    outside: float = 0.0,
    threads: int = 1,
) -> np.ndarray:
    """Put maps of boxes back onto their frame by bilinear interpolation; overlapping maps are blended.

    Where maps overlap, the weight of each is the product of the distances from the pixel to the map's nearer side edge
    and to its nearer upper or lower edge, so that a tile fades out where its neighbour begins.

    Args:
        maps: float32 [M, S, S].
        boxes: where each map's pixels came from, as given to ``preprocess``; the whole frame when None (M = 1).
        resize: as given to ``preprocess``.
        frame_size: (height, width) of the frame in pixels.
        size: (height, width) of the result, which shows the whole frame; ``frame_size`` when None.
        outside: value of pixels that no map covers.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [H, W] of the size that is asked for.

    Raises:
        ValueError: another shape or type, or a box that does not lie in the frame.
    """
    check_host("project", maps)
    height, width = frame_size
    size = size or frame_size
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or maps.dtype != np.float32 or 0 in maps.shape:
        raise ValueError(f"project takes float32 maps [M, S, S], not {_found(maps)}")
    if min(height, width, *size) < 1:
        raise ValueError(
            f"project needs a frame and a result of at least one pixel, "
            f"not {width} x {height} and {size[1]} x {size[0]}"
        )
    whole = (Box(0, 0, width, height),)
    checked = whole if boxes is None else tuple(check_box(Box(*box), height, width) for box in boxes)
    if len(checked) != len(maps):
        raise ValueError(f"project takes one box a map, not {len(checked)} boxes and {len(maps)} maps")
    out = np.full(size, outside, np.float32)
    places = placements(checked, maps.shape[1], resize)
    places[:, [0, 3]] *= width / size[1]
    places[:, [1, 4]] *= height / size[0]
    implementation().project(aligned(maps), places, out, threads)
    return out


def summarise(anomaly_map: np.ndarray) -> Summary:
    """Peak, lowest value, median and mean of the highest 1 % (at least one pixel) of a float32 map [H, W].

    Raises:
        ValueError: another shape or type.
    """
    _check_map("summarise", anomaly_map)
    count = max(1, round(TOP_FRACTION * anomaly_map.size))
    figures = implementation().summarise(aligned(anomaly_map), count)
    return Summary(*map(float, figures))


def cell_peaks(anomaly_map: np.ndarray, cells: int) -> np.ndarray:
    """The highest value in each cell of a map cut into ``cells`` × ``cells``.

    Args:
        anomaly_map: float32 [H, W].
        cells: number per side. Pixel i of n lies at i / n; a pixel on the limit between two cells belongs to the
            first of them, as in the original's nine places.

    Returns:
        float32 [cells, cells]; -inf for a cell without a pixel, NaN for one with a NaN in it.

    Raises:
        ValueError: another shape or type, or a number of cells that is not 1 to 256.
    """
    _check_map("cell_peaks", anomaly_map)
    if not 1 <= cells <= MAX_CELLS:
        raise ValueError(f"a map is cut into 1 to {MAX_CELLS} cells a side, not {cells}")
    out = np.empty((cells, cells), np.float32)
    implementation().cell_peaks(aligned(anomaly_map), out)
    return out


def components(anomaly_map: np.ndarray, level: float) -> list[Component]:
    """Connected regions (8 neighbours) of ``map >= level``, in the order of their first pixel, row by row.

    Args:
        anomaly_map: float32 [H, W]; NaN is below every level.
        level: in the unit of the map's values.

    Raises:
        ValueError: another shape or type.
    """
    _check_map("components", anomaly_map)
    rows, peaks = implementation().components(aligned(anomaly_map), float(level))
    found = zip(rows.tolist(), peaks.tolist(), strict=True)
    return [Component(x, y, width, height, area, peak) for (x, y, width, height, area), peak in found]


def _check_map(what: str, anomaly_map: np.ndarray) -> None:
    check_host(what, anomaly_map)
    if anomaly_map.ndim != 2 or anomaly_map.dtype != np.float32 or 0 in anomaly_map.shape:
        raise ValueError(f"{what} takes a float32 map [H, W], not {_found(anomaly_map)}")


def _check_sides(patches: int, size: int) -> None:
    if round(patches**0.5) ** 2 != patches:
        raise ValueError(f"{patches} patches do not form a square grid [G * G]")
    if not 1 <= size <= MAX_MAP_SIDE:
        raise ValueError(f"a map has a side of 1 to {MAX_MAP_SIDE} pixels, not {size}")


def _found(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"

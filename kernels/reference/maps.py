"""Maps in NumPy."""

from __future__ import annotations

import itertools
from functools import lru_cache

import cv2
import numpy as np


def localise(logits: np.ndarray, out: np.ndarray, threads: int) -> None:
    batch, taps, patches, _ = logits.shape
    with np.errstate(invalid="ignore"):
        difference = (logits[..., 1] - logits[..., 0]).reshape(-1, patches)
    planes = np.empty((batch * taps, *out.shape[1:]), np.float32)
    upsample(difference, planes, threads)
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-planes))
    np.mean(probability.reshape(batch, taps, *out.shape[1:]), axis=1, out=out)


def upsample(patch_map: np.ndarray, out: np.ndarray, threads: int) -> None:
    grid, size = round(patch_map.shape[1] ** 0.5), out.shape[1]
    weights = _bilinear_weights(grid, size)
    finite = np.isfinite(patch_map).all(axis=1)
    planes = np.where(finite[:, None], patch_map, 0).reshape(-1, grid, grid)
    np.matmul(weights @ planes, weights.T, out=out)
    out[~finite] = np.nan


@lru_cache(maxsize=8)
def _bilinear_weights(grid: int, size: int) -> np.ndarray:
    """float32 [size, grid]: interpolation between ``grid`` samples with the corners aligned."""
    positions = np.linspace(0, grid - 1, size)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(grid))).astype(np.float32)


EDGE = 1e-6  # map pixels: a point on a map's edge belongs to it, whatever the rounding


def project(maps: np.ndarray, places: np.ndarray, out: np.ndarray, threads: int) -> None:
    x, y = np.arange(out.shape[1]) + 0.5, np.arange(out.shape[0])[:, None] + 0.5
    size = maps.shape[1]
    total, weight_sum = np.zeros(out.shape, np.float32), np.zeros(out.shape, np.float32)
    for anomaly_map, (ux, uy, u0, vx, vy, v0) in zip(maps, places, strict=True):
        u, v = ux * x + uy * y + u0, vx * x + vy * y + v0
        inside = (u >= -EDGE) & (u <= size + EDGE) & (v >= -EDGE) & (v <= size + EDGE)
        u, v = u[inside], v[inside]
        weight = _distance_to_edge(u, size) * _distance_to_edge(v, size)
        total[inside] += weight * _bilinear(anomaly_map, u, v)
        weight_sum[inside] += weight
    covered = weight_sum > 0
    out[covered] = total[covered] / weight_sum[covered]


def _distance_to_edge(u: np.ndarray, size: int) -> np.ndarray:
    return np.maximum(np.minimum(u, size - u), 1e-3).astype(np.float32)


def _bilinear(anomaly_map: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values at points counted from the corner; beyond the outermost pixel centres the edge repeats."""
    last = anomaly_map.shape[0] - 1
    u, v = np.clip(u - 0.5, 0, last), np.clip(v - 0.5, 0, last)
    left, top = np.minimum(u.astype(int), max(last - 1, 0)), np.minimum(v.astype(int), max(last - 1, 0))
    right, bottom = np.minimum(left + 1, last), np.minimum(top + 1, last)
    du, dv = (u - left).astype(np.float32), (v - top).astype(np.float32)
    above = anomaly_map[top, left] * (1 - du) + anomaly_map[top, right] * du
    below = anomaly_map[bottom, left] * (1 - du) + anomaly_map[bottom, right] * du
    return above * (1 - dv) + below * dv


def summarise(anomaly_map: np.ndarray, count: int) -> tuple[float, float, float, float]:
    values = anomaly_map.ravel()
    if not np.isfinite(values).all():
        return (np.nan,) * 4
    top = np.partition(values, values.size - count)[-count:]
    return values.max(), values.min(), np.median(values), top.mean(dtype=np.float64)


def cell_peaks(anomaly_map: np.ndarray, out: np.ndarray) -> None:
    height, width = anomaly_map.shape
    rows, columns = _cells(height, len(out)), _cells(width, len(out))
    for i, j in np.ndindex(out.shape):
        out[i, j] = anomaly_map[rows[i], columns[j]].max(initial=-np.inf)


def _cells(size: int, cells: int) -> list[slice]:
    limits = [0, *(cell * size // cells + 1 for cell in range(1, cells)), size]
    return [slice(start, end) for start, end in itertools.pairwise(limits)]


def components(anomaly_map: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """int32 [R, 5] (x, y, width, height, area) and float32 [R] peaks."""
    above = (anomaly_map >= np.float32(level)).astype(np.uint8)
    number, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    first = np.unique(labels, return_index=True)[1][np.unique(labels) > 0]
    order = np.argsort(first)
    peaks = np.full(number, -np.inf, np.float32)
    np.maximum.at(peaks, labels.ravel(), np.where(above.ravel(), anomaly_map.ravel(), -np.inf))
    return stats[1:][order].astype(np.int32), peaks[1:][order]

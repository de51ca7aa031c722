"""Random fields for drawing products and defects (NumPy and OpenCV only: the demo line needs them at run time)."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]


def smooth(rng: Generator, size: tuple[int, int], cell: float, stretch: float = 1.0) -> Field:
    """Band-limited noise float32 [H, W] of about unit variance.

    Args:
        rng: generator.
        size: (H, W).
        cell: vertical feature size in pixels.
        stretch: ratio of horizontal to vertical feature size.
    """
    height, width = size
    rows = max(2, round(height / cell) + 1)
    columns = max(2, round(width / (cell * stretch)) + 1)
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    # cubic interpolation between independent values reduces their standard deviation to about 1 / 1.35
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * np.float32(1.35)


def fractal(
    rng: Generator, size: tuple[int, int], cell: float, octaves: int = 4, stretch: float = 1.0
) -> Field:
    """Sum of ``octaves`` noises, each with half the cell and weight of the one before; about unit variance, [H, W]."""
    total = np.zeros(size, np.float32)
    weight, power = 1.0, 0.0
    for _ in range(octaves):
        total += weight * smooth(rng, size, max(cell, 1.0), stretch)
        power += weight**2
        weight, cell = weight / 2, cell / 2
    return total / np.float32(np.sqrt(power))


@functools.cache
def _grain() -> Field:
    """Fixed normal noise to cut windows from: drawing 50,000 new normal values per part takes longer than drawing the
    part."""
    return np.random.default_rng(0).standard_normal((1500, 1500), dtype=np.float32)


def white(rng: Generator, size: tuple[int, int]) -> Field:
    """White noise [H, W] of unit variance: a random window of fixed noise, or new noise if the window is too large."""
    table = _grain()
    if max(size) > len(table) // 2:
        return rng.standard_normal(size, dtype=np.float32)
    row, column = rng.integers(0, len(table) - size[0]), rng.integers(0, len(table) - size[1])
    return table[row : row + size[0], column : column + size[1]] * np.float32(rng.choice([-1, 1]))


def blob(
    rng: Generator, size: tuple[int, int], center: tuple[float, float], radius: float, rough: float
) -> Field:
    """Soft-edged random shape: alpha [H, W] in 0..1 with a radius of about ``radius`` pixels around ``center`` (x, y).

    The outline is an ellipse whose radius varies with a few random harmonics of strength ``rough``.
    """
    angle = rng.uniform(0, np.pi)
    aspect = np.exp(rng.uniform(-0.6, 0.6))
    waves = [
        (harmonic, rough / harmonic * rng.standard_normal(), rng.uniform(0, 6.28)) for harmonic in range(2, 6)
    ]
    softness = rng.uniform(0.7, 2.0) + radius * rng.choice([0.0, 0.0, 0.25])
    alpha = np.zeros(size, np.float32)
    reach = (
        int(np.ceil(radius * 1.83 * (1 + sum(abs(w[1]) for w in waves)) + softness)) + 1
    )  # exp(0.6) = 1.83
    top, left = max(int(center[1]) - reach, 0), max(int(center[0]) - reach, 0)
    window = alpha[top : max(int(center[1]) + reach + 1, 0), left : max(int(center[0]) + reach + 1, 0)]
    y, x = np.ogrid[: window.shape[0], : window.shape[1]]
    dx = (x + (left - center[0])).astype(np.float32)
    dy = (y + (top - center[1])).astype(np.float32)
    along = (dx * np.cos(angle) + dy * np.sin(angle)) * aspect
    across = (-dx * np.sin(angle) + dy * np.cos(angle)) / aspect
    theta = np.arctan2(across, along)
    outline = sum((h[1] * np.cos(h[0] * theta + h[2]) for h in waves), np.ones_like(theta))
    distance = np.hypot(along, across) - radius * np.maximum(outline, 0.2)
    window[:] = np.clip(0.5 - distance / softness, 0, 1)
    return alpha

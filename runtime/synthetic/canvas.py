"""Drawing tools for products: coordinates, colours, waves, skins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .noise import Field, fractal, smooth

Image = NDArray[np.floating[Any]]  # [H, W, 3] BGR, 0..1


@dataclass
class View:
    """Product coordinates of every pixel [H, W]: u to the right, v down; the unit is the frame's shorter side, 0 the
    centre."""

    u: Field
    v: Field
    size: tuple[int, int]

    @property
    def pixel(self) -> float:
        """Side of a pixel in units."""
        return 1.0 / min(self.size)

    def fill(self, distance: Field) -> Field:
        """Antialiased coverage of the region where a signed distance (in units) is negative."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)


def pigment(style: Generator, low: float = 0.1, high: float = 0.9, grey: float = 0.5) -> Field:
    """A BGR colour [3] in 0..1: grey with probability ``grey``, otherwise mostly muted, sometimes vivid."""
    value = style.uniform(low, high)
    chroma = style.choice([0.06, 0.12, 0.25], p=[0.4, 0.4, 0.2]) * (style.random() > grey)
    tint = style.uniform(-1, 1, 3) * chroma + style.uniform(-0.015, 0.015, 3)
    return np.clip(value + tint, 0.02, 0.98).astype(np.float32)


def mix(a: Field, b: Field, t: Field) -> Image:
    """Blend two colours by a field in 0..1."""
    return a + (b - a) * np.clip(t, 0, 1)[..., None].astype(np.float32)


def wave(x: Field) -> Field:
    """A cosine in 0..1 with period 1 and its maximum at whole numbers."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * x, dtype=np.float32)


def jitter(part: Generator, index: Field, strength: float) -> Field:
    """One random value for each integer index (a thread, a tile), constant within a part; repeats after 4096."""
    table = part.standard_normal(4096).astype(np.float32) * np.float32(strength)
    return table[index.astype(np.int64) & 4095]


def skin(style: Generator, part: Generator, view: View, color: Field) -> Image:
    """The surface of an object [H, W, 3]: plain, cloudy, grainy or brushed."""
    kind, strength = style.integers(0, 4), style.uniform(0.02, 0.10)
    cell = style.uniform(3, 20) * min(view.size) / 224
    tone = np.ones(view.size, np.float32)
    if kind == 1:
        tone = 1 + strength * fractal(part, view.size, cell * 2, 3)
    elif kind == 2:
        tone = 1 + strength * fractal(part, view.size, cell / 2, 2)
    elif kind == 3:
        tone = 1 + strength * smooth(part, view.size, 1.5, cell)
    return color * tone[..., None]


def polar(view: View) -> tuple[Field, Field]:
    """Radius in units and angle in radians of every pixel."""
    return np.hypot(view.u, view.v), np.arctan2(view.v, view.u)


def bolt_circle(style: Generator, view: View, ring: float, count: int, radius: float) -> Field:
    """Coverage [H, W] of ``count`` round holes on a circle; ``ring`` is the circle's radius, ``radius`` the holes'."""
    start = style.uniform(0, 2 * np.pi)
    covered = np.zeros(view.size, np.float32)
    for k in range(count):
        a = start + 2 * np.pi * k / count
        covered = np.maximum(
            covered, view.fill(np.hypot(view.u - ring * np.cos(a), view.v - ring * np.sin(a)) - radius)
        )
    return covered


def clip(image: Image) -> Image:
    """The image as float32, limited to 0..1."""
    image = np.asarray(image, np.float32)
    return np.clip(image, 0, 1)

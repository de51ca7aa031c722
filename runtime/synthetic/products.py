"""Procedural products as a line's camera might see them, with the variation between good parts.

A ``Family`` is one product: a kind and a seed that fixes its design (colours, pitch, proportions). ``render``
draws one good part of it: the design comes from the family's seed, everything that differs between good parts
(pose, grain, markings) from the caller's generator. ``camera.py`` adds the effects of the line, which good and
defective parts share (dirt, light, focus, noise).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from .canvas import Image, View, clip, pigment
from .noise import Field, fractal, smooth
from .objects import OBJECTS
from .surfaces import SURFACES, metal

GENERATOR_VERSION = 2
KINDS = (*SURFACES, *OBJECTS)
HELD_OUT_KINDS = ("mesh", "nut", "corrugated", "pins")  # never trained on; in the evaluation families only
TRAINED_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)


@dataclass(frozen=True)
class Family:
    kind: str
    seed: int

    def style(self) -> Generator:
        """The generator that fixes this product's design; the same sequence every time."""
        return default_rng([GENERATOR_VERSION, zlib.crc32(self.kind.encode()), self.seed])


@dataclass
class Scene:
    """One rendered part. ``coverage`` is 1 where the product is; ``background`` is the scene without it."""

    image: Image
    background: Image
    coverage: Field


def render(family: Family, part: Generator, size: tuple[int, int] = (224, 224)) -> Scene:
    """Draw one good part.

    Args:
        family: the product.
        part: generator of everything that differs between good parts.
        size: (height, width) in pixels.

    Returns:
        The scene without the camera's effects (see ``photograph``); defects are added before those.
    """
    style = family.style()
    surface = family.kind in SURFACES
    view = _pose(style, part, size, surface)
    if surface:
        image = clip(SURFACES[family.kind](style, part, view))
        return Scene(image, image, np.ones(size, np.float32))
    background = _background(style, part, view)
    body, coverage = OBJECTS[family.kind](style, part, view)
    return _lit(style, clip(body), clip(background), coverage.astype(np.float32))


def _lit(style: Generator, body: Image, background: Image, coverage: Field) -> Scene:
    """Light the object: a shadow on the background, and an edge that is bright on one side and dark on the other."""
    angle, unit = style.uniform(0, 2 * np.pi), min(coverage.shape)
    shadow, reach = style.uniform(-0.2, 0.5), style.uniform(0.005, 0.03) * unit
    bevel, width = style.uniform(-0.3, 0.8), style.uniform(0.004, 0.012) * unit
    toward = np.array([np.cos(angle), np.sin(angle)])
    if shadow > 0:
        move = np.array([[1, 0, -reach * toward[0]], [0, 1, -reach * toward[1]]], np.float32)
        cast = cv2.GaussianBlur(coverage, (0, 0), max(1.0, reach / 2))
        cast = cv2.warpAffine(cast, move, coverage.shape[::-1])
        background = background * (1 - np.float32(shadow) * np.asarray(cast))[..., None]
    if bevel > 0:
        soft = cv2.GaussianBlur(coverage, (0, 0), width)
        slope = toward[0] * cv2.Sobel(soft, cv2.CV_32F, 1, 0) + toward[1] * cv2.Sobel(soft, cv2.CV_32F, 0, 1)
        body = clip(body * (1 - np.float32(bevel * width) * slope)[..., None])
    return Scene(background + (body - background) * coverage[..., None], background, coverage)


def _pose(style: Generator, part: Generator, size: tuple[int, int], surface: bool) -> View:
    """Position and rotation of this part: a surface has a random offset, an object lies near the centre; for some
    products the rotation is random too."""
    base_angle = style.uniform(0, 2 * np.pi) if style.random() < 0.5 else np.pi / 2 * style.integers(0, 4)
    turns_freely = style.random() < (0.1 if surface else 0.35)
    slack, zoom = style.uniform(0.0, 0.04), style.uniform(0.003, 0.02)
    angle = part.uniform(0, 2 * np.pi) if turns_freely else base_angle * surface + part.normal() * 0.03
    shift = part.uniform(-0.5, 0.5, 2) if surface else part.normal(size=2) * slack
    scale = 1 + part.normal() * zoom
    height, width = size
    unit = min(size)
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2) / unit
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2) / unit
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    u = cos * x[None, :] + sin * y[:, None] + np.float32(shift[0])
    v = -sin * x[None, :] + cos * y[:, None] + np.float32(shift[1])
    return View(u.astype(np.float32), v.astype(np.float32), size)


def _background(style: Generator, part: Generator, view: View) -> Image:
    """The background: plain, brushed, mottled, or a belt with a woven pattern."""
    kind = style.integers(0, 6)
    ground = pigment(style, 0.02, 0.95, 0.75)
    rough = style.uniform(0.0, 0.05)
    tone = np.ones(view.size, np.float32)
    if kind == 0:
        return metal(style, part, view)
    if kind == 1:
        tone = 1 + rough * fractal(part, view.size, 8, 3)
    elif kind == 2:
        tone = 1 + rough * smooth(part, view.size, 60)
    elif kind == 3:  # a belt's weave, fixed in product coordinates
        pitch = style.uniform(15, 50)
        tone = 1 + 2 * rough * np.cos(view.u * pitch * 6.28) * np.cos(view.v * pitch * 6.28)
    return ground * tone.astype(np.float32)[..., None]

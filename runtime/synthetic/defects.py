"""Synthetic defects: each is a function ``defect(scene, rng, center, radius) -> image``, with (x, y) in pixels.

Sources of the ideas: CutPaste (Li et al., CVPR 2021), DRÆM's Perlin-mask replacement (Zavrtanik et al., ICCV
2021), Poisson-blended patches (NSA, Schlüter et al., ECCV 2022; used by AnomalyGPT); scratches, cracks, holes,
stains, fibres, bent and missing parts are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .canvas import Image
from .noise import Field, blob, fractal, smooth
from .products import TRAINED_KINDS, Family, Scene, render

MIN_CHANGE = 0.02  # smallest change of a defective pixel, in grey levels of 0..1
VISIBLE_CHANGE = 0.03  # smallest mean change inside the mask; below, a defect is invisible
VISIBLE_SHARE = 0.35  # the same as a share of the standard deviation of the texture around it
RADIUS = (0.010, 0.15)  # share of the frame's shorter side, log-uniform
FAINTEST = 0.25  # 60 % of the defects are weakened, down to this share of their full contrast


@dataclass(frozen=True)
class Defect:
    """One defect of a part.

    ``center`` is (row, column) in 0..1, ``area`` the share of the frame, ``contrast`` the mean absolute change inside
    the mask (0..1, the largest of the colours) and ``shade`` the mean signed change: negative if the defect is darker
    than the part.
    """

    name: str
    center: tuple[float, float]
    area: float
    contrast: float = 0.0
    shade: float = 0.0


def add_defects(
    scene: Scene, rng: Generator, count: int, names: tuple[str, ...] | None = None
) -> tuple[Image, NDArray[np.bool_], list[Defect]]:
    """Add defects to a good part.

    Args:
        scene: the rendered part; not changed.
        rng: generator of everything.
        count: number of defects to try to add, at a distance from each other.
        names: the kinds to choose from; all by default.

    Returns:
        The damaged image, its mask [H, W], and the defects in the order in which they were added (at least one).
    """
    image = scene.image
    size = image.shape[:2]
    mask = np.zeros(size, bool)
    made: list[Defect] = []
    for _ in range(8 * count):
        if len(made) == count:
            break
        name = str(rng.choice(names or tuple(DEFECTS)))
        radius = float(np.exp(rng.uniform(*np.log(RADIUS)))) * min(size)
        strength = (
            np.float32(np.exp(rng.uniform(np.log(FAINTEST), 0))) if rng.random() < 0.6 else np.float32(1)
        )
        center = _place(scene, rng, name)
        if any(
            np.hypot(center[1] / size[0] - d.center[0], center[0] / size[1] - d.center[1]) < 0.3 for d in made
        ):
            continue
        damaged = DEFECTS[name](Scene(image, scene.background, scene.coverage), rng, center, radius)
        damaged = np.clip(image + strength * (damaged - image), 0, 1).astype(np.float32)
        change = np.maximum.reduce(cv2.split(np.abs(damaged - image)))
        touched = change > MIN_CHANGE
        touched = cv2.morphologyEx(touched.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) > 0
        area = touched.mean()
        if not 0.0004 < area < 0.2:
            continue
        contrast = float(change[touched].mean())
        rows, columns = np.nonzero(touched)
        if contrast < max(VISIBLE_CHANGE, VISIBLE_SHARE * _texture(image, rows, columns)):
            continue
        shade = float((damaged - image)[touched].mean())
        middle = float(rows.mean() / size[0]), float(columns.mean() / size[1])
        made.append(Defect(name, middle, float(area), contrast, shade))
        image, mask = damaged, mask | touched
    if not made:
        return add_defects(scene, rng, count, ("hole", "stain", "scratch"))
    return image, mask, made


def _texture(image: Image, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> float:
    """Standard deviation of the grey level in and around these pixels."""
    around = image[max(rows.min() - 4, 0) : rows.max() + 5, max(columns.min() - 4, 0) : columns.max() + 5]
    return float(cv2.cvtColor(np.asarray(around), cv2.COLOR_BGR2GRAY).std())


def _place(scene: Scene, rng: Generator, name: str) -> tuple[float, float]:
    """A random point (x, y) on the product, for defects of edges on its outline."""
    coverage = scene.coverage
    candidates = coverage > 0.5
    if name in ("broken_edge", "bent") and not candidates.all():
        candidates = (
            cv2.morphologyEx(candidates.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
        )
    points = np.flatnonzero(candidates)
    if points.size == 0:
        points = np.arange(candidates.size)
    row, column = divmod(int(rng.choice(points)), coverage.shape[1])
    return float(column), float(row)


def _tone(image: Image, center: tuple[float, float], rng: Generator, low: float, high: float) -> Field:
    """A colour BGR [3] that differs from the one at ``center`` by low..high, lighter or darker, sometimes tinted."""
    x, y = int(center[0]), int(center[1])
    local = image[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4].reshape(-1, 3).mean(axis=0)
    sign = -1 if local.mean() > rng.uniform(0.15, 0.85) else 1
    tint = rng.uniform(-0.2, 0.2, 3) * (rng.random() < 0.4)
    return np.clip(local + sign * rng.uniform(low, high) + tint, 0, 1).astype(np.float32)


def _paint(image: Image, alpha: Field, color: Field) -> Image:
    return image + (color - image) * alpha[..., None]


def _path(
    rng: Generator, start: tuple[float, float], length: float, bend: float, steps: int = 14
) -> NDArray[np.int32]:
    """A random winding polyline of about ``length`` pixels centred on ``start``, in 1/16 pixels for cv2's shift=4."""
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    moves = np.stack([np.cos(heading), np.sin(heading)], axis=1) * length / steps
    points = np.cumsum(moves, axis=0)
    points += np.asarray(start) - points[steps // 2]
    return np.rint(points * 16).astype(np.int32)


def _stroke(size: tuple[int, int], path: NDArray[np.int32], width: float) -> Field:
    """Antialiased line [H, W] in 0..1; a width below one pixel gives a fainter line of one pixel."""
    canvas = np.zeros(size, np.uint8)
    cv2.polylines(canvas, [path], False, 255, max(1, round(width)), cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) * np.float32(min(width, 1.0) / 255)


def scratch(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    size = scene.coverage.shape
    width = rng.uniform(0.5, 2.2) * min(size) / 224
    alpha = np.zeros(size, np.float32)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 1):
        offset = (center[0] + rng.normal() * 4, center[1] + rng.normal() * 4)
        alpha = np.maximum(alpha, _stroke(size, _path(rng, offset, radius * rng.uniform(2, 5), 0.08), width))
    return _paint(scene.image, alpha, _tone(scene.image, center, rng, 0.12, 0.5))


def crack(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    size = scene.coverage.shape
    width = rng.uniform(0.4, 1.6) * min(size) / 224
    trunk = _path(rng, center, radius * rng.uniform(2, 5), 0.55, 20)
    alpha = _stroke(size, trunk, width)
    for _ in range(int(rng.integers(0, 4))):
        joint = trunk[rng.integers(0, len(trunk))] / 16
        alpha = np.maximum(
            alpha, _stroke(size, _path(rng, (joint[0], joint[1]), radius, 0.6, 10), width * 0.7)
        )
    dark = _tone(scene.image, center, rng, 0.15, 0.5)
    return _paint(scene.image, alpha * (scene.coverage > 0.3), dark)


def hole(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    size = scene.coverage.shape
    radius = min(radius, 0.07 * min(size))
    alpha = blob(rng, size, center, radius, 0.25)
    depth = _tone(scene.image, center, rng, 0.2, 0.6)
    rim = np.clip(cv2.GaussianBlur(alpha, (0, 0), max(1.0, radius / 4)) - alpha, 0, 1) * rng.choice(
        [-0.5, 0.0, 0.6]
    )
    return _paint(scene.image, alpha, depth) + rim[..., None].astype(np.float32)


def stain(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A translucent spot through which the texture remains visible."""
    size = scene.coverage.shape
    alpha = blob(rng, size, center, radius, 0.5) * rng.uniform(0.3, 0.85)
    alpha = alpha * np.clip(1 + 0.4 * smooth(rng, size, max(3.0, radius / 2)), 0, 1.2)
    return _paint(
        scene.image,
        np.clip(alpha, 0, 1) * np.maximum(scene.coverage, 0.2),
        _tone(scene.image, center, rng, 0.15, 0.6),
    )


def color_change(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A discoloured or differently exposed area: gain and tint change, the structure stays."""
    alpha = blob(rng, scene.coverage.shape, center, radius * 1.3, 0.4)[..., None]
    gain = np.exp(rng.choice([-1, 1]) * rng.uniform(0.12, 0.6)) * (
        1 + rng.uniform(-0.25, 0.25, 3) * (rng.random() < 0.6)
    )
    return scene.image * (1 + alpha * (gain.astype(np.float32) - 1))


def contamination(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """Foreign matter: one to three opaque, shaded particles."""
    size = scene.coverage.shape
    image = scene.image
    for _ in range(int(rng.integers(1, 4))):
        spot = (center[0] + rng.normal() * radius, center[1] + rng.normal() * radius)
        alpha = blob(rng, size, spot, max(1.5, radius * rng.uniform(0.3, 0.8)), 0.5)
        shade = 1 + 0.25 * fractal(rng, size, max(2.0, radius / 2), 2)
        color = _tone(image, center, rng, 0.15, 0.6) * shade[..., None]
        image = image + (color - image) * alpha[..., None]
    return image


def fibre(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A loose thread or hair with its shadow."""
    size = scene.coverage.shape
    path = _path(rng, center, max(radius, 0.05 * min(size)) * rng.uniform(2.5, 6), 0.35, 24)
    width = rng.uniform(0.6, 2.4) * min(size) / 224
    image = _paint(scene.image, 0.5 * _stroke(size, path + 20, width), np.zeros(3, np.float32))
    return _paint(image, _stroke(size, path, width), _tone(scene.image, center, rng, 0.2, 0.6))


def cut_paste(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A patch from another place of the same part, rotated."""
    size = scene.coverage.shape
    donor = _place(scene, rng, "cut_paste")
    turn = cv2.getRotationMatrix2D(donor, float(rng.uniform(20, 340)), float(rng.uniform(0.8, 1.25)))
    turn[:, 2] += np.asarray(center) - np.asarray(donor)
    moved = cv2.warpAffine(
        scene.image, turn, size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    alpha = blob(rng, size, center, radius, 0.4)[..., None]
    return scene.image + (moved - scene.image) * alpha


def foreign_texture(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """An area of random shape replaced by another material."""
    size = scene.coverage.shape
    other = render(Family(str(rng.choice(TRAINED_KINDS)), int(rng.integers(0, 2**31))), rng, size).image
    noise = smooth(rng, size, max(4.0, radius / 1.5))
    alpha = np.clip((noise + 0.4) * 4, 0, 1) * blob(rng, size, center, radius * 1.3, 0.3)
    return scene.image + (other - scene.image) * (alpha * rng.uniform(0.35, 1.0))[..., None].astype(
        np.float32
    )


def poisson_paste(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A patch from another place or product, blended seamlessly (in the gradient domain)."""
    size = scene.coverage.shape
    if rng.random() < 0.5:
        donor = render(Family(str(rng.choice(TRAINED_KINDS)), int(rng.integers(0, 2**31))), rng, size).image
    else:
        donor = (
            np.ascontiguousarray(np.rot90(scene.image, 2))
            if size[0] != size[1]
            else np.rot90(scene.image).copy()
        )
    side = int(np.clip(radius * 2, 6, min(size) // 3))
    patch = blob(rng, (side, side), (side / 2, side / 2), side / 2.6, 0.3) > 0.3
    patch[[0, -1]], patch[:, [0, -1]] = False, False
    if patch.sum() < 9:
        return scene.image
    x = int(np.clip(center[0], side / 2 + 2, size[1] - side / 2 - 3))
    y = int(np.clip(center[1], side / 2 + 2, size[0] - side / 2 - 3))
    top, left = int(rng.integers(0, size[0] - side)), int(rng.integers(0, size[1] - side))
    source = np.rint(np.clip(donor[top : top + side, left : left + side], 0, 1) * 255).astype(np.uint8)
    target = np.rint(scene.image * 255).astype(np.uint8)
    mode = cv2.MIXED_CLONE if rng.random() < 0.3 else cv2.NORMAL_CLONE
    cloned = (
        cv2.seamlessClone(source, target, patch.astype(np.uint8) * 255, (x, y), mode).astype(np.float32) / 255
    )
    changed = np.abs(cloned - target.astype(np.float32) / 255).max(axis=2) > 0
    return np.where(changed[..., None], cloned, scene.image)


def missing(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A piece of the object is missing and shows the background; on a surface the texture is worn away."""
    size = scene.coverage.shape
    alpha = blob(rng, size, center, radius * 1.2, 0.3)[..., None]
    behind = scene.background
    if scene.coverage.min() > 0.5:
        behind = np.asarray(cv2.GaussianBlur(scene.image, (0, 0), max(3.0, radius / 2)), np.float32)
    return scene.image + (behind - scene.image) * alpha


def bent(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A local displacement: bent pins and teeth, pulled threads, a dent."""
    height, width = scene.coverage.shape
    reach = max(radius * 1.5, 0.035 * min(height, width))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    weight = np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / (2 * (reach / 1.6) ** 2)).astype(
        np.float32
    )
    if rng.random() < 0.5:
        angle = rng.choice([-1, 1]) * rng.uniform(0.5, 1.6) * weight
        dx, dy = x - center[0], y - center[1]
        map_x = center[0] + np.cos(angle) * dx - np.sin(angle) * dy
        map_y = center[1] + np.sin(angle) * dx + np.cos(angle) * dy
    else:
        direction, push = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.8) * reach
        map_x, map_y = x + push * np.cos(direction) * weight, y + push * np.sin(direction) * weight
    coordinates = map_x.astype(np.float32), map_y.astype(np.float32)
    moved = cv2.remap(scene.image, *coordinates, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(moved, np.float32)


def broken_edge(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A piece broken off the outline; away from the outline, a chip that shows raw material."""
    size = scene.coverage.shape
    alpha = (blob(rng, size, center, radius, 0.6) > 0.5).astype(np.float32)[..., None]
    raw = _tone(scene.image, center, rng, 0.08, 0.35) * (1 + 0.15 * fractal(rng, size, 3, 2))[..., None]
    behind = scene.background if scene.coverage.min() < 0.5 and rng.random() < 0.7 else raw
    return scene.image + (behind - scene.image) * alpha * np.float32(rng.uniform(0.8, 1.0))


def dent(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A dent, bump or wrinkle: bright on one side, dark on the other; the surface's colour is unchanged."""
    size = scene.coverage.shape
    bump = cv2.GaussianBlur(blob(rng, size, center, radius, 0.3), (0, 0), max(1.0, radius / 3))
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * cv2.Sobel(bump, cv2.CV_32F, 1, 0) + np.sin(angle) * cv2.Sobel(
        bump, cv2.CV_32F, 0, 1
    )
    slope = slope / max(float(np.abs(slope).max()), 1e-6)
    return scene.image * (1 + np.float32(rng.uniform(0.25, 0.8)) * slope)[..., None]


def streak(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A straight line along or across the product: a wrong yarn, a die line, a seam; sharp or soft."""
    size = scene.coverage.shape
    angle = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)]) + rng.normal(0, 0.03)
    length, width = radius * rng.uniform(3, 12), rng.uniform(0.8, 3.0) * min(size) / 224
    y, x = np.ogrid[: size[0], : size[1]]
    dx, dy = (x - center[0]).astype(np.float32), (y - center[1]).astype(np.float32)
    along, across = (
        np.abs(np.cos(angle) * dx + np.sin(angle) * dy),
        np.abs(np.cos(angle) * dy - np.sin(angle) * dx),
    )
    soft = rng.choice([0.7, width])
    alpha = np.clip((width / 2 + soft / 2 - across) / soft, 0, 1) * np.clip((length / 2 - along) / 4, 0, 1)
    return _paint(scene.image, alpha * (scene.coverage > 0.3), _tone(scene.image, center, rng, 0.1, 0.45))


def rough(scene: Scene, rng: Generator, center: tuple[float, float], radius: float) -> Image:
    """A frayed, scuffed, porous or polished area: the local texture is stronger, weaker or different."""
    size = scene.coverage.shape
    alpha = blob(rng, size, center, radius, 0.5)[..., None]
    if rng.random() < 0.3:
        changed = np.asarray(cv2.GaussianBlur(scene.image, (0, 0), rng.uniform(1.5, 4)), np.float32)
    else:
        grit = fractal(
            rng, size, rng.uniform(1.0, 6.0) * min(size) / 224, 2, float(rng.choice([1.0, 1.0, 6.0]))
        )
        changed = scene.image + np.float32(rng.uniform(0.06, 0.25)) * grit[..., None]
    return scene.image + (changed - scene.image) * alpha


DEFECTS: dict[str, Callable[[Scene, Generator, tuple[float, float], float], Image]] = {
    "scratch": scratch, "crack": crack, "hole": hole, "stain": stain, "color_change": color_change,
    "contamination": contamination, "fibre": fibre, "cut_paste": cut_paste, "foreign_texture": foreign_texture,
    "poisson_paste": poisson_paste, "missing": missing, "bent": bent, "broken_edge": broken_edge,
    "dent": dent, "streak": streak, "rough": rough,
}  # fmt: skip

# On a random texture, a displaced piece of the same texture cannot be recognised as a defect.
RANDOM_TEXTURES = ("leather", "speckle", "carpet", "cast", "ground", "foam", "glazed")
DISPLACEMENTS = ("cut_paste", "bent")


def plausible_defects(kind: str) -> tuple[str, ...]:
    """The defects that can be seen on this kind of product."""
    if kind in RANDOM_TEXTURES:
        return tuple(name for name in DEFECTS if name not in DISPLACEMENTS)
    return tuple(DEFECTS)

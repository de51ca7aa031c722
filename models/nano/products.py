"""Procedural products: what a line's camera might see, with the variation between good parts.

A ``Family`` is one product: a kind and a seed that fixes its design (colours, pitch, proportions). ``render``
draws one good part of it: the design comes from the family's seed, everything that differs between good parts
(pose, grain, light, focus, sensor noise) from the caller's generator. Every kind is a function
``kind(style, part, view)``; it must draw from ``style`` the same number of values whatever ``part`` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from .noise import Field, fractal, smooth, white

Image = NDArray[np.floating[Any]]  # [H, W, 3] BGR, 0..1
GENERATOR_VERSION = 1


@dataclass(frozen=True)
class Family:
    kind: str
    seed: int

    def style(self) -> Generator:
        """The generator that fixes this product's design; the same sequence every time."""
        return default_rng([GENERATOR_VERSION, zlib.crc32(self.kind.encode()), self.seed])


@dataclass
class View:
    """Product coordinates of every pixel: u to the right, v down, unit = the frame's shorter side, 0 = centre."""

    u: Field
    v: Field
    size: tuple[int, int]

    @property
    def pixel(self) -> float:
        return 1.0 / min(self.size)

    def fill(self, distance: Field) -> Field:
        """Antialiased coverage of the region where a signed distance (in units) is negative."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)


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
        The scene before the camera (see ``photograph``); defects are made in between.
    """
    style = family.style()
    surface = family.kind in SURFACES
    view = _pose(style, part, size, surface)
    if surface:
        image = SURFACES[family.kind](style, part, view)
        return Scene(_clip(image), _clip(image), np.ones(size, np.float32))
    background = _background(style, part, view)
    body, coverage = OBJECTS[family.kind](style, part, view)
    alpha = coverage[..., None]
    return Scene(_clip(body * alpha + background * (1 - alpha)), _clip(background), coverage)


def photograph(image: Image, style: Generator, part: Generator) -> NDArray[np.uint8]:
    """Light, lens and sensor: gradient, exposure, colour cast, blur, noise → uint8 BGR.

    ``style`` is the camera of the line (how noisy, how unsteady the light), ``part`` the single shot.
    """
    size = image.shape[:2]
    unsteady, noisy, soft, dirt = (
        style.uniform(0.2, 1.0),
        style.uniform(0, 0.025),
        style.uniform(0, 0.7),
        style.uniform(),
    )
    angle = part.uniform(0, 2 * np.pi)
    y, x = np.ogrid[-0.5 : 0.5 : size[0] * 1j, -0.5 : 0.5 : size[1] * 1j]
    light = 1 + unsteady * part.uniform(-0.22, 0.22) * (np.cos(angle) * x + np.sin(angle) * y)
    light = light * (1 + unsteady * part.uniform(-0.10, 0.10))
    if part.random() < 0.3:
        light = light + unsteady * 0.05 * smooth(part, size, max(size) / 2)
    cast = 1 + unsteady * part.uniform(-0.02, 0.02, 3)
    shot = image * light[..., None].astype(np.float32) * cast.astype(np.float32)
    if dirt > 0.75:  # lines where a little dust on good parts is normal
        shot = _dust(shot, part, int(part.integers(0, 5)))
    sigma = soft * part.uniform(0.5, 1.2)
    if sigma > 0.25:
        shot = cv2.GaussianBlur(shot, (0, 0), sigma)
    grain = white(part, size)[..., None] * np.float32(noisy * part.uniform(0.6, 1.2))
    return np.rint(_clip(shot + grain) * 255).astype(np.uint8)


def _dust(image: Image, part: Generator, count: int) -> Image:
    image = np.ascontiguousarray(image, np.float32)
    height, width = image.shape[:2]
    for _ in range(count):
        point = (int(part.integers(0, width)), int(part.integers(0, height)))
        tone = float(
            np.clip(image[point[1], point[0]].mean() + part.choice([-1, 1]) * part.uniform(0.05, 0.2), 0, 1)
        )
        cv2.circle(image, point, int(part.integers(0, 2)), (tone, tone, tone), -1, cv2.LINE_AA)
    return image


def _clip(image: Image) -> Image:
    return np.clip(image, 0, 1).astype(np.float32)


def _pose(style: Generator, part: Generator, size: tuple[int, int], surface: bool) -> View:
    """How this part lies: a surface passes at any offset, an object sits near its nest or turned freely."""
    base_angle = style.uniform(0, 2 * np.pi)
    turns_freely = style.random() < (0.1 if surface else 0.35)
    slack = style.uniform(0.0, 0.03)
    angle = part.uniform(0, 2 * np.pi) if turns_freely else base_angle * surface + part.normal() * 0.03
    shift = part.uniform(-0.5, 0.5, 2) if surface else part.normal(size=2) * slack
    scale = 1 + part.normal() * 0.01
    height, width = size
    unit = min(size)
    x = (np.arange(width, dtype=np.float32) - (width - 1) / 2) / unit
    y = (np.arange(height, dtype=np.float32) - (height - 1) / 2) / unit
    cos, sin = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    u = cos * x[None, :] + sin * y[:, None] + np.float32(shift[0])
    v = -sin * x[None, :] + cos * y[:, None] + np.float32(shift[1])
    return View(u, v, size)


def _color(style: Generator, low: float = 0.1, high: float = 0.9, grey: float = 0.35) -> Field:
    """A BGR colour; with probability ``grey`` without hue."""
    value = style.uniform(low, high)
    tint = style.uniform(-0.25, 0.25, 3) * (style.random() > grey)
    return np.clip(value + tint, 0.02, 0.98).astype(np.float32)


def _mix(a: Field, b: Field, t: Field) -> Image:
    """Blend two colours by a field in 0..1."""
    return a + (b - a) * np.clip(t, 0, 1)[..., None].astype(np.float32)


def _wave(x: Field) -> Field:
    """0..1, period 1, maximum at whole numbers."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * x, dtype=np.float32)


def _jitter(part: Generator, index: Field, strength: float) -> Field:
    """One random value for each whole-number index (a thread, a tile), stable within a part."""
    table = part.standard_normal(4096).astype(np.float32) * np.float32(strength)
    return table[index.astype(np.int64) & 4095]


# ---------------------------------------------------------------------------------------------------- surfaces


def weave(style: Generator, part: Generator, view: View) -> Image:
    pitch, ratio, relief = style.uniform(10, 42), style.uniform(0.7, 1.4), style.uniform(0.2, 0.6)
    twill, uneven = style.integers(0, 3), style.uniform(0.01, 0.08)
    warp_color, weft_color = _color(style), _color(style)
    warp_color = warp_color if style.random() < 0.5 else weft_color * np.float32(0.85)
    i, j = np.floor(view.u * pitch), np.floor(view.v * pitch * ratio)
    over = ((i + j) % 2 < 1) if twill == 0 else ((i + 2 * j * (twill == 2) + j * (twill == 1)) % 4 < 2)
    warp = np.sqrt(_wave(view.u * pitch + 0.5))
    weft = np.sqrt(_wave(view.v * pitch * ratio + 0.5))
    tone = np.where(over, warp + _jitter(part, i, uneven), weft + _jitter(part, j + 2048, uneven))
    shade = 1 - relief + relief * tone + 0.03 * white(part, view.size)
    return np.where(over[..., None], warp_color, weft_color) * shade[..., None]


def knit(style: Generator, part: Generator, view: View) -> Image:
    pitch, slope, relief = style.uniform(7, 24), style.uniform(0.4, 1.2), style.uniform(0.3, 0.7)
    color, other, stripes = _color(style), _color(style), int(style.integers(0, 8))
    wobble = 0.004 * smooth(part, view.size, min(view.size) / 5)
    column = (view.u + wobble) * pitch
    across = np.abs(column - np.floor(column) - 0.5)
    row = view.v * pitch * 1.3 + across * slope
    tone = _wave(row) * np.sqrt(np.clip(1.1 - 2 * across, 0, 1)) + _jitter(part, np.floor(row), 0.03)
    striped = (np.floor(row / max(stripes, 1)) % 2 < 1) & (stripes > 3)
    return np.where(striped[..., None], other, color) * (1 - relief + relief * tone)[..., None]


def leather(style: Generator, part: Generator, view: View) -> Image:
    cell, depth, fold = style.uniform(4, 14), style.uniform(0.2, 0.6), style.uniform(0, 0.10)
    color = _color(style, 0.1, 0.7)
    cell *= min(view.size) / 224
    ridges = np.abs(smooth(part, view.size, cell)) + 0.7 * np.abs(smooth(part, view.size, cell * 0.6))
    tone = np.clip(ridges, 0, 1.2) / 1.2
    shade = 1 - depth + depth * np.sqrt(tone) + fold * 0.5 * smooth(part, view.size, min(view.size) / 3)
    return color * shade[..., None]


def wood(style: Generator, part: Generator, view: View) -> Image:
    rings, warp, streak = style.uniform(4, 22), style.uniform(0.2, 0.9), style.uniform(0.03, 0.15)
    early, late = _color(style, 0.4, 0.85, 0), _color(style, 0.15, 0.5, 0)
    early, late = np.sort(early), np.sort(late)  # BGR ascending: brown
    contrast = style.uniform(0.25, 0.8)
    bend = warp * smooth(part, view.size, min(view.size) / 3, 3.0) * 0.5
    phase = view.v * rings + bend + part.uniform()
    saw = phase - np.floor(phase)
    fibre = smooth(part, view.size, 1.5 * min(view.size) / 224, 25.0) * streak
    return _mix(early, late, contrast * saw**2) * (1 + fibre)[..., None]


def metal(style: Generator, part: Generator, view: View) -> Image:
    strength, length, sheen = style.uniform(0.01, 0.10), style.uniform(10, 60), style.uniform(0, 0.25)
    color = _color(style, 0.25, 0.8, 0.8)
    brushed = style.random() < 0.7
    streak = smooth(part, view.size, 1.2 * min(view.size) / 224, length if brushed else 1.5)
    band = sheen * np.cos(view.v * style.uniform(2, 6) + part.uniform(-0.3, 0.3))
    cloud = 0.03 * smooth(part, view.size, min(view.size) / 3)
    return color * (1 + strength * streak + band + cloud)[..., None]


def tile(style: Generator, part: Generator, view: View) -> Image:
    count, joint, bond = style.uniform(2.2, 7), style.uniform(0.03, 0.09), style.choice([0.0, 0.5])
    face, grout, vary = _color(style), _color(style, 0.1, 0.8, 0.9), style.uniform(0, 0.08)
    speckle, aspect = style.uniform(0, 0.08), style.choice([1.0, 1.0, 2.0])
    row = np.floor(view.v * count * aspect)
    column = view.u * count + bond * (row % 2)
    x, y = column - np.floor(column), view.v * count * aspect - row
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y) / aspect) - joint / 2
    inside = view.fill(-edge / count)
    tone = 1 + _jitter(part, np.floor(column) + 61 * row, vary) + speckle * fractal(part, view.size, 6, 3)
    return _mix(grout, np.ones(3, np.float32), inside) * (1 - inside[..., None]) + inside[..., None] * (
        face * tone[..., None]
    )


def speckle(style: Generator, part: Generator, view: View) -> Image:
    base = _color(style)
    grain = style.uniform(2, 10) * min(view.size) / 224
    image = np.broadcast_to(base, (*view.size, 3)).astype(np.float32)
    for _ in range(3):
        level, hue = style.uniform(0.6, 1.8), _color(style)
        field = fractal(part, view.size, grain, 2)
        grain *= style.uniform(0.6, 1.3)
        image = image + (hue - image) * np.clip((field - level) * 3, 0, 1)[..., None]
    return image * (1 + 0.02 * white(part, view.size))[..., None]


def carpet(style: Generator, part: Generator, view: View) -> Image:
    color, other = _color(style), _color(style)
    grain, strength, share = style.uniform(1.2, 3.5), style.uniform(0.08, 0.3), style.uniform(-1.5, 1.5)
    pile = fractal(part, view.size, grain * min(view.size) / 224, 2)
    patches = np.clip(smooth(part, view.size, grain * 2 * min(view.size) / 224) * 2 + share, 0, 1)
    return _mix(color, other, patches) * (1 + strength * pile)[..., None]


def cast(style: Generator, part: Generator, view: View) -> Image:
    """Ground or cast faces: ceramic, ferrite, concrete; cloudy, sometimes with grinding marks and pores."""
    color = _color(style, 0.15, 0.8, 0.85)
    cloud, marks, pores = style.uniform(0.01, 0.10), style.uniform(-0.05, 0.06), style.uniform(0, 1)
    period, size = style.uniform(20, 80), style.uniform(14, 60) * min(view.size) / 224
    tone = 1 + cloud * fractal(part, view.size, size, 4)
    tone = tone + max(marks, 0) * _wave(view.v * period + 0.5 * smooth(part, view.size, 40)) * white(
        part, (view.size[0], 1)
    )
    if pores > 0.6:
        tone = tone - 0.25 * np.clip((smooth(part, view.size, 2.0) - 2.2) * 2, 0, 1)
    return color * (tone + 0.01 * white(part, view.size))[..., None]


def printed(style: Generator, part: Generator, view: View) -> Image:
    """A repeated printed motif: dots, rings, bars, crosses or chevrons on a plain ground."""
    ground, ink = _color(style, 0.5, 0.95), _color(style, 0.02, 0.5)
    count, motif, extent = style.uniform(3, 10), style.integers(0, 5), style.uniform(0.2, 0.38)
    stagger, paper = style.choice([0.0, 0.5]), style.uniform(0, 0.04)
    row = np.floor(view.v * count)
    x = view.u * count + stagger * (row % 2)
    x, y = x - np.floor(x) - 0.5, view.v * count - row - 0.5
    radius = np.hypot(x, y)
    distance = (
        radius - extent,
        np.abs(radius - extent) - 0.07,
        np.maximum(np.abs(x) - 0.4, np.abs(y) - extent / 2.5),
        np.minimum(
            np.maximum(np.abs(x) - 0.09, np.abs(y) - extent), np.maximum(np.abs(y) - 0.09, np.abs(x) - extent)
        ),
        np.abs(y + np.abs(x) - 0.2) - 0.1,
    )[int(motif)]
    inked = view.fill(distance / count)
    return _mix(ground, ink, inked) * (1 + paper * fractal(part, view.size, 5, 3))[..., None]


def mesh(style: Generator, part: Generator, view: View) -> Image:
    count, wire = style.uniform(6, 16), style.uniform(0.15, 0.35)
    metal_color, behind = _color(style, 0.4, 0.9, 0.7), _color(style, 0.02, 0.35, 0.7)
    x, y = view.u * count, view.v * count
    dx, dy = np.abs(x - np.rint(x)), np.abs(y - np.rint(y))
    upper = (np.rint(x) + np.rint(y)) % 2 < 1
    shade_x, shade_y = np.clip(1 - (dx / wire * 2) ** 2, 0, 1), np.clip(1 - (dy / wire * 2) ** 2, 0, 1)
    tone = np.where(
        upper & (dx < wire / 2),
        shade_x,
        np.maximum(shade_y * (dy < wire / 2), shade_x * (dx < wire / 2) * 0.8),
    )
    return _mix(behind, metal_color, np.sqrt(tone)) * (1 + 0.03 * white(part, view.size))[..., None]


# ----------------------------------------------------------------------------------------------------- objects


def _background(style: Generator, part: Generator, view: View) -> Image:
    kind = style.integers(0, 4)
    color = _color(style, 0.02, 0.95, 0.7)
    rough = style.uniform(0.0, 0.05)
    if kind == 0:
        return metal(style, part, view)
    if kind == 1:
        return (
            np.broadcast_to(color, (*view.size, 3)) * (1 + rough * fractal(part, view.size, 8, 3))[..., None]
        )
    if kind == 2:
        return np.broadcast_to(color, (*view.size, 3)) * (1 + rough * smooth(part, view.size, 60))[..., None]
    return np.broadcast_to(color, (*view.size, 3)).astype(np.float32)


def _skin(style: Generator, part: Generator, view: View, color: Field) -> Image:
    """The face of an object: plain, cloudy, grainy or brushed."""
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


def _polar(view: View) -> tuple[Field, Field]:
    return np.hypot(view.u, view.v), np.arctan2(view.v, view.u)


def _holes(style: Generator, view: View, ring: float, count: int, radius: float) -> Field:
    """Coverage of ``count`` round holes on a circle."""
    start = style.uniform(0, 2 * np.pi)
    covered = np.zeros(view.size, np.float32)
    for k in range(count):
        a = start + 2 * np.pi * k / count
        covered = np.maximum(
            covered, view.fill(np.hypot(view.u - ring * np.cos(a), view.v - ring * np.sin(a)) - radius)
        )
    return covered


def disc(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    radius, rim, dome = style.uniform(0.25, 0.46), style.uniform(0.01, 0.05), style.uniform(-0.3, 0.3)
    face = _skin(style, part, view, _color(style))
    holes, hole_radius = int(style.integers(0, 6)), style.uniform(0.015, 0.05)
    mark, mark_color = style.integers(0, 3), _color(style)
    r, _ = _polar(view)
    shade = 1 + dome * (r / radius) ** 2 - 0.35 * view.fill(np.abs(r - radius + rim) - rim / 3)
    body = face * shade[..., None]
    if mark == 1:
        stamped = view.fill(np.abs(r - radius * 0.5) - 0.012)
        body = body + (mark_color - body) * stamped[..., None]
    elif mark == 2:
        stamped = view.fill(np.maximum(np.abs(view.u) - radius * 0.6, np.abs(view.v) - 0.012))
        body = body + (mark_color - body) * 0.7 * stamped[..., None]
    coverage = view.fill(r - radius)
    if holes > 1:
        coverage = coverage * (1 - _holes(style, view, radius * 0.62, holes, hole_radius))
    return body, coverage


def ring(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    outer = style.uniform(0.28, 0.46)
    inner, bevel = outer * style.uniform(0.35, 0.8), style.uniform(0.1, 0.5)
    face = _skin(style, part, view, _color(style))
    r, theta = _polar(view)
    middle = (outer + inner) / 2
    height = 1 - bevel * ((r - middle) / (outer - inner) * 2) ** 2
    gloss = 1 + 0.15 * np.cos(theta - style.uniform(0, 6.28))
    return face * (height * gloss)[..., None], view.fill(np.maximum(r - outer, inner - r))


def gear(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    teeth, radius = int(style.integers(8, 28)), style.uniform(0.28, 0.42)
    depth, bore = style.uniform(0.02, 0.06), style.uniform(0.04, 0.14)
    face = _skin(style, part, view, _color(style, 0.2, 0.85, 0.6))
    spokes, hub = int(style.integers(0, 7)), style.uniform(0.5, 0.65)
    r, theta = _polar(view)
    profile = radius + depth * np.clip(2.2 * np.cos(teeth * theta), -1, 1)
    shade = 1 - 0.2 * view.fill(np.abs(r - radius + 2 * depth) - 0.006)
    coverage = view.fill(np.maximum(r - profile, bore - r))
    if spokes > 2:
        coverage = coverage * (1 - _holes(style, view, radius * hub, spokes, radius * 0.14))
    return face * shade[..., None], coverage


def nut(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    sides, radius, bore = int(style.integers(4, 9)), style.uniform(0.25, 0.4), style.uniform(0.35, 0.6)
    face = _skin(style, part, view, _color(style, 0.3, 0.85, 0.7))
    r, theta = _polar(view)
    sector = np.pi / sides
    edge = r * np.cos((theta + sector) % (2 * sector) - sector) - radius
    thread = 1 + 0.3 * np.cos(60 * r) * (r < bore * radius + 0.04)
    return face * (thread * (1 - 0.3 * (edge > -0.03)))[..., None], view.fill(
        np.maximum(edge, bore * radius - r)
    )


def capsule(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    length, radius = style.uniform(0.12, 0.3), style.uniform(0.1, 0.19)
    left, right = _color(style), _color(style)
    gloss, joint, lettered = style.uniform(0.05, 0.35), style.uniform(-0.08, 0.08), style.random() < 0.4
    ink = _color(style, 0.02, 0.4)
    d = np.hypot(np.maximum(np.abs(view.u) - length, 0), view.v) - radius
    skin = _skin(style, part, view, np.ones(3, np.float32))
    body = _mix(left, right, view.fill(joint - view.u)) * skin
    shade = (
        np.sqrt(np.clip(1 - (view.v / radius) ** 2, 0.02, 1)) * (1 - gloss)
        + gloss * np.exp(-(((view.v / radius + 0.45) / 0.18) ** 2)) * 1.5
    )
    body = body * (0.35 + 0.65 * shade - 0.2 * view.fill(np.abs(view.u - joint) - 0.004))[..., None]
    if lettered:
        bars = (_wave(view.u * 18) > 0.5) & (np.abs(view.v) < radius * 0.25) & (np.abs(view.u) < length * 0.8)
        body = body + (ink - body) * (0.8 * bars)[..., None].astype(np.float32)
    return body, view.fill(d)


def bottle(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A glass vessel from above: concentric walls, dark depth, highlights."""
    outer, wall = style.uniform(0.3, 0.47), style.uniform(0.05, 0.12)
    glass, inside = _color(style, 0.05, 0.6, 0.2), _color(style, 0.02, 0.5, 0.4)
    bands, shine = style.uniform(8, 30), style.uniform(0.1, 0.6)
    light = style.uniform(0, 6.28)
    r, theta = _polar(view)
    walls = np.exp(-(((r - outer + wall / 2) / (wall / 2)) ** 2)) + 0.6 * np.exp(
        -(((r - outer * 0.55) / 0.03) ** 2)
    )
    tone = _mix(inside, glass, walls) * (1 + 0.25 * np.cos(r * bands * 4))[..., None]
    glints = (
        np.exp(-((np.angle(np.exp(1j * (theta - light - 0.05 * part.normal()))) / 0.4) ** 2)) * walls * shine
    )
    depth = 0.02 * fractal(part, view.size, 20, 2)
    return tone + (glints + depth)[..., None].astype(np.float32), view.fill(r - outer)


def biscuit(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """Baked goods and castings: irregular outline, mottled face, a pattern of dimples; no two alike."""
    radius, ragged = style.uniform(0.28, 0.43), style.uniform(0.0, 0.02)
    color = np.sort(_color(style, 0.3, 0.75, 0.2))
    mottle, bumps, dimples = style.uniform(0.04, 0.18), style.uniform(3, 14), int(style.integers(0, 9))
    square = style.random() < 0.25
    r, theta = _polar(view)
    outline = radius * (
        1 + ragged * sum(part.normal() * np.cos(k * theta + part.uniform(0, 6.28)) for k in range(2, 8))
    )
    extent = np.maximum(np.abs(view.u), np.abs(view.v)) if square else r
    edge = extent - outline
    tone = 1 + mottle * fractal(part, view.size, bumps * min(view.size) / 224, 4) - 0.25 * np.exp(edge / 0.03)
    body = color * tone[..., None]
    if dimples > 2:
        body = body * (1 - 0.4 * _holes(style, view, radius * 0.5, dimples, 0.018))[..., None]
    return body, view.fill(edge)


def board(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A circuit board: traces on a routing grid, pads, chips with pins."""
    lacquer, copper = _color(style, 0.08, 0.5, 0.2), _color(style, 0.4, 0.95, 0.3)
    width, height = style.uniform(0.6, 0.96), style.uniform(0.5, 0.9)
    binary = style.random() < 0.25
    lines, pads, chips = int(style.integers(6, 22)), int(style.integers(4, 20)), int(style.integers(0, 6))
    canvas = 256
    layout = np.zeros((canvas, canvas), np.float32)
    chip_layer = np.zeros((canvas, canvas), np.float32)
    for _ in range(lines):
        x, y = style.integers(1, 16, 2) * 16
        thick = int(style.integers(1, 5))
        for _ in range(int(style.integers(2, 5))):
            dx, dy = (
                style.choice(np.array([[1, 0], [0, 1], [1, 1], [-1, 0], [0, -1], [1, -1]]))
                * style.integers(1, 6)
                * 16
            )
            end = (int(np.clip(x + dx, 8, 248)), int(np.clip(y + dy, 8, 248)))
            cv2.line(layout, (int(x), int(y)), end, 1.0, thick, cv2.LINE_AA)
            x, y = end
        cv2.circle(layout, (int(x), int(y)), thick + 3, 1.0, -1, cv2.LINE_AA)
    for _ in range(pads):
        x, y = (int(c) for c in style.integers(1, 16, 2) * 16)
        cv2.circle(layout, (x, y), int(style.integers(4, 9)), 1.0, -1, cv2.LINE_AA)
        cv2.circle(layout, (x, y), 2, 0.0, -1, cv2.LINE_AA)
    for _ in range(chips):
        x, y, w, h = (int(c) for c in (*style.integers(20, 200, 2), *style.integers(16, 60, 2)))
        for pin in range(y, y + h, 8):
            cv2.line(layout, (x - 5, pin), (x + w + 5, pin), 1.0, 2, cv2.LINE_AA)
        cv2.rectangle(chip_layer, (x, y), (x + w, y + h), 1.0, -1, cv2.LINE_AA)
    map_x = ((view.u / width + 0.5) * (canvas - 1)).astype(np.float32)
    map_y = ((view.v / height + 0.5) * (canvas - 1)).astype(np.float32)
    etched = np.asarray(cv2.remap(layout, map_x, map_y, cv2.INTER_LINEAR, borderValue=0), np.float32)
    packaged = cv2.remap(chip_layer, map_x, map_y, cv2.INTER_LINEAR, borderValue=0)
    if binary:
        body = np.repeat((0.05 + 0.9 * etched)[..., None], 3, 2)
        return body, np.ones(view.size, np.float32)
    body = _mix(lacquer, copper, etched) * (1 + 0.02 * fractal(part, view.size, 4, 2))[..., None]
    body = body + (np.float32(0.12) - body) * packaged[..., None]
    edge = np.maximum(np.abs(view.u) - width / 2, np.abs(view.v) - height / 2)
    return body, view.fill(edge)


def connector(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A housing with rows of pins; each pin stands a little differently."""
    width, height = style.uniform(0.32, 0.46), style.uniform(0.1, 0.24)
    columns, rows = int(style.integers(4, 14)), int(style.integers(1, 4))
    shell, pin_color = _color(style, 0.05, 0.6), _color(style, 0.55, 0.95, 0.5)
    x = (view.u / width * 0.5 + 0.5) * columns
    y = (view.v / height * 0.5 + 0.5) * rows
    wobble = _jitter(part, np.floor(x) + 64 * np.floor(y), 0.02)
    dx, dy = (
        (x - np.floor(x) - 0.5 + wobble) * 2 * width / columns,
        (y - np.floor(y) - 0.5) * 2 * height / rows,
    )
    pitch = min(2 * width / columns, 2 * height / rows)
    inside = (np.abs(view.u) < width * 0.97) & (np.abs(view.v) < height * 0.97)
    pin = view.fill(np.maximum(np.abs(dx), np.abs(dy)) - pitch * style.uniform(0.18, 0.32)) * inside
    body = _mix(shell, pin_color, pin) * (0.9 + 0.1 * _wave(view.v * 3))[..., None]
    edge = np.maximum(np.abs(view.u) - width * 1.04, np.abs(view.v) - height * 1.1)
    return body * _skin(style, part, view, np.ones(3, np.float32)), view.fill(edge)


def blister(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """An array of tablets in a tray."""
    columns, rows = int(style.integers(2, 6)), int(style.integers(2, 5))
    tray, tablet = _color(style, 0.4, 0.9, 0.7), _color(style, 0.3, 0.98)
    fill, pitch = style.uniform(0.28, 0.42), 0.84 / max(columns, rows)
    x, y = view.u / pitch + columns / 2, view.v / pitch + rows / 2
    i, j = np.floor(x), np.floor(y)
    inside = (i >= 0) & (i < columns) & (j >= 0) & (j < rows)
    cell = i + 64 * j
    r = np.hypot(x - i - 0.5 + _jitter(part, cell, 0.02), y - j - 0.5 + _jitter(part, cell + 7, 0.02))
    pocket = view.fill((r - fill - 0.06) * pitch) * inside
    pill = view.fill((r - fill) * pitch) * inside
    body = tray * (1 - 0.2 * pocket)[..., None]
    dome = (1.05 - 0.5 * (r / fill) ** 2 + _jitter(part, cell + 99, 0.02))[..., None]
    body = body + (tablet * dome - body) * pill[..., None]
    edge = np.maximum(np.abs(view.u) - columns * pitch / 2 - 0.02, np.abs(view.v) - rows * pitch / 2 - 0.02)
    return body, view.fill(edge)


def bracket(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A stamped plate: rounded rectangle minus a slot and holes."""
    width, height, corner = style.uniform(0.22, 0.44), style.uniform(0.12, 0.36), style.uniform(0.01, 0.08)
    face = _skin(style, part, view, _color(style, 0.25, 0.85, 0.6))
    slot, holes = style.uniform(0.2, 0.6), int(style.integers(1, 5))
    bore = style.uniform(0.02, 0.05)
    qx, qy = np.abs(view.u) - width + corner, np.abs(view.v) - height + corner
    edge = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner
    cut = np.maximum(np.abs(view.u) - width * slot, np.abs(view.v) - 0.022)
    coverage = view.fill(np.maximum(edge, -cut))
    for k in range(holes):
        x, y = style.uniform(-0.8, 0.8) * width, (0.6 if k % 2 else -0.6) * height
        coverage = coverage * (1 - view.fill(np.hypot(view.u - x, view.v - y) - bore))
    return face * (1 - 0.25 * view.fill(np.abs(edge + 0.012) - 0.004))[..., None], coverage


Surface = Callable[[Generator, Generator, View], Image]
Object = Callable[[Generator, Generator, View], tuple[Image, Field]]

SURFACES: dict[str, Surface] = {
    "weave": weave, "knit": knit, "leather": leather, "wood": wood, "metal": metal, "tile": tile,
    "speckle": speckle, "carpet": carpet, "cast": cast, "printed": printed, "mesh": mesh,
}  # fmt: skip
OBJECTS: dict[str, Object] = {
    "disc": disc, "ring": ring, "gear": gear, "nut": nut, "capsule": capsule, "bottle": bottle,
    "biscuit": biscuit, "board": board, "connector": connector, "blister": blister, "bracket": bracket,
}  # fmt: skip
KINDS = (*SURFACES, *OBJECTS)
HELD_OUT_KINDS = ("mesh", "nut")  # never trained on: the evaluation families hold them
TRAINED_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)

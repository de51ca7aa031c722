"""Surfaces that fill the frame: textiles, wood, metal, stone, print.

Each is a function ``kind(style, part, view) -> image``: the design is drawn from ``style``, and the number of values
drawn from it must not depend on ``part``.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from .canvas import Image, View, jitter, mix, pigment, wave
from .noise import Field, fractal, smooth, white


def weave(style: Generator, part: Generator, view: View) -> Image:
    pitch, ratio, relief = style.uniform(10, 42), style.uniform(0.7, 1.4), style.uniform(0.2, 0.6)
    twill, uneven = style.integers(0, 3), style.uniform(0.01, 0.08)
    warp_color, weft_color = pigment(style), pigment(style)
    warp_color = warp_color if style.random() < 0.5 else weft_color * np.float32(0.85)
    i, j = np.floor(view.u * pitch), np.floor(view.v * pitch * ratio)
    over = ((i + j) % 2 < 1) if twill == 0 else ((i + 2 * j * (twill == 2) + j * (twill == 1)) % 4 < 2)
    warp = np.sqrt(wave(view.u * pitch + 0.5))
    weft = np.sqrt(wave(view.v * pitch * ratio + 0.5))
    tone = np.where(over, warp + jitter(part, i, uneven), weft + jitter(part, j + 2048, uneven))
    shade = 1 - relief + relief * tone + 0.03 * white(part, view.size)
    return np.where(over[..., None], warp_color, weft_color) * shade[..., None]


def knit(style: Generator, part: Generator, view: View) -> Image:
    pitch, slope, relief = style.uniform(7, 24), style.uniform(0.4, 1.2), style.uniform(0.3, 0.7)
    color, other, stripes = pigment(style), pigment(style), int(style.integers(0, 8))
    wobble = 0.004 * smooth(part, view.size, min(view.size) / 5)
    column = (view.u + wobble) * pitch
    across = np.abs(column - np.floor(column) - 0.5)
    row = view.v * pitch * 1.3 + across * slope
    tone = wave(row) * np.sqrt(np.clip(1.1 - 2 * across, 0, 1)) + jitter(part, np.floor(row), 0.03)
    striped = (np.floor(row / max(stripes, 1)) % 2 < 1) & (stripes > 3)
    return np.where(striped[..., None], other, color) * (1 - relief + relief * tone)[..., None]


def leather(style: Generator, part: Generator, view: View) -> Image:
    cell, depth, fold = style.uniform(4, 14), style.uniform(0.2, 0.6), style.uniform(0, 0.10)
    color = pigment(style, 0.1, 0.7)
    cell *= min(view.size) / 224
    ridges = np.abs(smooth(part, view.size, cell)) + 0.7 * np.abs(smooth(part, view.size, cell * 0.6))
    tone = np.clip(ridges, 0, 1.2) / 1.2
    shade = 1 - depth + depth * np.sqrt(tone) + fold * 0.5 * smooth(part, view.size, min(view.size) / 3)
    return color * shade[..., None]


def wood(style: Generator, part: Generator, view: View) -> Image:
    rings, warp, streak = style.uniform(4, 22), style.uniform(0.2, 0.9), style.uniform(0.03, 0.15)
    early, late = pigment(style, 0.4, 0.85, 0), pigment(style, 0.15, 0.5, 0)
    early, late = np.sort(early), np.sort(late)  # BGR ascending: brown
    contrast = style.uniform(0.25, 0.8)
    bend = warp * smooth(part, view.size, min(view.size) / 3, 3.0) * 0.5
    phase = view.v * rings + bend + part.uniform()
    saw = phase - np.floor(phase)
    fibre = smooth(part, view.size, 1.5 * min(view.size) / 224, 25.0) * streak
    return mix(early, late, contrast * saw**2) * (1 + fibre)[..., None]


def metal(style: Generator, part: Generator, view: View) -> Image:
    strength, length, sheen = style.uniform(0.01, 0.10), style.uniform(10, 60), style.uniform(0, 0.25)
    color = pigment(style, 0.25, 0.8, 0.8)
    brushed = style.random() < 0.7
    streak = smooth(part, view.size, 1.2 * min(view.size) / 224, length if brushed else 1.5)
    band = sheen * np.cos(view.v * style.uniform(2, 6) + part.uniform(-0.3, 0.3))
    cloud = 0.03 * smooth(part, view.size, min(view.size) / 3)
    return color * (1 + strength * streak + band + cloud)[..., None]


def tile(style: Generator, part: Generator, view: View) -> Image:
    count, joint, bond = style.uniform(2.2, 7), style.uniform(0.03, 0.09), style.choice([0.0, 0.5])
    face, grout, vary = pigment(style), pigment(style, 0.1, 0.8, 0.9), style.uniform(0, 0.08)
    speckle, aspect = style.uniform(0, 0.08), style.choice([1.0, 1.0, 2.0])
    row = np.floor(view.v * count * aspect)
    column = view.u * count + bond * (row % 2)
    x, y = column - np.floor(column), view.v * count * aspect - row
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y) / aspect) - joint / 2
    inside = view.fill(-edge / count)
    tone = 1 + jitter(part, np.floor(column) + 61 * row, vary) + speckle * fractal(part, view.size, 6, 3)
    return mix(grout, np.ones(3, np.float32), inside) * (1 - inside[..., None]) + inside[..., None] * (
        face * tone[..., None]
    )


def speckle(style: Generator, part: Generator, view: View) -> Image:
    base = pigment(style)
    grain = style.uniform(2, 10) * min(view.size) / 224
    image = np.broadcast_to(base, (*view.size, 3)).astype(np.float32)
    for _ in range(3):
        level, hue = style.uniform(0.6, 1.8), pigment(style)
        field = fractal(part, view.size, grain, 2)
        grain *= style.uniform(0.6, 1.3)
        image = image + (hue - image) * np.clip((field - level) * 3, 0, 1)[..., None]
    return image * (1 + 0.02 * white(part, view.size))[..., None]


def carpet(style: Generator, part: Generator, view: View) -> Image:
    color, other = pigment(style), pigment(style)
    grain, strength, share = style.uniform(1.2, 3.5), style.uniform(0.08, 0.3), style.uniform(-1.5, 1.5)
    pile = fractal(part, view.size, grain * min(view.size) / 224, 2)
    patches = np.clip(smooth(part, view.size, grain * 2 * min(view.size) / 224) * 2 + share, 0, 1)
    return mix(color, other, patches) * (1 + strength * pile)[..., None]


def cast(style: Generator, part: Generator, view: View) -> Image:
    """Ground or cast faces: ceramic, ferrite, concrete; cloudy, sometimes with grinding marks and pores."""
    color = pigment(style, 0.15, 0.8, 0.85)
    cloud, marks, pores = style.uniform(0.01, 0.10), style.uniform(-0.05, 0.06), style.uniform(0, 1)
    period, size = style.uniform(20, 80), style.uniform(14, 60) * min(view.size) / 224
    tone = 1 + cloud * fractal(part, view.size, size, 4)
    tone = tone + max(marks, 0) * wave(view.v * period + 0.5 * smooth(part, view.size, 40)) * white(
        part, (view.size[0], 1)
    )
    if pores > 0.6:
        tone = tone - 0.25 * np.clip((smooth(part, view.size, 2.0) - 2.2) * 2, 0, 1)
    return color * (tone + 0.01 * white(part, view.size))[..., None]


def printed(style: Generator, part: Generator, view: View) -> Image:
    """A repeated printed motif: dots, rings, bars, crosses or chevrons on a plain ground."""
    ground, ink = pigment(style, 0.5, 0.95), pigment(style, 0.02, 0.5)
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
    return mix(ground, ink, inked) * (1 + paper * fractal(part, view.size, 5, 3))[..., None]


def mesh(style: Generator, part: Generator, view: View) -> Image:
    count, wire = style.uniform(6, 16), style.uniform(0.15, 0.35)
    metal_color, behind = pigment(style, 0.4, 0.9, 0.7), pigment(style, 0.02, 0.35, 0.7)
    x, y = view.u * count, view.v * count
    dx, dy = np.abs(x - np.rint(x)), np.abs(y - np.rint(y))
    upper = (np.rint(x) + np.rint(y)) % 2 < 1
    shade_x, shade_y = np.clip(1 - (dx / wire * 2) ** 2, 0, 1), np.clip(1 - (dy / wire * 2) ** 2, 0, 1)
    tone = np.where(
        upper & (dx < wire / 2),
        shade_x,
        np.maximum(shade_y * (dy < wire / 2), shade_x * (dx < wire / 2) * 0.8),
    )
    return mix(behind, metal_color, np.sqrt(tone)) * (1 + 0.03 * white(part, view.size))[..., None]


def fabric(style: Generator, part: Generator, view: View) -> Image:
    """Fine cloth close to the camera's limit: yarns of uneven thickness, slubs, a slight bias."""
    pitch, ratio, depth = style.uniform(30, 75), style.uniform(0.8, 1.25), style.uniform(0.08, 0.35)
    uneven, slub, bias = style.uniform(0.02, 0.12), style.uniform(0, 0.12), style.uniform(-0.1, 0.1)
    cloth = pigment(style, 0.15, 0.9, 0.6)
    length = style.uniform(3, 20)
    drift = 0.004 * smooth(part, view.size, min(view.size) / 4)
    i, j = view.u * pitch + bias * view.v * pitch, view.v * pitch * ratio + drift * pitch
    warp, weft = wave(i), wave(j)
    threads = jitter(part, np.floor(i), uneven) * warp + jitter(part, np.floor(j) + 2048, uneven) * weft
    uneven_yarn = (
        slub / 2 * (_slubs(part, np.floor(i), view.v * length) + _slubs(part, np.floor(j), view.u * length))
    )
    tone = 1 - depth + depth * np.maximum(warp, weft) + threads + uneven_yarn
    return cloth * tone[..., None]


def _slubs(part: Generator, thread: Field, along: Field) -> Field:
    """Thickness of each yarn at every pixel: an independent smooth random function along each thread."""
    table = part.standard_normal((64, 128), dtype=np.float32)
    course, row = np.mod(along, 126).astype(np.float32), np.mod(thread, 64).astype(np.float32)
    return np.asarray(cv2.remap(table, course, row, cv2.INTER_LINEAR), np.float32)


def ground(style: Generator, part: Generator, view: View) -> Image:
    """Ground, sintered or cast grey faces under uneven light: pits, faint marks, each with its own shading."""
    base = pigment(style, 0.12, 0.7, 0.9)
    grit, marks, pits = style.uniform(0.01, 0.07), style.uniform(0, 0.06), style.uniform(0, 0.25)
    period, uneven = style.uniform(15, 120), style.uniform(0.01, 0.09)
    tone = 1 + grit * fractal(part, view.size, style.uniform(1.0, 4.0) * min(view.size) / 224, 2)
    lines = jitter(part, np.floor(view.v * period * 2), 1.0) * wave(view.v * period)
    tone = tone + marks * lines * np.clip(0.6 + 0.5 * smooth(part, view.size, min(view.size) / 4), 0, 1.5)
    tone = tone - pits * np.clip(smooth(part, view.size, 2.0) - 1.9, 0, 0.6)
    shading = uneven * smooth(part, view.size, min(view.size) / 1.5)
    return base * (tone * (1 + shading))[..., None]


def corrugated(style: Generator, part: Generator, view: View) -> Image:
    """Ribs, louvres, threads, stacked sheets: parallel bars with a lit and a shaded side."""
    count, duty, relief = style.uniform(6, 36), style.uniform(0.3, 0.8), style.uniform(0.15, 0.7)
    base, groove = pigment(style, 0.25, 0.9, 0.6), pigment(style, 0.03, 0.4, 0.8)
    uneven, sheen = style.uniform(0, 0.05), style.uniform(-0.3, 0.3)
    row = view.v * count + 0.02 * count * uneven * smooth(part, view.size, min(view.size) / 3)
    across = row - np.floor(row) - 0.5
    rib = view.fill((np.abs(across) - duty / 2) / count)
    shade = 1 - relief * (across / duty * 2 + sheen) ** 2 / 2 + jitter(part, np.floor(row), uneven)
    shade = shade * (1 + 0.02 * fractal(part, view.size, 4, 2))
    return mix(groove, np.ones(3, np.float32), rib) * (1 - rib)[..., None] + base * (rib * shade)[..., None]


def foam(style: Generator, part: Generator, view: View) -> Image:
    """Open cells, crumb, aerated or granular matter: bright walls around dark pores, all different."""
    cell, depth = style.uniform(3, 12) * min(view.size) / 224, style.uniform(0.2, 0.7)
    body = pigment(style, 0.3, 0.95, 0.4)
    field = fractal(part, view.size, cell, 2)
    pores = np.clip(field - style.uniform(-0.2, 0.8), 0, 1.2)
    tone = 1 - depth * pores + 0.05 * smooth(part, view.size, cell * 4)
    return body * tone[..., None]


def glazed(style: Generator, part: Generator, view: View) -> Image:
    """Painted, glazed or polished: plain colour, a soft reflection that moves with the part, orange peel."""
    coat, peel = pigment(style, 0.1, 0.95, 0.4), style.uniform(0, 0.02)
    gloss, spread, veins = style.uniform(0, 0.2), style.uniform(0.15, 0.5), style.random() < 0.3
    x, y = part.normal(size=2) * 0.1
    glow = gloss * np.exp(-(((view.u - x) / spread) ** 2 + ((view.v - y) / spread) ** 2))
    tone = 1 + peel * fractal(part, view.size, style.uniform(2, 8), 2) + 0.02 * smooth(part, view.size, 70)
    if veins:  # marble
        streak = np.abs(fractal(part, view.size, style.uniform(25, 70) * min(view.size) / 224, 4))
        tone = tone - style.uniform(0.05, 0.3) * np.clip(1 - streak * 4, 0, 1)
    return coat * tone[..., None] + glow[..., None].astype(np.float32)


Surface = Callable[[Generator, Generator, View], Image]

SURFACES: dict[str, Surface] = {
    "weave": weave, "knit": knit, "leather": leather, "wood": wood, "metal": metal, "tile": tile,
    "speckle": speckle, "carpet": carpet, "cast": cast, "printed": printed, "mesh": mesh, "fabric": fabric,
    "ground": ground, "corrugated": corrugated, "foam": foam, "glazed": glazed,
}  # fmt: skip

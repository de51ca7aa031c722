"""Objects in front of a background: each is a function ``kind(style, part, view) -> (image, coverage)``."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from .canvas import Image, View, bolt_circle, jitter, mix, pigment, polar, skin, wave
from .noise import Field, fractal, smooth


def disc(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    radius, rim, dome = style.uniform(0.25, 0.46), style.uniform(0.01, 0.05), style.uniform(-0.3, 0.3)
    face = skin(style, part, view, pigment(style))
    holes, hole_radius = int(style.integers(0, 6)), style.uniform(0.015, 0.05)
    mark, mark_color = style.integers(0, 3), pigment(style)
    r, _ = polar(view)
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
        coverage = coverage * (1 - bolt_circle(style, view, radius * 0.62, holes, hole_radius))
    return body, coverage


def ring(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    outer = style.uniform(0.28, 0.46)
    inner, bevel = outer * style.uniform(0.35, 0.8), style.uniform(0.1, 0.5)
    face = skin(style, part, view, pigment(style))
    r, theta = polar(view)
    middle = (outer + inner) / 2
    height = 1 - bevel * ((r - middle) / (outer - inner) * 2) ** 2
    gloss = 1 + 0.15 * np.cos(theta - style.uniform(0, 6.28))
    return face * (height * gloss)[..., None], view.fill(np.maximum(r - outer, inner - r))


def gear(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    teeth, radius = int(style.integers(8, 28)), style.uniform(0.28, 0.42)
    depth, bore = style.uniform(0.02, 0.06), style.uniform(0.04, 0.14)
    face = skin(style, part, view, pigment(style, 0.2, 0.85, 0.6))
    spokes, hub = int(style.integers(0, 7)), style.uniform(0.5, 0.65)
    r, theta = polar(view)
    profile = radius + depth * np.clip(2.2 * np.cos(teeth * theta), -1, 1)
    shade = 1 - 0.2 * view.fill(np.abs(r - radius + 2 * depth) - 0.006)
    coverage = view.fill(np.maximum(r - profile, bore - r))
    if spokes > 2:
        coverage = coverage * (1 - bolt_circle(style, view, radius * hub, spokes, radius * 0.14))
    return face * shade[..., None], coverage


def nut(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    sides, radius, bore = int(style.integers(4, 9)), style.uniform(0.25, 0.4), style.uniform(0.35, 0.6)
    face = skin(style, part, view, pigment(style, 0.3, 0.85, 0.7))
    r, theta = polar(view)
    sector = np.pi / sides
    edge = r * np.cos((theta + sector) % (2 * sector) - sector) - radius
    thread = 1 + 0.3 * np.cos(60 * r) * (r < bore * radius + 0.04)
    return face * (thread * (1 - 0.3 * (edge > -0.03)))[..., None], view.fill(
        np.maximum(edge, bore * radius - r)
    )


def capsule(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    length, radius = style.uniform(0.12, 0.3), style.uniform(0.1, 0.19)
    left, right = pigment(style), pigment(style)
    gloss, joint, lettered = style.uniform(0.05, 0.35), style.uniform(-0.08, 0.08), style.random() < 0.4
    ink = pigment(style, 0.02, 0.4)
    d = np.hypot(np.maximum(np.abs(view.u) - length, 0), view.v) - radius
    coat = skin(style, part, view, np.ones(3, np.float32))
    body = mix(left, right, view.fill(joint - view.u)) * coat
    shade = (
        np.sqrt(np.clip(1 - (view.v / radius) ** 2, 0.02, 1)) * (1 - gloss)
        + gloss * np.exp(-(((view.v / radius + 0.45) / 0.18) ** 2)) * 1.5
    )
    body = body * (0.35 + 0.65 * shade - 0.2 * view.fill(np.abs(view.u - joint) - 0.004))[..., None]
    if lettered:
        bars = (wave(view.u * 18) > 0.5) & (np.abs(view.v) < radius * 0.25) & (np.abs(view.u) < length * 0.8)
        body = body + (ink - body) * (0.8 * bars)[..., None].astype(np.float32)
    return body, view.fill(d)


def bottle(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A glass vessel from above: concentric walls, dark depth, highlights."""
    outer, wall = style.uniform(0.3, 0.47), style.uniform(0.05, 0.12)
    glass, inside = pigment(style, 0.05, 0.6, 0.2), pigment(style, 0.02, 0.5, 0.4)
    bands, shine = style.uniform(8, 30), style.uniform(0.1, 0.6)
    light = style.uniform(0, 6.28)
    r, theta = polar(view)
    walls = np.exp(-(((r - outer + wall / 2) / (wall / 2)) ** 2)) + 0.6 * np.exp(
        -(((r - outer * 0.55) / 0.03) ** 2)
    )
    tone = mix(inside, glass, walls) * (1 + 0.25 * np.cos(r * bands * 4))[..., None]
    glints = (
        np.exp(-((np.angle(np.exp(1j * (theta - light - 0.05 * part.normal()))) / 0.4) ** 2)) * walls * shine
    )
    depth = 0.02 * fractal(part, view.size, 20, 2)
    return tone + (glints + depth)[..., None].astype(np.float32), view.fill(r - outer)


def biscuit(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """Baked goods and castings: irregular outline, mottled face, a pattern of dimples; no two alike."""
    radius, ragged = style.uniform(0.28, 0.43), style.uniform(0.0, 0.02)
    color = np.sort(pigment(style, 0.3, 0.75, 0.2))
    mottle, bumps, dimples = style.uniform(0.04, 0.18), style.uniform(3, 14), int(style.integers(0, 9))
    square = style.random() < 0.25
    r, theta = polar(view)
    outline = radius * (
        1 + ragged * sum(part.normal() * np.cos(k * theta + part.uniform(0, 6.28)) for k in range(2, 8))
    )
    extent = np.maximum(np.abs(view.u), np.abs(view.v)) if square else r
    edge = extent - outline
    tone = 1 + mottle * fractal(part, view.size, bumps * min(view.size) / 224, 4) - 0.25 * np.exp(edge / 0.03)
    body = color * tone[..., None]
    if dimples > 2:
        body = body * (1 - 0.4 * bolt_circle(style, view, radius * 0.5, dimples, 0.018))[..., None]
    return body, view.fill(edge)


def board(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A circuit board: traces on a routing grid, pads, chips with pins."""
    lacquer, copper = pigment(style, 0.08, 0.5, 0.2), pigment(style, 0.4, 0.95, 0.3)
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
    body = mix(lacquer, copper, etched) * (1 + 0.02 * fractal(part, view.size, 4, 2))[..., None]
    body = body + (np.float32(0.12) - body) * packaged[..., None]
    edge = np.maximum(np.abs(view.u) - width / 2, np.abs(view.v) - height / 2)
    return body, view.fill(edge)


def connector(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A housing with rows of pins; the pins' positions vary slightly."""
    width, height = style.uniform(0.32, 0.46), style.uniform(0.1, 0.24)
    columns, rows = int(style.integers(4, 14)), int(style.integers(1, 4))
    shell, pin_color = pigment(style, 0.05, 0.6), pigment(style, 0.55, 0.95, 0.5)
    x = (view.u / width * 0.5 + 0.5) * columns
    y = (view.v / height * 0.5 + 0.5) * rows
    wobble = jitter(part, np.floor(x) + 64 * np.floor(y), 0.02)
    dx, dy = (
        (x - np.floor(x) - 0.5 + wobble) * 2 * width / columns,
        (y - np.floor(y) - 0.5) * 2 * height / rows,
    )
    pitch = min(2 * width / columns, 2 * height / rows)
    inside = (np.abs(view.u) < width * 0.97) & (np.abs(view.v) < height * 0.97)
    pin = view.fill(np.maximum(np.abs(dx), np.abs(dy)) - pitch * style.uniform(0.18, 0.32)) * inside
    body = mix(shell, pin_color, pin) * (0.9 + 0.1 * wave(view.v * 3))[..., None]
    edge = np.maximum(np.abs(view.u) - width * 1.04, np.abs(view.v) - height * 1.1)
    return body * skin(style, part, view, np.ones(3, np.float32)), view.fill(edge)


def blister(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """An array of tablets in a tray."""
    columns, rows = int(style.integers(2, 6)), int(style.integers(2, 5))
    tray, tablet = pigment(style, 0.4, 0.9, 0.7), pigment(style, 0.3, 0.98)
    fill, pitch = style.uniform(0.28, 0.42), 0.84 / max(columns, rows)
    x, y = view.u / pitch + columns / 2, view.v / pitch + rows / 2
    i, j = np.floor(x), np.floor(y)
    inside = (i >= 0) & (i < columns) & (j >= 0) & (j < rows)
    cell = i + 64 * j
    r = np.hypot(x - i - 0.5 + jitter(part, cell, 0.02), y - j - 0.5 + jitter(part, cell + 7, 0.02))
    pocket = view.fill((r - fill - 0.06) * pitch) * inside
    pill = view.fill((r - fill) * pitch) * inside
    body = tray * (1 - 0.2 * pocket)[..., None]
    dome = (1.05 - 0.5 * (r / fill) ** 2 + jitter(part, cell + 99, 0.02))[..., None]
    body = body + (tablet * dome - body) * pill[..., None]
    edge = np.maximum(np.abs(view.u) - columns * pitch / 2 - 0.02, np.abs(view.v) - rows * pitch / 2 - 0.02)
    return body, view.fill(edge)


def bracket(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A stamped plate: rounded rectangle minus a slot and holes."""
    width, height, corner = style.uniform(0.22, 0.44), style.uniform(0.12, 0.36), style.uniform(0.01, 0.08)
    face = skin(style, part, view, pigment(style, 0.25, 0.85, 0.6))
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


def screw(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A screw or bolt from the side: head, shank, thread, tip."""
    length, shank = style.uniform(0.3, 0.44), style.uniform(0.035, 0.08)
    head, head_length = shank * style.uniform(1.6, 2.4), style.uniform(0.05, 0.12)
    pitch, flank, tip = style.uniform(18, 45), style.uniform(0.1, 0.3), style.uniform(0.02, 0.2)
    plain, steel = style.uniform(0, 0.5), pigment(style, 0.3, 0.85, 0.7)
    along = view.u + length  # 0 at the head's end
    threaded = along > head_length + plain * length
    phase = view.u * pitch + 0.4 * view.v / shank * 0.5 + part.uniform()
    radius = shank * (1 - flank * threaded * np.abs(2 * (phase - np.floor(phase)) - 1))
    taper = np.clip((2 * length - along) / tip, 0.15, 1)
    body_edge = np.maximum(np.abs(view.v) - radius * taper, np.abs(view.u) - length)
    cap = np.maximum(
        np.abs(view.v) - head * np.clip(0.5 + along / head_length, 0, 1),
        np.abs(along - head_length / 2) - head_length / 2,
    )
    edge = np.minimum(body_edge, cap)
    width = np.where(along < head_length, head, shank)
    shade = np.clip(1.15 - 0.9 * np.abs(view.v / width + 0.25) ** 1.5, 0.15, 1.3)
    ribs = 1 - 0.45 * threaded * wave(phase)
    return skin(style, part, view, steel) * (shade * ribs)[..., None], view.fill(edge)


def cable(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A cable's cross-section: jacket, insulated cores, and strands whose positions differ in every cut."""
    radius, jacket = style.uniform(0.32, 0.46), style.uniform(0.06, 0.16)
    cores, sheath = int(style.integers(1, 5)), pigment(style, 0.05, 0.9)
    filler, copper = pigment(style, 0.1, 0.8, 0.5), np.sort(pigment(style, 0.45, 0.8, 0.2))
    colors = [pigment(style, 0.1, 0.9, 0.2) for _ in range(4)]
    strands = style.uniform(14, 40)
    r, _ = polar(view)
    body = mix(sheath, filler, view.fill(r - radius * (1 - jacket)))
    share = {1: 0.62, 2: 0.42, 3: 0.4, 4: 0.35}[cores] * radius
    ring_radius = 0.0 if cores == 1 else radius * (1 - jacket) - share - 0.01
    lay = 0.05 * part.normal()
    wires = _strands(part, view, strands)
    for core in range(cores):
        a = 2 * np.pi * core / cores + lay
        d = np.hypot(view.u - ring_radius * np.cos(a), view.v - ring_radius * np.sin(a))
        body = mix(body, colors[core], view.fill(d - share))
        inner = view.fill(d - share * 0.68)[..., None]
        body = body + (copper * wires[..., None] - body) * inner
    grain = 1 + 0.03 * fractal(part, view.size, 4, 2)
    return body * grain[..., None], view.fill(r - radius)


def _strands(part: Generator, view: View, count: float) -> Field:
    """Shade of packed round wires at slightly irregular positions: ``count`` per unit of length."""
    turn = part.uniform(0, 1.0)
    x = (np.cos(turn) * view.u + np.sin(turn) * view.v) * count
    y = (np.cos(turn) * view.v - np.sin(turn) * view.u) * count * 1.155
    row = np.floor(y)
    x = x + 0.5 * (row % 2)
    cell = np.floor(x) + 53 * row
    dx, dy = x - np.floor(x) - 0.5 + jitter(part, cell, 0.12), y - row - 0.5 + jitter(part, cell + 7, 0.12)
    shine = 1 + jitter(part, cell + 31, 0.15)
    return np.clip(1.15 - 3.2 * (dx * dx + dy * dy), 0.25, 1.2) * shine


def shell(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """Nuts, seeds, fruit, pebbles: a shaded round body with streaks; outline and markings differ from part to part."""
    radius, aspect = style.uniform(0.24, 0.42), style.uniform(0.75, 1.0)
    base = np.sort(pigment(style, 0.25, 0.7, 0.2))
    streaks, mottle, cap = style.uniform(0, 0.3), style.uniform(0.02, 0.12), style.uniform(0, 0.6)
    ragged, lines = style.uniform(0.0, 0.03), style.uniform(3, 12)
    r, theta = polar(view)
    wobble = sum(part.normal() * np.cos(k * theta + part.uniform(0, 6.28)) / k for k in range(2, 6))
    extent = np.hypot(view.u, view.v / aspect)
    outline = radius * (1 + ragged * wobble)
    depth = np.clip(1 - (extent / outline) ** 2, 0, 1)
    shade = 0.35 + 0.65 * np.sqrt(depth) + 0.15 * (view.u - view.v)
    marks = streaks * wave(theta * lines + 0.7 * smooth(part, view.size, min(view.size) / 6)) * (r / radius)
    tone = shade * (1 - marks) * (1 + mottle * fractal(part, view.size, 7 * min(view.size) / 224, 3))
    crown = view.fill(extent - outline * cap * 0.6) * (cap > 0.25)
    pale = np.clip(base * 1.35, 0, 0.97)
    return mix(base, pale, 0.7 * crown) * tone[..., None], view.fill(extent - outline)


def pill(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """One tablet: round or oblong, bevelled, scored or embossed, speckled coating."""
    radius, oblong = style.uniform(0.2, 0.36), style.choice([0.0, 0.0, 0.12])
    coat, bevel = pigment(style, 0.45, 0.97, 0.4), style.uniform(0.02, 0.08)
    mark, speckles, dots = int(style.integers(0, 4)), style.uniform(0, 0.12), pigment(style, 0.2, 0.7)
    d = np.hypot(np.maximum(np.abs(view.u) - oblong, 0), view.v) - radius
    shade = 1 - 0.45 * np.clip((d + bevel) / bevel, 0, 1) ** 2
    groove = {
        0: np.full(view.size, 9.0, np.float32), 1: np.abs(view.u), 2: np.abs(np.hypot(view.u, view.v) - radius * 0.4),
        3: np.minimum(np.abs(view.u), np.abs(view.v)) + 9.0 * (np.hypot(view.u, view.v) > radius * 0.5),
    }[mark]  # fmt: skip
    shade = shade * (1 - 0.3 * np.exp(-((groove / 0.012) ** 2)))
    freckles = np.clip((smooth(part, view.size, 3 * min(view.size) / 224) - 1.5) * 3, 0, 1) * (
        speckles > 0.05
    )
    body = mix(coat, dots, freckles * 0.7) * (shade * (1 + 0.015 * fractal(part, view.size, 3, 2)))[..., None]
    return body, view.fill(d)


def label(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A printed label: bars, lines of text, a block; the print's position varies slightly."""
    width, height = style.uniform(0.3, 0.46), style.uniform(0.18, 0.38)
    paper, ink, accent = (
        pigment(style, 0.7, 0.98, 0.5),
        pigment(style, 0.02, 0.35, 0.7),
        pigment(style, 0.1, 0.8, 0.2),
    )
    canvas, side = np.zeros((192, 256), np.float32), np.zeros((192, 256), np.float32)
    band = int(style.integers(0, 60))
    cv2.rectangle(side, (0, 0), (256, band), 1.0, -1)
    for row in range(int(style.integers(2, 6))):
        height_px, x = int(style.integers(7, 15)), 10
        for _ in range(int(style.integers(4, 16))):
            glyph = (
                style.integers(0, 3, (int(style.integers(2, 5)), 2, 2))
                * (height_px // 2)
                * np.array([0.7, 1.0])
            )
            for stroke in np.rint((glyph + np.array([x, 66 + row * 24])) * 16).astype(np.int32):
                cv2.polylines(canvas, [stroke], False, 1.0, 1 + (height_px > 11), cv2.LINE_AA, shift=4)
            x += height_px
    if style.random() < 0.6:
        x = int(style.integers(120, 160))
        for _ in range(22):
            thick = int(style.integers(1, 4))
            cv2.rectangle(canvas, (x, 120), (x + thick - 1, 180), 1.0, -1)
            x += thick + int(style.integers(1, 4))
    shift = part.normal(size=2) * 1.2  # tolerance of the print
    map_x = ((view.u / width * 0.5 + 0.5) * 255 + shift[0]).astype(np.float32)
    map_y = ((view.v / height * 0.5 + 0.5) * 191 + shift[1]).astype(np.float32)
    printed, banded = (
        np.asarray(cv2.remap(layer, map_x, map_y, cv2.INTER_LINEAR, borderValue=0), np.float32)
        for layer in (canvas, side)
    )
    body = mix(
        mix(np.broadcast_to(paper, (*view.size, 3)), accent, banded), ink, printed * part.uniform(0.85, 1.0)
    )
    edge = np.maximum(np.abs(view.u) - width, np.abs(view.v) - height)
    return body * (1 + 0.01 * fractal(part, view.size, 4, 2))[..., None], view.fill(edge)


def goblet(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A glass bottom or a turned part under a ring light: rings, radial glints, a dark core."""
    radius, rings = style.uniform(0.34, 0.49), int(style.integers(2, 6))
    glass, dark = pigment(style, 0.15, 0.6, 0.4), pigment(style, 0.01, 0.25, 0.5)
    places, widths = style.uniform(0.15, 1.0, 6), style.uniform(0.01, 0.06, 6)
    glints, sharp, lights = style.uniform(0.2, 0.8), style.uniform(3, 14), int(style.integers(1, 4))
    start, slant = style.uniform(0, 6.28, 4), style.normal(0, 0.1, 6)
    r, theta = polar(view)
    share = r / radius
    body = mix(dark, glass, np.clip(share**2 + 0.1 * np.cos(9 * share), 0, 1))
    sparkle = np.zeros(view.size, np.float32)
    for k in range(rings):
        profile = np.exp(-(((share - places[k]) / widths[k]) ** 2))
        lit = sum(
            np.exp(sharp * (np.cos(theta - start[j] - slant[k] - 0.02 * part.normal()) - 1))
            for j in range(lights)
        )
        sparkle = sparkle + profile * (0.2 + glints * lit)
    rim = np.exp(-(((share - 0.97) / 0.03) ** 2)) * 0.4
    return body + (sparkle + rim)[..., None].astype(np.float32), view.fill(r - radius)


def pins(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """A small component with legs: transistor, relay, plug."""
    width, height = style.uniform(0.14, 0.28), style.uniform(0.12, 0.24)
    legs, leg_length, leg_width = (
        int(style.integers(2, 7)),
        style.uniform(0.1, 0.22),
        style.uniform(0.01, 0.025),
    )
    case, tin, both = pigment(style, 0.04, 0.5, 0.7), pigment(style, 0.5, 0.95, 0.8), style.random() < 0.4
    marking, ink = int(style.integers(0, 3)), pigment(style, 0.6, 0.98, 0.7)
    body_edge = np.maximum(np.abs(view.u) - width, np.abs(view.v) - height)
    y = np.abs(view.v) if both else view.v
    legs_edge = np.full(view.size, 9.0, np.float32)
    for leg in range(legs):
        x = (leg + 0.5) / legs * 2 * width - width + 0.003 * part.normal()
        lean = 0.03 * part.normal() * np.clip(y - height, 0, 1)
        distance = np.maximum(
            np.abs(view.u - x - lean) - leg_width, np.abs(y - height - leg_length / 2) - leg_length / 2
        )
        legs_edge = np.minimum(legs_edge, distance)
    round_leg = tin * (0.75 + 0.4 * wave(view.u / (4 * leg_width)))[..., None]
    face = skin(style, part, view, case) * (1 - 0.3 * view.fill(np.abs(body_edge + 0.02) - 0.006))[..., None]
    if marking:
        text = view.fill(
            np.maximum(np.abs(view.u) - width * 0.6, np.abs(np.abs(view.v) - 0.03 * marking) - 0.008)
        )
        face = mix(face, ink, 0.8 * text * (wave(view.u * 30) > 0.3))
    inside = view.fill(body_edge)[..., None]
    return face * inside + round_leg * (1 - inside), view.fill(np.minimum(body_edge, legs_edge))


def zipper(style: Generator, part: Generator, view: View) -> tuple[Image, Field]:
    """Two rows of interlocked teeth on tape: fills the frame along one axis."""
    pitch, teeth, gap = style.uniform(14, 36), style.uniform(0.05, 0.12), style.uniform(0.1, 0.3)
    tape, metal_color = pigment(style, 0.05, 0.8), pigment(style, 0.3, 0.95, 0.6)
    tape_width, yarn = style.uniform(0.25, 0.45), style.uniform(40, 80)
    phase = view.u * pitch + part.uniform()
    side = np.where(view.v > 0, phase, phase + 0.5)
    k = np.floor(side)
    inside = np.abs(side - k - 0.5) < (1 - gap) / 2
    reach = teeth + jitter(part, k + 100 * (view.v > 0), 0.003)
    tooth = inside * view.fill(np.abs(view.v) - reach)
    shade = 1.1 - 0.6 * np.abs(side - k - 0.5) - 2.0 * np.abs(view.v)
    cloth = tape * (0.85 + 0.15 * wave(view.v * yarn) + 0.05 * smooth(part, view.size, 2.0, 6.0))[..., None]
    body = (
        mix(cloth, np.ones(3, np.float32), tooth) * (1 - tooth)[..., None]
        + metal_color * (tooth * shade)[..., None]
    )
    return body, view.fill(np.abs(view.v) - tape_width)


Object = Callable[[Generator, Generator, View], tuple[Image, Field]]

OBJECTS: dict[str, Object] = {
    "disc": disc, "ring": ring, "gear": gear, "nut": nut, "capsule": capsule, "bottle": bottle,
    "biscuit": biscuit, "board": board, "connector": connector, "blister": blister, "bracket": bracket,
    "screw": screw, "cable": cable, "shell": shell, "pill": pill, "label": label, "goblet": goblet,
    "pins": pins, "zipper": zipper,
}  # fmt: skip

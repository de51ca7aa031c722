"""Pixel coordinates: boxes in a frame, the square that the network sees of a box, and the mapping back."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from .types import MAX_SIDE

Resize = Literal["crop", "stretch"]


class Box(NamedTuple):
    """A region of interest in frame pixels.

    Attributes:
        x, y: the upper left corner; whole numbers unless the box is rotated.
        width, height: in pixels, at least 1.
        angle: degrees clockwise (as seen: y points down) about the box's centre.
    """

    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0


class Window(NamedTuple):
    """Where the network's square lies in a resized box."""

    height: int  # of the resized box
    width: int
    top: int  # of the square inside it
    left: int


@lru_cache(maxsize=1024)
def resize_window(height: int, width: int, size: int, resize: Resize) -> Window:
    """How the original resizes and crops a frame, or a box of it, of ``height`` × ``width`` pixels.

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


def tile_grid(height: int, width: int, tile: int, overlap: float = 0.0) -> tuple[Box, ...]:
    """Square tiles that cover a frame, row by row, evenly spaced from edge to edge.

    Args:
        height, width: of the frame in pixels.
        tile: side of a tile in pixels; a side of the frame that is shorter is covered by one tile of its length.
        overlap: smallest share of a tile that it has in common with its neighbour, 0 ≤ overlap < 1.

    Raises:
        ValueError: a side is not positive, or the overlap is not below 1.
    """
    if min(height, width, tile) < 1 or not 0 <= overlap < 1:
        raise ValueError(
            f"tile_grid takes sides of at least 1 and an overlap from 0 to below 1, "
            f"not {height} x {width}, tiles of {tile}, overlap {overlap}"
        )
    rows, columns = (_tile_starts(side, tile, overlap) for side in (height, width))
    return tuple(Box(x, y, min(tile, width), min(tile, height)) for y in rows for x in columns)


def _tile_starts(side: int, tile: int, overlap: float) -> list[int]:
    steps = math.ceil(max(0, side - tile) / max(1, math.floor(tile * (1 - overlap))))
    return _spread(max(0, side - tile), steps + 1)


def _spread(room: int, count: int) -> list[int]:
    """``count`` whole numbers from 0 to ``room``, evenly spaced."""
    return [round(room * step / max(1, count - 1)) for step in range(count)]


def split_grid(height: int, width: int, rows: int, columns: int, overlap: float = 0.0) -> tuple[Box, ...]:
    """``rows`` × ``columns`` tiles that cover a frame, row by row, evenly spaced from edge to edge.

    They are the smallest squares that cover the frame with this overlap. If the frame is so narrow that squares would
    overlap by more than three quarters, they are the smallest rectangles.

    Args:
        height, width: of the frame in pixels.
        rows, columns: how many tiles lie below and beside each other.
        overlap: smallest share of a tile that it has in common with its neighbour, 0 ≤ overlap < 1 (to a pixel).

    Raises:
        ValueError: a number is not positive, there are more tiles than pixels, or the overlap is not below 1.
    """
    if not (1 <= rows <= height and 1 <= columns <= width) or not 0 <= overlap < 1:
        raise ValueError(
            f"split_grid takes 1 to {height} rows and 1 to {width} columns of a frame of {width} x {height} pixels "
            f"and an overlap from 0 to below 1, not {rows} x {columns} and {overlap}"
        )
    tile_height, tile_width = _least_side(height, rows, overlap), _least_side(width, columns, overlap)
    side = max(tile_height, tile_width)
    if all(_steps_well(length, count, side) for length, count in ((height, rows), (width, columns))):
        tile_height = tile_width = side
    return tuple(
        Box(x, y, tile_width, tile_height)
        for y in _spread(height - tile_height, rows)
        for x in _spread(width - tile_width, columns)
    )


def _steps_well(length: int, count: int, tile: int) -> bool:
    return tile <= length and (length - tile) * 4 >= tile * (count - 1)


def _least_side(length: int, count: int, overlap: float) -> int:
    return math.ceil(length / (1 + (count - 1) * (1 - overlap)))


def check_box(box: Box, height: int, width: int) -> Box:
    """Check that a box can be cut from a frame of ``height`` × ``width`` pixels, and round its sides.

    An upright box must lie inside the frame, and its corner is rounded, too. Of a rotated box only the centre must lie
    inside the frame; the parts outside repeat the frame's edge.

    Returns:
        The box with sides of whole pixels.

    Raises:
        ValueError: the box cannot be cut from the frame.
    """
    box = Box(*box)
    if not all(math.isfinite(value) for value in box):
        raise ValueError(f"{box} has a value that is not finite: correct the recipe's boxes")
    if box.angle % 360 == 0:
        whole = Box(round(box.x), round(box.y), round(box.width), round(box.height))
        if (
            whole.x < 0
            or whole.y < 0
            or min(whole.width, whole.height) < 1
            or whole.x + whole.width > width
            or whole.y + whole.height > height
        ):
            raise ValueError(f"{box} does not lie in the frame of {width} x {height} pixels: correct the box")
        return whole
    box = box._replace(width=round(box.width), height=round(box.height))
    center_x, center_y = box.x + box.width / 2, box.y + box.height / 2
    if not (min(box.width, box.height) >= 1 and max(box.width, box.height) <= MAX_SIDE):
        raise ValueError(f"{box} must have sides of 1 to {MAX_SIDE} pixels: correct the box")
    if not (0 <= center_x <= width and 0 <= center_y <= height):
        raise ValueError(
            f"{box} has its centre outside the frame of {width} x {height} pixels: correct the box"
        )
    return box


@lru_cache(maxsize=1024)
def box_to_frame(box: Box) -> tuple[float, float, float, float, float, float]:
    """``(xx, xy, x0, yx, yy, y0)``: frame x = xx·u + xy·v + x0 and y = yx·u + yy·v + y0 of the box's point (u, v).

    Both systems count in pixels from a corner; the centre of the first pixel is (0.5, 0.5).
    """
    cos, sin = math.cos(math.radians(box.angle)), math.sin(math.radians(box.angle))
    if box.angle % 360 == 0:
        cos, sin = 1.0, 0.0
    center_x, center_y = box.x + box.width / 2, box.y + box.height / 2
    return (
        cos,
        -sin,
        center_x - cos * box.width / 2 + sin * box.height / 2,
        sin,
        cos,
        center_y - sin * box.width / 2 - cos * box.height / 2,
    )


@lru_cache(maxsize=1024)
def frame_to_map(box: Box, size: int, resize: Resize) -> tuple[float, float, float, float, float, float]:
    """``(ux, uy, u0, vx, vy, v0)``: a frame's point (x, y) on the map is (u, v), both from a corner."""
    xx, xy, x0, yx, yy, y0 = box_to_frame(box)  # a rotation: its inverse is its transpose
    window = resize_window(int(box.height), int(box.width), size, resize)
    across, down = window.width / box.width, window.height / box.height
    return (
        across * xx,
        across * yx,
        -across * (xx * x0 + yx * y0) - window.left,
        down * xy,
        down * yy,
        -down * (xy * x0 + yy * y0) - window.top,
    )


def placements(boxes: tuple[Box, ...], size: int, resize: Resize) -> np.ndarray:
    """``frame_to_map`` of every box: float64 [M, 6]."""
    return np.array([frame_to_map(box, size, resize) for box in boxes], np.float64).reshape(-1, 6)

"""The score of an anomaly map, and its regions in frame coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from ...kernels import Box, Summary, Window, components, project, resize_window, summarise
from ...kernels.geometry import box_to_frame, frame_to_map
from ..bundles.bundle import Schema
from ..common.places import place_name
from .views import View

MIN_REGION_FRACTION = 0.0002  # of a view's map: 10 pixels of 224 × 224, less than a twentieth of a patch
MAX_FRAME_MAP_PIXELS = 1 << 21  # of the map of a whole frame that several views' maps are combined into
MAX_REGIONS = 16


class Region(Schema, frozen=True):
    """One connected part of the anomaly map at or above the region level."""

    box: Annotated[tuple[int, int, int, int], Meta(description="x, y, width and height in frame pixels.")]
    place: Annotated[
        str,
        Meta(
            description="The cell of a 3 x 3 grid that holds the centre of the box, for example top left: of the image "
            "that the model saw (the centre square, the stretched frame, or the region or tile in view), to which the "
            "places in the model's sentence refer too."
        ),
    ]
    area_px: Annotated[float, Meta(description="Area in square frame pixels.")]
    peak: Annotated[float, Meta(description="The largest value of the anomaly map inside the region.")]
    view: Annotated[
        str,
        Meta(
            description='The region or tile that place refers to; "" where the frame is inspected as a whole.'
        ),
    ] = ""


def top_mean(anomaly_map: np.ndarray) -> float:
    """Mean of the highest 1 % of a map, float32 [S, S]: an image score that varies less than the maximum."""
    return summarise(anomaly_map).top_mean


def half_way_level(figures: Summary, level: float | None = None) -> float:
    """``level`` if the map reaches it, else the mean of the map's median and peak, which finds its highest part."""
    return (figures.median + figures.peak) / 2 if level is None or figures.peak < level else level


def find_regions(
    anomaly_map: np.ndarray,
    level: float,
    frame_size: tuple[int, int],
    resize: Literal["crop", "stretch"],
    min_area: float | None = None,
) -> tuple[Region, ...]:
    """Connected components of ``map >= level``, highest peak first, without small ones.

    If all of them are small, the one with the highest peak is kept: a map that reaches the level has a region.

    Args:
        anomaly_map: float32 [S, S], or [h, w] if the frame was stretched.
        level: the region level, in the map's values.
        frame_size: (height, width) of the frame in pixels.
        resize: how the frame was fitted to the map.
        min_area: the smallest area of a region in map pixels; 0.02 % of the map when None.

    Returns:
        At most 16 regions; boxes and areas in frame pixels, places in the inspected image.
    """
    rows, columns = anomaly_map.shape
    min_area = MIN_REGION_FRACTION * anomaly_map.size if min_area is None else min_area
    window = resize_window(*frame_size, rows, "crop") if resize == "crop" else Window(rows, columns, 0, 0)
    scale_x, scale_y = frame_size[1] / window.width, frame_size[0] / window.height
    found = components(anomaly_map, level)
    large = [each for each in found if each.area >= min_area]
    regions = []
    for x, y, width, height, area, peak in large or sorted(found, key=lambda each: -each.peak)[:1]:
        left, right = _pixels((x + window.left) * scale_x, (x + width + window.left) * scale_x, frame_size[1])
        top, bottom = _pixels((y + window.top) * scale_y, (y + height + window.top) * scale_y, frame_size[0])
        regions.append(
            Region(
                box=(left, top, right - left, bottom - top),
                place=place_name((y + height / 2) / rows, (x + width / 2) / columns),
                area_px=round(area * scale_x * scale_y, 1),
                peak=peak,
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak)[:MAX_REGIONS])


def _pixels(first: float, last: float, length: int) -> tuple[int, int]:
    """The limits of an interval on a side of ``length`` pixels, in whole pixels; it has at least one pixel."""
    start = min(max(round(first), 0), length - 1)
    return start, min(max(round(last), start + 1), length)


def find_regions_of_views(
    maps: np.ndarray,
    views: Sequence[View],
    level: float | None,
    frame_size: tuple[int, int],
    resize: Literal["crop", "stretch"],
    threads: int = 1,
) -> tuple[Region, ...]:
    """Regions of several views, found in one map of the whole frame, so that a region may extend over several views.

    Where views overlap, their maps are blended, so the map of the frame may stay below a level that a view's map
    reaches. Its regions then begin half way between its own median and peak, so that there is always a region.

    Args:
        maps: float32 [views, S, S], finite.
        views: the views of the maps.
        level: the region level, in the map's values; None for half way between median and peak.
        frame_size, resize: as in ``find_regions``.
        threads: the most CPU threads to use.

    Returns:
        As ``find_regions``, with areas in frame pixels and each place in the view that shows the region best.
    """
    size = maps.shape[1]
    boxes = [view.box for view in views]
    finest = max(size / min(box.width, box.height) for box in boxes)
    scale = min(1, finest, math.sqrt(MAX_FRAME_MAP_PIXELS / (frame_size[0] * frame_size[1])))
    height, width = (max(1, round(scale * side)) for side in frame_size)
    together = project(
        maps, boxes, resize, frame_size, size=(height, width), outside=-math.inf, threads=threads
    )
    peak = float(together.max())
    if peak == -math.inf:  # every view is smaller than a pixel of this map
        highest = int(maps.max(axis=(1, 2)).argmax())
        regions: tuple[Region, ...] = (_whole_view(views[highest], float(maps[highest].max()), frame_size),)
    else:
        if level is None or peak < level:
            level = (float(np.median(together[np.isfinite(together)])) + peak) / 2
        regions = find_regions(together, level, frame_size, "stretch", MIN_REGION_FRACTION * size * size)
    return name_places(regions, views, resize)


def name_places(
    regions: Sequence[Region],
    views: Sequence[View],
    resize: Literal["crop", "stretch"],
    first: int | None = None,
) -> tuple[Region, ...]:
    """Regions in frame pixels, each with its place in a view.

    Args:
        regions: the regions.
        views: the views of the frame.
        resize: how each view was fitted to its map.
        first: index of the view to use for the regions whose centre it shows; the others, or all when None, get the
            view that shows their centre farthest from its edge.
    """
    named = []
    for region in regions:
        x, y, width, height = region.box
        points = [_position(view.box, resize, x + width / 2, y + height / 2) for view in views]
        margins = [min(row, 1 - row, column, 1 - column) for row, column in points]
        best = first if first is not None and margins[first] >= 0 else margins.index(max(margins))
        row, column = (min(max(each, 0.0), 1.0) for each in points[best])
        named.append(msgspec.structs.replace(region, view=views[best].name, place=place_name(row, column)))
    return tuple(named)


def region_in_frame(region: Region, view: View, frame_size: tuple[int, int]) -> Region:
    """A region of a view, in pixels of its box, as a region in pixels of a frame of (height, width) pixels.

    In a rotated view the box of the result is the upright one around the region.
    """
    x, y, width, height = region.box
    xx, xy, x0, yx, yy, y0 = box_to_frame(view.box)
    corners = [(u, v) for u in (x, x + width) for v in (y, y + height)]
    columns = [xx * u + xy * v + x0 for u, v in corners]
    rows = [yx * u + yy * v + y0 for u, v in corners]
    left, right = _pixels(min(columns), max(columns), frame_size[1])
    top, bottom = _pixels(min(rows), max(rows), frame_size[0])
    return msgspec.structs.replace(region, box=(left, top, right - left, bottom - top), view=view.name)


def _position(box: Box, resize: Literal["crop", "stretch"], x: float, y: float) -> tuple[float, float]:
    """A point of the frame in a view's map: row and column, 0..1 inside the map."""
    size = 1 << 10  # any size: the position is relative to it
    ux, uy, u0, vx, vy, v0 = frame_to_map(box, size, resize)
    return (vx * x + vy * y + v0) / size, (ux * x + uy * y + u0) / size


def _whole_view(view: View, peak: float, frame_size: tuple[int, int]) -> Region:
    """A region that covers a view's box, turned boxes as if upright."""
    height, width = frame_size
    left, top = (
        min(max(0, math.floor(view.box.x)), width - 1),
        min(max(0, math.floor(view.box.y)), height - 1),
    )
    right, bottom = min(width, left + int(view.box.width)), min(height, top + int(view.box.height))
    box = (left, top, right - left, bottom - top)
    return Region(box=box, place="center", area_px=float(box[2] * box[3]), peak=peak)

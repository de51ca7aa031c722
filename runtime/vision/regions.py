"""The score of an anomaly map, and its regions in frame coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from ...kernels import Box, Summary, Window, components, project, resize_window, summarise
from ..bundles.bundle import Schema
from ..common.places import place_name

MIN_REGION_FRACTION = 0.0002  # of a view's map: 10 pixels of 224 × 224, less than a twentieth of a patch
MAX_FRAME_MAP_PIXELS = 1 << 21  # of the map of a whole frame that several views' maps are combined into
MAX_REGIONS = 16


class Region(Schema, frozen=True):
    """One connected part of the anomaly map at or above the region level."""

    box: Annotated[tuple[int, int, int, int], Meta(description="x, y, width and height in frame pixels.")]
    place: Annotated[
        str,
        Meta(
            description="The cell of a 3 x 3 grid that holds the centre of the box, for example top left: of the "
            "inspected image, or of the frame where it has several views."
        ),
    ]
    area_px: Annotated[float, Meta(description="Area in square frame pixels.")]
    peak: Annotated[float, Meta(description="The largest value of the anomaly map inside the region.")]


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
    regions = []
    for x, y, width, height, area, peak in components(anomaly_map, level):
        if area < min_area:
            continue
        left, right = round((x + window.left) * scale_x), round((x + width + window.left) * scale_x)
        top, bottom = round((y + window.top) * scale_y), round((y + height + window.top) * scale_y)
        regions.append(
            Region(
                box=(left, top, right - left, bottom - top),
                place=place_name((y + height / 2) / rows, (x + width / 2) / columns),
                area_px=round(area * scale_x * scale_y, 1),
                peak=peak,
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak)[:MAX_REGIONS])


def find_regions_of_views(
    maps: np.ndarray,
    boxes: Sequence[Box],
    level: float,
    frame_size: tuple[int, int],
    resize: Literal["crop", "stretch"],
    threads: int = 1,
) -> tuple[Region, ...]:
    """Regions of several views, found in one map of the whole frame, so that a region may extend over several views.

    Args:
        maps: float32 [views, S, S].
        boxes: the box of each view, in frame pixels.
        level, frame_size, resize: as in ``find_regions``.
        threads: the most CPU threads to use.

    Returns:
        As ``find_regions``, with areas and places in the frame.
    """
    size = maps.shape[1]
    finest = max(size / min(box.width, box.height) for box in boxes)
    scale = min(1, finest, math.sqrt(MAX_FRAME_MAP_PIXELS / (frame_size[0] * frame_size[1])))
    height, width = (max(1, round(scale * side)) for side in frame_size)
    together = project(maps, boxes, resize, frame_size, size=(height, width), threads=threads)
    return find_regions(together, level, frame_size, "stretch", MIN_REGION_FRACTION * size * size)

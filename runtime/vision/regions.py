"""From an anomaly map to what a line needs: a score, regions in the frame, places in the model's words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...kernels import Box, Summary, Window, cell_peaks, components, project, resize_window, summarise
from ..inspection.verdict import Region

# The 3×3 cells of the original's training answers (AnomalyGPT, Gu et al., AAAI 2024), row by row; the limits
# 1/3 and 2/3 belong to the lower cell.
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
_PLACE_WORDS = re.compile(r"\b(?:" + "|".join(sorted(PLACES, key=len, reverse=True)) + r")\b")

MIN_REGION_FRACTION = 0.0002  # of a view's map: 10 pixels of 224 × 224, less than a twentieth of a patch
MAX_FRAME_MAP_PIXELS = 1 << 21  # of several views' maps together
MAX_REGIONS = 16


@dataclass(frozen=True)
class MapReading:
    """A map in the words of an answer: what an answer can be expected to say."""

    score: float
    ranking: tuple[str, ...]  # all nine places, the one with the highest peak first
    places: tuple[str, ...]  # of the regions, strongest first


def read_map(anomaly_map: np.ndarray, score: float, regions: tuple[Region, ...]) -> MapReading:
    """How a map [S, S] ranks the nine places, with its score and its regions' places."""
    peaks = cell_peaks(anomaly_map, 3).ravel().tolist()  # the cells that ``place_name`` names, to a pixel
    order = sorted(range(len(PLACES)), key=lambda cell: -peaks[cell])
    return MapReading(score, tuple(PLACES[cell] for cell in order), tuple(region.place for region in regions))


def top_mean(anomaly_map: np.ndarray) -> float:
    """Mean of the highest 1 % of a map [S, S]: an image score steadier than the maximum."""
    return summarise(anomaly_map).top_mean


def place_name(row: float, column: float) -> str:
    """The cell's name for a point of the image, both coordinates in 0..1."""
    return PLACES[3 * _third(row) + _third(column)]


def named_places(sentence: str) -> list[str]:
    """Places that an answer names, in order ("… at the top left and bottom of the image.")."""
    return list(dict.fromkeys(_PLACE_WORDS.findall(sentence)))


def half_way_level(figures: Summary, level: float | None = None) -> float:
    """Half way between a map's median and its peak, which shows where, unless ``level`` is one that it reaches."""
    return (figures.median + figures.peak) / 2 if level is None or figures.peak < level else level


def find_regions(
    anomaly_map: np.ndarray,
    level: float,
    frame_size: tuple[int, int],
    resize: Literal["crop", "stretch"],
    min_area: float | None = None,
) -> tuple[Region, ...]:
    """Connected components of ``map >= level``, highest peak first, specks left out.

    Args:
        anomaly_map: float32 [S, S]; of another shape [h, w] only where the frame was stretched.
        level: the operating level, in the map's own values.
        frame_size: (height, width) of the frame in pixels.
        resize: how the frame was fitted to the map.
        min_area: pixels of the map below which a component is a speck; 0.02 % of the map when None.

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
    """``find_regions`` of several views, laid over the frame together: what crosses a seam is one region.

    Args:
        maps: float32 [views, S, S].
        boxes: of the frame that they show.
        level, frame_size, resize: as there; areas and places are the frame's.
        threads: at most this many.
    """
    size = maps.shape[1]
    finest = max(size / min(box.width, box.height) for box in boxes)
    scale = min(1, finest, math.sqrt(MAX_FRAME_MAP_PIXELS / (frame_size[0] * frame_size[1])))
    height, width = (max(1, round(scale * side)) for side in frame_size)
    together = project(maps, boxes, resize, frame_size, size=(height, width), threads=threads)
    return find_regions(together, level, frame_size, "stretch", MIN_REGION_FRACTION * size * size)


def places_agree(sentence: str, regions: tuple[Region, ...]) -> bool | None:
    """Whether the sentence names the place of some region; None when it names no place."""
    places = named_places(sentence)
    return any(region.place in places for region in regions) if places else None


def _third(x: float) -> int:
    return 0 if x <= 1 / 3 else 1 if x <= 2 / 3 else 2

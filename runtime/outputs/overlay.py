"""The overlay of a verdict: the frame, the frame with its anomaly map and regions, and a caption."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ...kernels import summarise
from ..common.errors import AgptError
from ..common.files import write_whole
from ..common.printable import printable
from ..inspection.verdict import Region, Status, Verdict
from ..vision.regions import half_way_level

PANE_SIDE = 480  # longest side of each of the two pictures, px
MARGIN = 12
CAPTION_HEIGHT = 80

# The "up" filter compresses photographs better and faster than OpenCV's default; OpenCV 4 does not offer it.
PNG_OPTIONS = (
    [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    if hasattr(cv2, "IMWRITE_PNG_FILTER")
    else []
)

Color = tuple[int, int, int]  # BGR
BACKGROUND: Color = (30, 26, 24)
INK: Color = (245, 245, 245)
FAINT_INK: Color = (170, 165, 160)
DARK_INK: Color = (20, 16, 14)
STATUS_COLORS: dict[Status, Color] = {
    Status.PASS: (110, 200, 80),
    Status.FAIL: (80, 80, 240),
    Status.NO_RESULT: (60, 180, 245),
}
MAX_OPACITY = 0.55
DIMMING = 0.6  # opacity of the background colour outside the inspected area
HEAT_FROM, HEAT_FULL = 0.7, 1.8  # multiples of the region level: heat from 0 to its maximum


def draw_overlay(
    frame: np.ndarray | None, verdict: Verdict, note: str = "", level: float | None = None
) -> np.ndarray:
    """Draw one part's verdict.

    Args:
        frame: uint8 [H, W, 3] BGR; None when no usable frame arrived.
        verdict: the verdict about it.
        note: a line in small letters under the sentence (part, product, time).
        level: the region level, which the heat's scale is relative to (``half_way_level`` for a FAIL that does not
            reach it). None scales each map to its own range, as AnomalyGPT does.

    Returns:
        uint8 [h, w, 3] BGR.
    """
    scene = np.full((PANE_SIDE * 3 // 4, PANE_SIDE, 3), 48, np.uint8) if frame is None else frame
    plain = _fit(scene)
    heated = plain
    if frame is not None and verdict.anomaly_map is not None:
        if level is not None and verdict.status is Status.FAIL:
            level = half_way_level(summarise(verdict.anomaly_map), level)
        heated = _heat(plain, verdict.map_in_frame(outside=np.nan, size=plain.shape[:2]), level)
        scale = heated.shape[1] / frame.shape[1]
        _outline_views(heated, verdict, scale)
        _mark_regions(heated, verdict.regions, scale)
    height, width = plain.shape[:2]
    canvas = np.full((height + CAPTION_HEIGHT + 2 * MARGIN, 2 * width + 3 * MARGIN, 3), BACKGROUND, np.uint8)
    canvas[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = plain
    canvas[MARGIN : MARGIN + height, 2 * MARGIN + width : 2 * (MARGIN + width)] = heated
    _caption(canvas, MARGIN + height, verdict, note)
    return canvas


def _fit(image: np.ndarray) -> np.ndarray:
    """A copy of the image whose longer side is ``PANE_SIDE``."""
    height, width = image.shape[:2]
    scale = PANE_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _heat(image: np.ndarray, anomaly_map: np.ndarray, level: float | None) -> np.ndarray:
    """Blend the map over the image, from yellow to deep red for high values; NaN (not inspected) is dimmed.

    Args:
        image: uint8 [h, w, 3] BGR.
        anomaly_map: float32 [h, w].
        level: as in ``draw_overlay``.
    """
    inspected = np.isfinite(anomaly_map)
    if not inspected.any():
        low, high = 0.0, 1.0
    elif level is None:
        low, high = float(anomaly_map[inspected].min()), float(anomaly_map[inspected].max())
    else:
        low, high = HEAT_FROM * level, HEAT_FULL * level
    strength = np.clip((np.nan_to_num(anomaly_map) - low) / max(high - low, 1e-6), 0, 1)
    tint = _heat_colors()[(strength * 255).astype(np.uint8)]
    opacity = np.where(inspected, MAX_OPACITY * strength**0.75, DIMMING)[..., None]
    tint[~inspected] = BACKGROUND
    return (image * (1 - opacity) + tint * opacity).astype(np.uint8)


@lru_cache(maxsize=1)
def _heat_colors() -> np.ndarray:
    """The warm half of OpenCV's turbo colour map, uint8 [256, 3] BGR."""
    warm = np.linspace(150, 240, 256).astype(np.uint8)
    return cv2.applyColorMap(warm[None], cv2.COLORMAP_TURBO)[0]


def _outline_views(image: np.ndarray, verdict: Verdict, scale: float) -> None:
    """Outline each view with status FAIL by a thin line."""
    for view in verdict.views:
        if view.status == Status.FAIL:
            x, y, width, height, angle = view.box
            corners = cv2.boxPoints(((x + width / 2, y + height / 2), (width, height), angle))
            outline = np.rint(corners * scale).astype(np.int32)
            cv2.polylines(image, [outline], True, STATUS_COLORS[Status.FAIL], 1, cv2.LINE_AA)


def _mark_regions(image: np.ndarray, regions: list[Region] | tuple[Region, ...], scale: float) -> None:
    """Outline each region and label it with its place; ``scale`` is pane pixels per frame pixel."""
    for region in regions:
        x, y, width, height = (round(side * scale) for side in region.box)
        for thickness, color in ((4, DARK_INK), (2, INK)):
            cv2.rectangle(image, (x, y), (x + width, y + height), color, thickness, cv2.LINE_AA)
        _label(image, (x, y), region.place)


def _label(image: np.ndarray, corner: tuple[int, int], text: str) -> None:
    """Write a text on a small plate above a box's upper left corner, inside the image."""
    width, height = _text_width(text, 14) + 10, 20
    x = int(np.clip(corner[0] - 1, 0, max(0, image.shape[1] - width)))
    y = int(np.clip(corner[1] - height - 1, 0, max(0, image.shape[0] - height)))
    cv2.rectangle(image, (x, y), (x + width, y + height), INK, cv2.FILLED)
    _write(image, (x + 5, y + 15), text, 14, DARK_INK)


def _caption(canvas: np.ndarray, top: int, verdict: Verdict, note: str) -> None:
    """Write status, headline, note and figures below the panes, whose lower edge is at row ``top``."""
    status = verdict.status.value.replace("_", " ")
    plate_width = _text_width(status, 22, bold=True) + 28
    left, upper = MARGIN, top + MARGIN
    color = STATUS_COLORS[verdict.status]
    cv2.rectangle(canvas, (left, upper), (left + plate_width, upper + 40), color, cv2.FILLED)
    _write(canvas, (left + 14, upper + 28), status, 22, DARK_INK, bold=True)
    text_left = left + plate_width + 16
    lines = _wrap(headline(verdict), 18, canvas.shape[1] - MARGIN - text_left)
    for row, line in enumerate(lines):
        _write(canvas, (text_left, upper + 33 - 7 * len(lines) + 22 * row), line, 18, INK)
    details = "  |  ".join(part for part in (note, *_figures(verdict)) if part)
    _write(canvas, (left, upper + 70), _cut(details, 15, canvas.shape[1] - 2 * MARGIN), 15, FAINT_INK)


def headline(verdict: Verdict) -> str:
    """The sentence to show: the model's, or the reason if there is none, for NO_RESULT, or for a contradiction."""
    if not verdict.sentence or verdict.status == Status.NO_RESULT or verdict.contradiction:
        return printable(verdict.reason)
    return printable(f"{verdict.view}: {verdict.sentence}" if verdict.view else verdict.sentence)


def _figures(verdict: Verdict) -> list[str]:
    """The verdict's numbers and remarks for the caption."""
    figures = []
    if verdict.p_anomaly is not None and np.isfinite(verdict.p_anomaly):
        figures.append(f"p(anomaly) {verdict.p_anomaly:.3f}")
    if verdict.score is not None and np.isfinite(verdict.score):
        figures.append(f"map score {verdict.score:.3f}")
    if nearest := verdict.nearest_normal:
        place = f"{nearest.view}, {nearest.place}" if nearest.view else nearest.place
        figures.append(f"nearest normal: sample {nearest.sample}, {place}")
    if verdict.agreement is False:
        figures.append("sentence and map disagree")
    return figures


def _wrap(text: str, size: int, room: int) -> list[str]:
    """Wrap a text into at most two lines of ``room`` pixels; the second one is cut if necessary."""
    words = text.split()
    fitting = next((n for n in range(len(words), 0, -1) if _text_width(" ".join(words[:n]), size) <= room), 0)
    lines = [" ".join(words[:fitting]), _cut(" ".join(words[fitting:]), size, room)]
    return [line for line in lines if line]


def _cut(text: str, size: int, room: int) -> str:
    """Shorten a text to ``room`` pixels, with an ellipsis."""
    if _text_width(text, size) <= room:
        return text
    while text and _text_width(text + "...", size) > room:
        text = text[:-4]
    return text + "..."


# OpenCV 5 draws TrueType fonts and contains one; OpenCV 4 has the Hershey stroke fonts.
@lru_cache(maxsize=1)
def _font() -> Any:
    return cv2.FontFace("sans") if hasattr(cv2, "FontFace") else None


def _write(
    image: np.ndarray, origin: tuple[int, int], text: str, size: int, color: Color, bold: bool = False
) -> None:
    """Write a line of text; ``origin`` is the left end of its baseline, ``size`` the height of the letters in px."""
    text = printable(text)  # OpenCV crashes on a lone surrogate
    if _font() is not None:
        cv2.putText(image, text, origin, color, _font(), size, 700 if bold else 400)
    else:
        weight = 2 if bold else 1
        cv2.putText(image, text, origin, cv2.FONT_HERSHEY_SIMPLEX, size / 34, color, weight, cv2.LINE_AA)


def _text_width(text: str, size: int, bold: bool = False) -> int:
    """Width of a text in px."""
    text = printable(text)
    if _font() is not None:
        return int(cv2.getTextSize((0, 0), text, (0, 0), _font(), size, 700 if bold else 400)[2])
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size / 34, 2 if bold else 1)[0][0])


def overlay_name(sequence: int, part_id: str) -> str:
    """The file name of a part's overlay. The id is untrusted, so characters that could form a path are replaced."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", part_id).strip("._")[:80]
    return f"{sequence:05d}_{safe or 'part'}.png"


class OverlayFolder:
    """Writes overlays as PNG files, each whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            AgptError: the folder cannot be made.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(".*.png.partial"):  # of a run that was killed
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise AgptError(
                f"cannot make {folder} ({error.strerror}): choose another --out folder"
            ) from error

    def put(self, name: str, image: np.ndarray) -> None:
        """Raises AgptError when the image cannot be encoded or written."""
        encoded, data = cv2.imencode(".png", image, PNG_OPTIONS)
        if not encoded:
            raise AgptError(f"cannot encode {name} as PNG: report the frame's size {image.shape}")
        write_whole(self.folder / name, data.tobytes(), flush=False)

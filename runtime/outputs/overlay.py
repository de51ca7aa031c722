"""The overlay of a verdict: the frame with its regions, the anomaly map with its colour scale, and a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np

from ...kernels.geometry import box_to_frame
from ..common.errors import AgptError
from ..common.files import write_whole
from ..common.printable import printable
from ..inspection.verdict import Region, Status, Verdict
from ..vision.views import describe_share

PANE_SIDE = 480  # longest side of each of the two pictures, px; twice as much for long frames
LONG = 2.0  # ratio of a frame's sides from which on it is long
MIN_WIDTH = 640  # of the overlay, px, so that the caption has room
MARGIN = 12
LABEL_WIDTH = 200  # room for the labels of a frame that is narrower, px
MAX_NAMED_VIEWS = 6
LEGEND_HEIGHT = 44
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
UNSEEN: Color = (72, 68, 66)  # stripes of the map where nothing was inspected
STATUS_COLORS: dict[Status, Color] = {
    Status.PASS: (110, 200, 80),
    Status.FAIL: (80, 80, 240),
    Status.NO_RESULT: (60, 180, 245),
}
DIMMING = 0.6  # opacity of the background colour over the part of the frame that was not inspected

# The colour scale of maps: from 0 to the limit calm colours, from there to twice the limit alarm colours. Raw maps,
# 0 to 1, have only the calm ones.
CALM: tuple[Color, ...] = ((46, 36, 30), (96, 62, 40), (150, 104, 52), (178, 158, 96))
ALARM: tuple[Color, ...] = ((70, 215, 255), (20, 130, 255), (40, 30, 225), (60, 0, 140))
STEPS = 128  # colours of each half
JUST_BELOW = 1 - 1e-4
BELOW_LIMIT = "map below the limit"


def draw_overlay(frame: np.ndarray | None, verdict: Verdict, note: str = "") -> np.ndarray:
    """Draw one part's verdict.

    The colours of the map depend on ``verdict.limit`` alone, so they mean the same for every part of a recipe. Alarm
    colours are values from the limit on in views whose score is over the limit; elsewhere single pixels over it have
    the highest calm colour. A rejected part whose score is not over the limit has its highest region outlined.

    Args:
        frame: uint8 [H, W, 3] BGR; None when no usable frame arrived.
        verdict: the verdict about it.
        note: a line in small letters under the sentence (part, product, time).

    Returns:
        uint8 [h, w, 3] BGR.
    """
    scene = np.full((PANE_SIDE * 3 // 4, PANE_SIDE, 3), 48, np.uint8) if frame is None else frame
    marked = _fit(scene)
    height, width = marked.shape[:2]
    shown = np.full((height, width), np.nan, np.float32)
    if frame is not None and verdict.maps is not None:
        shown = calmed(verdict).map_in_frame(outside=np.nan, size=(height, width))
        unseen = ~np.isfinite(shown)
        marked[unseen] = (marked[unseen] * (1 - DIMMING) + np.array(BACKGROUND) * DIMMING).astype(np.uint8)
    pane = _map_pane(shown, verdict.limit)
    if frame is not None and verdict.maps is not None:
        scale = width / frame.shape[1]
        for picture in (marked, pane):
            _outline_views(picture, verdict, scale)
        _name_views(pane, verdict, scale)
        regions = verdict.regions
        if is_below_limit(verdict):  # the highest region of the view that decides
            regions = tuple(region for region in regions if region.view == verdict.view)[:1] or regions[:1]
        _outline_regions(marked, regions, scale)
        _outline_regions(pane, regions, scale)
    below = width > LONG * height
    gap = (
        MARGIN if below or width >= LABEL_WIDTH else LABEL_WIDTH
    )  # beside a narrow frame there is room for labels
    left, top = (MARGIN, 2 * MARGIN + height) if below else (MARGIN + width + gap, MARGIN)
    bottom = top + height
    canvas_width = max(left + width + MARGIN, MIN_WIDTH)
    canvas = np.full(
        (bottom + LEGEND_HEIGHT + CAPTION_HEIGHT + MARGIN, canvas_width, 3), BACKGROUND, np.uint8
    )
    canvas[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = marked
    canvas[top : top + height, left : left + width] = pane
    if frame is not None and verdict.maps is not None:
        beside = canvas[MARGIN : MARGIN + height, MARGIN : MARGIN + width + (0 if below else gap - MARGIN)]
        _label_regions(beside, regions, scale, BELOW_LIMIT if is_below_limit(verdict) else "")
    details = [note, *_figures(verdict)]
    if verdict.maps is not None:
        apart = left + width == canvas_width - MARGIN and not below
        _legend(canvas, (left if apart else MARGIN, bottom + 10), canvas_width - MARGIN, verdict.limit)
        if verdict.unseen and apart:
            text = _cut(unseen_text(verdict.unseen), 15, width)
            _write(canvas, (MARGIN, bottom + 26), text, 15, STATUS_COLORS[Status.NO_RESULT])
        elif verdict.unseen:
            details.insert(1, unseen_text(verdict.unseen))
    _caption(canvas, bottom + LEGEND_HEIGHT - MARGIN, verdict, details)
    return canvas


def is_below_limit(verdict: Verdict) -> bool:
    """Whether a part is rejected although its map score is not over the limit."""
    limit, score = verdict.limit, verdict.score
    return verdict.status is Status.FAIL and limit is not None and score is not None and score <= limit


def calmed(verdict: Verdict) -> Verdict:
    """The verdict with maps that reach the limit only in views whose score is over the limit."""
    if verdict.limit is None or verdict.maps is None:
        return verdict
    scores = [view.score for view in verdict.views] or [verdict.score]
    alarming = np.array([score is not None and score > verdict.limit for score in scores])
    highest = np.where(alarming, np.inf, verdict.limit * JUST_BELOW).astype(np.float32)
    return msgspec.structs.replace(verdict, maps=np.minimum(verdict.maps, highest[:, None, None]))


def _fit(image: np.ndarray) -> np.ndarray:
    """A copy of the image whose longer side is ``PANE_SIDE``, or twice that if it is ``LONG``."""
    height, width = image.shape[:2]
    side = 2 * PANE_SIDE if max(height, width) > LONG * min(height, width) else PANE_SIDE
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


@lru_cache(maxsize=1)
def scale_colors() -> np.ndarray:
    """The colours of the scale, uint8 [2 * STEPS, 3] BGR: calm ones, then alarm ones."""
    halves = []
    for colors in (CALM, ALARM):
        positions = np.linspace(0, STEPS - 1, len(colors))
        channels = [np.interp(np.arange(STEPS), positions, channel) for channel in zip(*colors, strict=True)]
        halves.append(np.stack(channels, axis=1).round().astype(np.uint8))
    return np.concatenate(halves)


def color_steps(values: np.ndarray, limit: float | None) -> np.ndarray:
    """The indices in ``scale_colors`` of a map's finite values, as an integer array of the same shape."""
    if limit is None:
        return np.clip(values * STEPS, 0, STEPS - 1).astype(np.intp)
    steps = np.clip(values / limit * STEPS, 0, 2 * STEPS - 1).astype(np.intp)
    return np.where(values < limit, np.minimum(steps, STEPS - 1), np.maximum(steps, STEPS))


def _map_pane(anomaly_map: np.ndarray, limit: float | None) -> np.ndarray:
    """The map in the colours of the scale, uint8 [h, w, 3] BGR; striped where it is NaN (not inspected)."""
    inspected = np.isfinite(anomaly_map)
    pane = scale_colors()[color_steps(np.where(inspected, anomaly_map, 0), limit)]
    rows, columns = np.ogrid[: pane.shape[0], : pane.shape[1]]
    pane[~inspected] = BACKGROUND
    pane[~inspected & ((rows + columns) % 12 < 2)] = UNSEEN
    return pane


def _legend(canvas: np.ndarray, corner: tuple[int, int], right: int, limit: float | None) -> None:
    """Draw the colour scale from ``corner`` (its upper left) to column ``right``, with its values."""
    left, top = corner
    num_steps = STEPS if limit is None else 2 * STEPS
    width = max(1, right - left)
    steps = np.arange(width) * num_steps // width
    canvas[top : top + 10, left:right] = scale_colors()[steps]
    if limit is None:
        marks, note = [(0.0, "0"), (1.0, "1")], "raw map, without a limit"
    else:
        marks = [(0.0, "0"), (0.5, f"limit {limit:.2f}"), (1.0, f"{2 * limit:.2f}")]
        note = ""
        if limit > 1:
            marks.insert(1, (0.5 / limit, "1 = good parts"))
    taken = left - 10
    for position, text in marks:
        x, length = left + round(position * (width - 1)), _text_width(text, 13)
        start = int(np.clip(x - length / 2, left, max(left, right - length)))
        cv2.line(canvas, (x, top), (x, top + 13), INK, 1)
        if start > taken + 8 and start + length <= canvas.shape[1]:
            _write(canvas, (start, top + 26), text, 13, FAINT_INK)
            taken = start + length
    if note and (start := left + (width - _text_width(note, 13)) // 2) > left + 20:
        _write(canvas, (start, top + 26), note, 13, FAINT_INK)


def _outline_views(image: np.ndarray, verdict: Verdict, scale: float) -> None:
    """Outline each view with status FAIL by a thin line."""
    for view in verdict.views:
        if view.status == Status.FAIL:
            x, y, width, height, angle = view.box
            corners = cv2.boxPoints(((x + width / 2, y + height / 2), (width, height), angle))
            outline = np.rint(corners * scale).astype(np.int32)
            cv2.polylines(image, [outline], True, STATUS_COLORS[Status.FAIL], 1, cv2.LINE_AA)


def _name_views(image: np.ndarray, verdict: Verdict, scale: float) -> None:
    """Write the names of views into their upper left corners, where there is room: of failing ones, or of a few."""
    for view in verdict.views:
        if view.status != Status.FAIL and len(verdict.views) > MAX_NAMED_VIEWS:
            continue
        if _text_width(view.name, 12) + 12 <= view.box.width * scale and view.box.height * scale >= 24:
            xx, xy, x0, yx, yy, y0 = box_to_frame(view.box)
            u, v = 6 / scale, 16 / scale
            corner = (round((xx * u + xy * v + x0) * scale), round((yx * u + yy * v + y0) * scale))
            _write(image, corner, view.name, 12, INK)


def _outline_regions(image: np.ndarray, regions: Sequence[Region], scale: float) -> None:
    """Outline each region; ``scale`` is pane pixels per frame pixel."""
    for region in regions:
        x, y, width, height = (round(side * scale) for side in region.box)
        for thickness, color in ((4, DARK_INK), (2, INK)):
            cv2.rectangle(image, (x, y), (x + width, y + height), color, thickness, cv2.LINE_AA)


def _label_regions(image: np.ndarray, regions: Sequence[Region], scale: float, remark: str) -> None:
    """Label each region with its place on a small plate, beside all regions and earlier plates where possible."""
    boxes = [_Rectangle(*(round(side * scale) for side in region.box)) for region in regions]
    taken = list(boxes)
    for region, box in zip(regions, boxes, strict=True):
        text = f"{region.view}: {region.place}" if region.view else region.place
        text = _cut(f"{text}, {remark}" if remark else text, 14, image.shape[1] - 10)
        width, height = _text_width(text, 14) + 10, 20
        places = (
            (box.x - 1, box.y - height - 1),
            (box.x - 1, box.y + box.height + 2),
            (box.x + box.width + 4, box.y),
            (box.x - width - 4, box.y),
            (box.x - 1, box.y - 2 * height - 3),
        )
        candidates = [
            _Rectangle(
                int(np.clip(x, 0, max(0, image.shape[1] - width - 1))),
                int(np.clip(y, 0, max(0, image.shape[0] - height - 1))),
                width,
                height,
            )
            for x, y in places
        ]
        free = (each for each in candidates if not any(each.overlaps(other) for other in taken))
        x, y, width, height = plate = next(free, candidates[0])
        taken.append(plate)
        cv2.rectangle(image, (x, y), (x + width, y + height), INK, cv2.FILLED)
        _write(image, (x + 5, y + 15), text, 14, DARK_INK)


class _Rectangle(NamedTuple):
    x: int
    y: int
    width: int
    height: int

    def overlaps(self, other: _Rectangle) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def _caption(canvas: np.ndarray, top: int, verdict: Verdict, details: Sequence[str]) -> None:
    """Write status, headline and details (note, figures) below row ``top``."""
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
    line = "  |  ".join(part for part in details if part)
    _write(canvas, (left, upper + 70), _cut(line, 15, canvas.shape[1] - 2 * MARGIN), 15, FAINT_INK)


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
    if text := map_score(verdict):
        figures.append(text)
    if verdict.agreement is False:
        figures.append("sentence and map name different places")
    if nearest := verdict.nearest_normal:
        place = f"{nearest.view}, {nearest.place}" if nearest.view else nearest.place
        figures.append(f"nearest normal: sample {nearest.sample}, {place}")
    return figures


def map_score(verdict: Verdict) -> str:
    """The map score with the limit that it is compared with; "" if there is none."""
    score, limit = verdict.score, verdict.limit
    if score is None or not np.isfinite(score):
        return ""
    if limit is None:
        return f"raw map score {score:.3f}"
    return f"map score {score:.2f}, limit {limit:.2f}"


def unseen_text(share: float) -> str:
    """The remark that a share of the frame, 0..1, was not inspected."""
    return f"{describe_share(share)} of the frame is not inspected"


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

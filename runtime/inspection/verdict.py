"""What an inspection says about one frame."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from ...kernels import Box, project
from .budget import Rung

DecidedBy = Literal["answer", "operating point", "map"]


class Status(str, Enum):
    """PASS and FAIL are the language model's word, or the recipe's; NO_RESULT is everything else, never a PASS."""

    PASS = "PASS"
    FAIL = "FAIL"
    NO_RESULT = "NO_RESULT"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Region:
    """One connected part of the anomaly map at or above the operating level."""

    box: tuple[int, int, int, int]  # x, y, width, height in frame pixels
    place: str  # the 3×3 cell of the inspected image ("top left") in the model's words; of several views, the frame's
    area_px: float  # in frame pixels
    peak: float  # the map's largest value inside


@dataclass(frozen=True)
class Likeness:
    """The spot of a normal sample that the most anomalous patch is most like."""

    sample: int  # in the order in which they were enrolled, from 1
    view: str  # the sample's region or tile; "" for the whole frame
    place: str  # of the patch in it, in the model's words
    patch: tuple[int, int]  # its row and column there, from 0


@dataclass(frozen=True, eq=False)
class ViewResult:
    """What one of several views showed and was answered; see ``Verdict`` for what is not said here.

    Attributes:
        name: of the region or tile.
        box: in frame pixels.
        anomaly_map: float32 [S, S], of the box.
        regions: of the box, in its own pixels and places.
        status, p_anomaly, sentence: None and "" until it is judged.
    """

    name: str
    box: Box
    anomaly_map: np.ndarray
    score: float
    peak: float
    regions: tuple[Region, ...]
    status: Status | None = None
    p_anomaly: float | None = None
    sentence: str = ""


@dataclass(frozen=True, eq=False)
class Verdict:
    """Result of ``Inspector.inspect``.

    Attributes:
        status: PASS, FAIL or NO_RESULT.
        reason: why, in a few words; for NO_RESULT what went wrong.
        p_anomaly: probability of the affirmative first answer token against the negative one, 0..1.
        sentence: the model's answer; of several views that of ``view``.
        anomaly_map: float32 [S, S], what the model saw, of ``view``; larger = more anomalous.
        score: mean of the map's highest 1 %; of several views the highest.
        peak: the map's maximum; of several views the highest.
        regions: in the frame, highest peak first.
        agreement: whether a place that the sentence names is a region's place; None when it names none.
        decided_by: "answer" (the greedy one), the recipe's "operating point" of p(anomaly), or "map", where there
            was no time for an answer; None for NO_RESULT.
        contradiction: the sentence says the other thing.
        timings_ms: milliseconds per stage, in order.
        rung: how far the inspection came: "sentence", "verdict", "map" or "none".
        costs_ms: what each stage was expected to cost: a high percentile of its last durations.
        frame_size: (height, width) of the frame in pixels.
        resize: how the frame, or each view, was fitted to its map ("crop" or "stretch").
        view: the region or tile that decides: the most anomalous of those with the verdict; "" for the whole frame.
        most_like: what the most anomalous patch of ``view`` was compared with; None for a PASS, and zero-shot.
        views: each of them; empty where frames are looked at as a whole.

    What was not reached before a NO_RESULT is None or empty.
    """

    status: Status
    reason: str
    frame_size: tuple[int, int]
    resize: Literal["crop", "stretch"]
    p_anomaly: float | None = None
    sentence: str = ""
    anomaly_map: np.ndarray | None = None
    score: float | None = None
    peak: float | None = None
    regions: tuple[Region, ...] = ()
    agreement: bool | None = None
    decided_by: DecidedBy | None = None
    contradiction: bool = False
    timings_ms: dict[str, float] = field(default_factory=dict)
    rung: Rung = "none"
    costs_ms: dict[str, float] = field(default_factory=dict)
    view: str = ""
    views: tuple[ViewResult, ...] = ()
    most_like: Likeness | None = None

    def map_in_frame(self, outside: float = 0.0, size: tuple[int, int] | None = None) -> np.ndarray:
        """The anomaly map over the frame, those of several views blended: float32 [H, W], bilinear.

        What no view shows and what a centre crop cut off was never inspected and is ``outside``; without a map all
        of it is. ``size``: (height, width) of the result, the frame's own when None.
        """
        if self.anomaly_map is None:
            return np.full(size or self.frame_size, outside, np.float32)
        boxes = [view.box for view in self.views] or None
        maps = np.stack([view.anomaly_map for view in self.views] or [self.anomaly_map])
        return project(maps, boxes, self.resize, self.frame_size, size=size, outside=outside)

    def to_record(self) -> dict[str, Any]:
        """Plain values for a JSON line: everything but the maps."""
        return {
            "status": self.status.value,
            "reason": self.reason,
            "p_anomaly": _finite(self.p_anomaly),
            "sentence": self.sentence,
            "score": _finite(self.score),
            "peak": _finite(self.peak),
            "regions": [
                {"box": list(r.box), "place": r.place, "area_px": r.area_px, "peak": r.peak}
                for r in self.regions
            ],
            "view": self.view,
            "views": [
                {
                    "name": view.name,
                    "box": list(view.box),
                    "status": view.status and view.status.value,
                    "p_anomaly": _finite(view.p_anomaly),
                    "sentence": view.sentence,
                    "score": _finite(view.score),
                    "peak": _finite(view.peak),
                }
                for view in self.views
            ],
            "most_like": self.most_like and asdict(self.most_like),
            "agreement": self.agreement,
            "decided_by": self.decided_by,
            "contradiction": self.contradiction,
            "timings_ms": {stage: round(ms, 3) for stage, ms in self.timings_ms.items()},
            "rung": self.rung,
            "costs_ms": dict(self.costs_ms),
            "frame_size": list(self.frame_size),
        }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None

"""What an inspection says about one frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from ..kernels import project
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
    place: str  # the 3×3 cell of the inspected image ("top left"), in the model's words
    area_px: float  # in frame pixels
    peak: float  # the map's largest value inside


@dataclass(frozen=True, eq=False)
class Verdict:
    """Result of ``Inspector.inspect``.

    Attributes:
        status: PASS, FAIL or NO_RESULT.
        reason: why, in a few words; for NO_RESULT what went wrong.
        p_anomaly: probability of the affirmative first answer token against the negative one, 0..1.
        sentence: the model's answer.
        anomaly_map: float32 [S, S], what the model saw; larger = more anomalous.
        score: mean of the map's highest 1 %.
        peak: the map's maximum.
        regions: highest peak first.
        agreement: whether a place that the sentence names is a region's place; None when it names none.
        decided_by: "answer" (the greedy one), the recipe's "operating point" of p(anomaly), or "map", where there
            was no time for an answer; None for NO_RESULT.
        contradiction: the sentence says the other thing.
        timings_ms: milliseconds per stage, in order.
        rung: how far the inspection came: "sentence", "verdict", "map" or "none".
        costs_ms: what each stage was expected to cost: a high percentile of its last durations.
        frame_size: (height, width) of the frame in pixels.
        resize: how the frame was fitted to the map ("crop" or "stretch").

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

    def map_in_frame(self, outside: float = 0.0) -> np.ndarray:
        """The anomaly map at the frame's resolution: float32 [H, W], bilinear.

        What the centre crop cut off was never inspected and is ``outside``; without a map all of it is.
        """
        height, width = self.frame_size
        if self.anomaly_map is None:
            return np.full((height, width), outside, np.float32)
        maps = np.ascontiguousarray(self.anomaly_map[None])
        return project(maps, None, self.resize, self.frame_size, outside=outside)

    def to_record(self) -> dict[str, Any]:
        """Plain values for a JSON line: everything but the map."""
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

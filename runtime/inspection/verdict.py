"""The result of an inspection: plain values, which records contain, and the anomaly maps."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from ...kernels import Box, project
from ..bundles.bundle import Schema
from ..vision.regions import Region
from ..vision.views import FrameSize
from .budget import Rung

DecidedBy = Literal["answer", "operating point", "map"]
Probability = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
NUMBERS = ("p_anomaly", "score", "peak")


class Status(str, Enum):
    """PASS or FAIL by the language model's answer or the recipe's limits; NO_RESULT if there is no decision."""

    PASS = "PASS"
    FAIL = "FAIL"
    NO_RESULT = "NO_RESULT"

    def __str__(self) -> str:
        return self.value


class NearestNormal(Schema, frozen=True):
    """The patch of a normal sample that is nearest to the most anomalous patch."""

    sample: Annotated[int, Meta(description="Number of the sample in the order of enrolment, from 1.")]
    view: Annotated[str, Meta(description='The region or tile of the sample; "" for the whole frame.')]
    place: Annotated[str, Meta(description='The place of the patch in that view ("top left").')]
    patch: Annotated[tuple[int, int], Meta(description="Row and column of the patch in that view, from 0.")]


class ViewResult(Schema, frozen=True, kw_only=True):
    """The result for one region or tile. Values that the inspection did not reach are null or empty."""

    name: Annotated[str, Meta(description="Name of the region or tile.")]
    box: Annotated[
        Box, Meta(description="x, y, width, height in frame pixels and the angle in degrees clockwise.")
    ]
    status: Annotated[Status | None, Meta(description="Its own status.")] = None
    p_anomaly: Annotated[Probability | None, Meta(description="Its own p(anomaly).")] = None
    sentence: Annotated[str, Meta(description="The model's answer about it.")] = ""
    score: Annotated[float | None, Meta(description="Mean of the highest 1 % of its map.")]
    peak: Annotated[float | None, Meta(description="Maximum of its map.")]
    regions: Annotated[
        tuple[Region, ...], Meta(description="Its regions, in the pixels and places of the box.")
    ] = ()


class Result(Schema, frozen=True, kw_only=True):
    """The result of an inspection of one part as plain values. Values that the inspection did not reach are null or
    empty."""

    status: Annotated[Status, Meta(description="PASS, FAIL or NO_RESULT.")]
    reason: Annotated[str, Meta(description="The reason in a few words; for NO_RESULT the error.")]
    p_anomaly: Annotated[
        Probability | None,
        Meta(
            description="Probability of the affirmative first answer token against the negative one, of the view that "
            "decides."
        ),
    ] = None
    sentence: Annotated[
        str, Meta(description='The model\'s answer about the view that decides; "" when the budget cut it.')
    ] = ""
    score: Annotated[
        float | None,
        Meta(description="Mean of the highest 1 % of the anomaly map; of several views the highest."),
    ] = None
    peak: Annotated[
        float | None, Meta(description="Maximum of the anomaly map; of several views the highest.")
    ] = None
    limit: Annotated[
        float | None,
        Meta(
            description="The map score that few good parts exceed, in units of normal variation (1.0 is what good "
            "parts score); null without normal samples, where maps have no such units."
        ),
    ] = None
    regions: Annotated[
        tuple[Region, ...],
        Meta(
            description="Regions of the map with high values, in frame pixels, highest peak first: for FAIL always, "
            "otherwise those that reach the bundle's region level."
        ),
    ] = ()
    view: Annotated[
        str,
        Meta(
            description="The region or tile that decides: the most anomalous of those with the part's status; "
            '"" for the whole frame.'
        ),
    ] = ""
    views: Annotated[
        tuple[ViewResult, ...],
        Meta(description="Each region or tile; empty where the frame is inspected as a whole."),
    ] = ()
    nearest_normal: Annotated[
        NearestNormal | None,
        Meta(
            description="For FAIL with normal samples: the normal patch nearest to the most anomalous patch."
        ),
    ] = None
    agreement: Annotated[
        bool | None,
        Meta(
            description="Whether the sentence names the places of all regions that reach the region level, and no "
            "others; null if it names none."
        ),
    ] = None
    decided_by: Annotated[
        DecidedBy | None,
        Meta(
            description='"answer": the model\'s greedy answer; "operating point": the recipe\'s limit of p(anomaly); '
            '"map": the map score is over the limit although the answer is negative, or decides alone because there '
            "was no time for an answer; null for NO_RESULT."
        ),
    ] = None
    contradiction: Annotated[bool, Meta(description="Whether the model's answer contradicts the status.")] = (
        False
    )
    rung: Annotated[
        Rung,
        Meta(
            description='How far the inspection came within its budget: "sentence", "verdict" (no whole sentence), '
            '"map" (no answer) or "none".'
        ),
    ] = "none"
    timings_ms: Annotated[
        dict[str, float], Meta(description="Milliseconds that each stage took, in their order.")
    ] = msgspec.field(default_factory=dict)
    costs_ms: Annotated[
        dict[str, float],
        Meta(
            description="Expected milliseconds of each stage, from which it is decided whether it runs: the 95th "
            "percentile of its last 100 durations."
        ),
    ] = msgspec.field(default_factory=dict)
    frame: Annotated[
        FrameSize | None, Meta(description="Size of the frame in pixels; null where none arrived.")
    ] = None
    resize: Annotated[
        Literal["crop", "stretch"],
        Meta(
            description='How the frame, or each view, was fitted to the square that the encoder sees: "crop" cuts the '
            'centre square, "stretch" keeps everything.'
        ),
    ] = "crop"
    unseen: Annotated[
        Share | None,
        Meta(
            description="Share of the frame that was not inspected, 0 to 1: outside the regions or tiles, or outside "
            "the centre square; null where no map was computed.",
        ),
    ] = None


class Verdict(Result, frozen=True, kw_only=True):
    """Result of ``Inspector.inspect``: the plain values of ``Result``, and the maps.

    Attributes:
        maps: float32 [views, S, S], higher where more anomalous; None if none was computed.
        deciding: index of the view that decides.
    """

    maps: np.ndarray | None = None
    deciding: int = 0

    @property
    def anomaly_map(self) -> np.ndarray | None:
        """The map of the view that decides, float32 [S, S]; None if no map was computed."""
        return None if self.maps is None else self.maps[self.deciding]

    def map_in_frame(self, outside: float = 0.0, size: tuple[int, int] | None = None) -> np.ndarray:
        """The anomaly map in frame coordinates, float32 [H, W], interpolated bilinearly; views are blended.

        Args:
            outside: value of pixels that were not inspected: outside all views or the centre crop, or without a map.
            size: (height, width) of the result; the frame's size when None.
        """
        frame_size = (self.frame.height, self.frame.width) if self.frame else (0, 0)
        if self.maps is None:
            return np.full(size or frame_size, outside, np.float32)
        boxes = [view.box for view in self.views] or None
        return project(self.maps, boxes, self.resize, frame_size, size=size, outside=outside)

    def to_record(self) -> dict[str, Any]:
        """The fields of ``Result`` as plain values for JSON, with None in place of numbers that are not finite."""
        values = {name: getattr(self, name) for name in Result.__struct_fields__}
        for name in NUMBERS:
            values[name] = _finite(values[name])
        values["views"] = [
            msgspec.structs.replace(view, **{name: _finite(getattr(view, name)) for name in NUMBERS})
            for view in self.views
        ]
        return msgspec.to_builtins(values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

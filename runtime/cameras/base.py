"""What every source of frames gives: ``Frame``, through ``Camera.frames()``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol, TypedDict

import numpy as np

from ..common.printable import readable


def utc_now() -> str:
    """The wall clock, as RFC 3339 UTC with microseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Moment(TypedDict):
    """A time by both clocks, as ``Frame`` takes it."""

    captured_ns: int
    captured_utc: str


def moment() -> Moment:
    """Now."""
    return {"captured_ns": time.monotonic_ns(), "captured_utc": utc_now()}


@dataclass(frozen=True)
class Frame:
    """One part in front of the camera.

    Where nothing usable arrived, ``pixels`` is None and ``problem`` says why: the part still gets its record.
    """

    part_id: str
    source: str  # where the pixels come from: a file, a place in a video, a device
    pixels: np.ndarray | None  # uint8 [H, W, 3], BGR
    problem: str = ""
    product: str = ""  # which product passes, where the source knows it
    defects: tuple[str, ...] | None = None  # what is truly wrong with the part, where the source knows it
    # When the frame was exposed, or the nearest known time before it was transferred and decoded.
    captured_ns: int = field(default_factory=time.monotonic_ns)
    captured_utc: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        for name in ("part_id", "source", "problem", "product"):
            object.__setattr__(self, name, readable(getattr(self, name)))


class Camera(Protocol):
    """A source of frames. Opening it raises ``CameraError`` when it is absent.

    Attributes:
        num_frames: how many frames will come; None where that is not known.
        remark: what the user should know of the source before it starts; "" when there is nothing.
    """

    name: str
    num_frames: int | None = None
    remark: str = ""

    def frames(self) -> Iterator[Frame]:
        """Frames until the source ends. Raises ``CameraError`` when it is lost on the way."""
        ...

    def close(self) -> None:
        """Give the device or file back; harmless when called twice."""
        ...

"""The interface of every source of frames: ``Camera.frames()`` yields ``Frame``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol, TypedDict

import numpy as np

from ..common.printable import readable


def utc_now() -> str:
    """The current time as RFC 3339 UTC with microseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Moment(TypedDict):
    """A time on the monotonic and on the wall clock, as keyword arguments of ``Frame``."""

    captured_ns: int
    captured_utc: str


def moment() -> Moment:
    """The current time on both clocks."""
    return {"captured_ns": time.monotonic_ns(), "captured_utc": utc_now()}


@dataclass(frozen=True)
class Frame:
    """The image of one part.

    Where no usable image arrived, ``pixels`` is None and ``problem`` is the reason: the part still gets a record.
    """

    part_id: str
    source: str  # origin of the pixels: a file, a position in a video, a device
    pixels: np.ndarray | None  # uint8 [H, W, 3], BGR
    problem: str = ""
    product: str = ""  # name of the product, where the source knows it
    defects: tuple[str, ...] | None = None  # the true defects, where the source knows them
    # When the frame was exposed, or the nearest known time before it was transferred and decoded.
    captured_ns: int = field(default_factory=time.monotonic_ns)
    captured_utc: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        for name in ("part_id", "source", "problem", "product"):
            object.__setattr__(self, name, readable(getattr(self, name)))


class Camera(Protocol):
    """A source of frames. The constructor raises ``CameraError`` when it is not available.

    Attributes:
        num_frames: number of frames that will come; None where it is unknown.
        remark: a note for the user before the source starts; "" when there is none.
    """

    name: str
    num_frames: int | None = None
    remark: str = ""

    def frames(self) -> Iterator[Frame]:
        """Frames until the source ends. Raises ``CameraError`` when the source fails before its end."""
        ...

    def close(self) -> None:
        """Release the device or file; may be called twice."""
        ...

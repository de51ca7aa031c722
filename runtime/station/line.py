"""The run loop: frames from a camera, through the inspector, to records, overlays and the operator's screen.

Every part gets exactly one record. Whatever breaks on the way makes it NO_RESULT with the reason, not a PASS.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..cameras.base import Camera, Frame
from ..common.errors import CameraError, ImageError
from ..inspection.verdict import Status, Verdict
from ..outputs.display import Display
from ..outputs.overlay import OverlayFolder, draw_overlay, overlay_name
from ..outputs.records import Identity, RecordFile, make_record
from ..outputs.tally import Tally
from ..vision.images import check_frame


class Inspects(Protocol):
    """What the line needs of an inspector."""

    def inspect(self, frame: np.ndarray, deadline: float | None = None) -> Verdict: ...


class Line:
    """One camera, one inspector, and where results go.

    Attributes:
        tally: running figures.
        lost: why the camera ended before its time; None when it did not.
        stopped_by: the signal that ended the run before the source did; None when none did.
        num_overlays_missing: overlays that could not be drawn or written.
        overlay_failure: why the last of them is missing.
    """

    def __init__(
        self,
        camera: Camera,
        inspector: Inspects,
        display: Display,
        identity: Identity,
        *,
        choose_recipe: Callable[[Frame], str],
        records: RecordFile | None = None,
        overlays: OverlayFolder | None = None,
        rejects_only: bool = False,
        level: float | None = None,
        max_parts: int | None = None,
        budget_ms: float | None = None,
    ) -> None:
        """
        Args:
            choose_recipe: readies the inspector for a frame's product; returns the recipe's name.
            rejects_only: no overlay for a PASS.
            level: the map's operating level, for the overlays' colours.
            max_parts: stop after so many; None goes on until the source ends.
            budget_ms: time for each part from its arrival here; what does not fit is left out.
        """
        self._camera, self._inspector, self._display, self._identity = camera, inspector, display, identity
        self._choose_recipe = choose_recipe
        self._records, self._overlays = records, overlays
        self._rejects_only = rejects_only
        self._level = level
        self._max_parts = max_parts
        self._budget_ms = budget_ms
        self.tally = Tally()
        self.lost: CameraError | None = None
        self.stopped_by: int | None = None
        self.num_overlays_missing = 0
        self.overlay_failure = ""
        self._overlay_failed = False

    def run(self) -> Tally:
        """Inspect until the source ends, or SIGINT or SIGTERM arrives; a part begun is finished.

        Raises:
            AgptError: a record cannot be kept. Going on would inspect parts that nobody hears of.
        """
        self.tally = Tally()
        with ExitStack() as ending:
            for part in (self._records, self._camera, self._display):
                if part:
                    ending.callback(part.close)
            with stop_requests() as stopping:
                for frame in self._frames(stopping):
                    self._handle(frame)
            self.stopped_by = stopping.number
        return self.tally

    def _frames(self, stopping: StopRequest) -> Iterator[Frame]:
        """The camera's frames. A lost camera gives one last frame without pixels: the part that was due."""
        frames = self._camera.frames()
        while stopping.number is None and self.tally.num_parts != self._max_parts:
            try:
                frame = next(frames)
            except StopIteration:
                return
            except Exception as error:  # a driver may raise anything
                self.lost = error if isinstance(error, CameraError) else _failed(self._camera, error)
                yield Frame(f"after-{self.tally.num_parts}", self._camera.name, None, problem=str(self.lost))
                return
            yield frame

    def _handle(self, frame: Frame) -> None:
        started = time.perf_counter()
        verdict, recipe = self._inspect(frame, started)
        latency_ms = (time.perf_counter() - started) * 1e3
        sequence = self._records.next_sequence if self._records else self.tally.num_parts + 1
        if self._records:
            verdict = self._record(self._records, frame, verdict, latency_ms, recipe)
        self.tally.add(frame, verdict, latency_ms)
        if self._overlays and not (self._rejects_only and verdict.status == Status.PASS):
            self._draw(sequence, frame, verdict, latency_ms)
        self._display.put(frame, verdict, latency_ms, self.tally)

    def _inspect(self, frame: Frame, started: float) -> tuple[Verdict, str]:
        """The verdict and the recipe's name. The inspector promises not to raise, and is not trusted."""
        if frame.pixels is None:
            return no_result(frame.problem or "no frame arrived"), ""
        try:
            recipe = self._choose_recipe(frame)
        except Exception as error:
            return no_result(f"no recipe for {frame.product!r}: {error}"), ""
        try:
            if self._budget_ms is None:
                return self._inspector.inspect(frame.pixels), recipe
            return self._inspector.inspect(frame.pixels, started + self._budget_ms / 1e3), recipe
        except Exception as error:
            return no_result(f"inspection failed: {type(error).__name__}: {error}"), recipe

    def _record(
        self, records: RecordFile, frame: Frame, verdict: Verdict, latency_ms: float, recipe: str
    ) -> Verdict:
        """Keep the part's record; a verdict that makes none (a probability of 2, say) becomes NO_RESULT."""
        try:
            record = make_record(records.next_sequence, frame, verdict, latency_ms, recipe, self._identity)
        except Exception as error:
            verdict = no_result(f"the verdict makes no record: {error}")
            record = make_record(records.next_sequence, frame, verdict, latency_ms, recipe, self._identity)
        records.put(record)
        return verdict

    def _draw(self, sequence: int, frame: Frame, verdict: Verdict, latency_ms: float) -> None:
        """A picture that cannot be made costs the picture, not the line."""
        assert self._overlays is not None
        note = "  |  ".join(filter(None, (f"part {frame.part_id}", frame.product, f"{latency_ms:.0f} ms")))
        try:
            image = draw_overlay(_drawable(frame), verdict, note, self._level)
            self._overlays.put(overlay_name(sequence, frame.part_id), image)
        except Exception as error:  # native code may raise anything
            self.num_overlays_missing += 1
            self.overlay_failure = str(error) or type(error).__name__
            if not self._overlay_failed:  # of many that follow each other the first is said
                self._display.say(f"part {frame.part_id} has no overlay: {self.overlay_failure}")
            self._overlay_failed = True
        else:
            self._overlay_failed = False


def _drawable(frame: Frame) -> np.ndarray | None:
    """The frame's pixels, if they make a picture."""
    if frame.pixels is None:
        return None
    try:
        return check_frame(frame.pixels)
    except ImageError:
        return None


def no_result(reason: str) -> Verdict:
    """The verdict of a part that was not inspected."""
    return Verdict(status=Status.NO_RESULT, reason=reason)


def _failed(camera: Camera, error: Exception) -> CameraError:
    return CameraError(f"{camera.name} failed ({type(error).__name__}: {error}): check it and start again")


@dataclass
class StopRequest:
    """The signal that asked to stop; None until one does."""

    number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM become a request. The second one acts as it did before: a hung part can be left."""
    stopping = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: object) -> None:
        stopping.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

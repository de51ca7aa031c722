"""The run loop: frames from a camera, through the inspector, to records, overlays and the operator's screen.

Every part gets exactly one record. If any step fails, the part is NO_RESULT with the reason, never PASS.
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

PROGRESS_SECONDS = 2.0  # a part that takes longer shows its progress


class FrameInspector(Protocol):
    """The interface of an inspector that the line uses."""

    def inspect(self, frame: np.ndarray, deadline: float | None = None) -> Verdict: ...


class Line:
    """Inspects the frames of one camera and delivers the results.

    Attributes:
        tally: running figures.
        lost: the error that ended the camera; None when there was none.
        stopped_by: number of the signal that stopped the run; None when there was none.
        num_overlays_missing: overlays that could not be drawn or written.
        overlay_failure: the reason for the last of them.
    """

    def __init__(
        self,
        camera: Camera,
        inspector: FrameInspector,
        display: Display,
        identity: Identity,
        *,
        choose_recipe: Callable[[Frame], str],
        records: RecordFile | None = None,
        overlays: OverlayFolder | None = None,
        rejects_only: bool = False,
        max_parts: int | None = None,
        budget_ms: float | None = None,
    ) -> None:
        """
        Args:
            choose_recipe: prepares the inspector for a frame's product; returns the recipe's name.
            rejects_only: write no overlay for a PASS.
            max_parts: stop after this many parts; None: when the source ends.
            budget_ms: time for each part, from its frame's arrival here; stages that do not fit are skipped.
        """
        self._camera, self._inspector, self._display, self._identity = camera, inspector, display, identity
        self._choose_recipe = choose_recipe
        self._records, self._overlays = records, overlays
        self._rejects_only = rejects_only
        self._max_parts = max_parts
        self._budget_ms = budget_ms
        self.tally = Tally()
        self.lost: CameraError | None = None
        self.stopped_by: int | None = None
        self.num_overlays_missing = 0
        self.overlay_failure = ""
        self._overlay_failed = False
        self._part_id, self._started = "", 0.0  # of the part that is being inspected

    def run(self) -> Tally:
        """Inspect until the source ends, or SIGINT or SIGTERM arrives; the part being inspected is finished.

        Raises:
            AgptError: a record cannot be written. The run ends, as a part without a record must not pass.
        """
        self.tally = Tally()
        with ExitStack() as resources:
            for resource in (self._records, self._camera, self._display):
                if resource:
                    resources.callback(resource.close)
            with stop_requests() as stopping:
                for frame in self._frames(stopping):
                    self._handle(frame)
            self.stopped_by = stopping.number
        return self.tally

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a part that takes long; for ``Inspector.watch``."""
        if time.perf_counter() - self._started >= PROGRESS_SECONDS:
            self._display.progress(self._part_id, stage, done, total)

    def _frames(self, stopping: StopRequest) -> Iterator[Frame]:
        """The camera's frames. If the camera fails, one frame without pixels follows, for the part that was due."""
        frames = self._camera.frames()
        while stopping.number is None and self.tally.num_parts != self._max_parts:
            try:
                frame = next(frames)
            except StopIteration:
                return
            except Exception as error:  # a driver may raise any exception
                self.lost = error if isinstance(error, CameraError) else _failed(self._camera, error)
                yield Frame(f"after-{self.tally.num_parts}", self._camera.name, None, problem=str(self.lost))
                return
            yield frame

    def _handle(self, frame: Frame) -> None:
        started = time.perf_counter()
        self._part_id, self._started = frame.part_id, started
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
        """The verdict and the recipe's name. An exception, which the inspector should not raise, gives NO_RESULT."""
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
        """Write the part's record. Returns its verdict: NO_RESULT if the given one is invalid (a probability of 2)."""
        try:
            record = make_record(records.next_sequence, frame, verdict, latency_ms, recipe, self._identity)
        except Exception as error:
            verdict = no_result(f"the verdict is invalid: {error}")
            record = make_record(records.next_sequence, frame, verdict, latency_ms, recipe, self._identity)
        records.put(record)
        return verdict

    def _draw(self, sequence: int, frame: Frame, verdict: Verdict, latency_ms: float) -> None:
        """Draw and write the part's overlay. If that fails, the failure is counted and the line continues."""
        assert self._overlays is not None
        note = "  |  ".join(filter(None, (f"part {frame.part_id}", frame.product, f"{latency_ms:.0f} ms")))
        try:
            image = draw_overlay(_drawable(frame), verdict, note)
            self._overlays.put(overlay_name(sequence, frame.part_id), image)
        except Exception as error:  # native code may raise any exception
            self.num_overlays_missing += 1
            self.overlay_failure = str(error) or type(error).__name__
            if not self._overlay_failed:  # of consecutive failures, only the first is shown
                self._display.say(f"part {frame.part_id} has no overlay: {self.overlay_failure}")
            self._overlay_failed = True
        else:
            self._overlay_failed = False


def _drawable(frame: Frame) -> np.ndarray | None:
    """The frame's pixels, or None where they are not a valid image."""
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
    return CameraError(
        f"{camera.name} failed ({type(error).__name__}: {error}): check the source and start again"
    )


@dataclass
class StopRequest:
    """``number``: the signal that asked the run to stop; None until one arrives."""

    number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request. A second one has its usual effect and can end a hung inspection."""
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

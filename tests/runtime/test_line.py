"""The run loop with a small inspector of its own: every part has exactly one record, whatever breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from anomalygpt_edge.runtime.cameras import Frame
from anomalygpt_edge.runtime.common.errors import AgptError, CameraError
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.outputs.overlay import OverlayFolder
from anomalygpt_edge.runtime.outputs.records import Identity, RecordFile
from anomalygpt_edge.runtime.station import line as line_module
from anomalygpt_edge.runtime.station.line import Line, no_result
from anomalygpt_edge.runtime.vision.views import FrameSize

IDENTITY = Identity(bundle="fake", bundle_sha256="00" * 32)


class FakeInspector:
    """Fails bright frames; raises on a frame whose first pixel is 13."""

    def inspect(self, frame: np.ndarray) -> Verdict:
        if frame[0, 0, 0] == 13:
            raise RuntimeError("the engine fell over")
        bright = frame.mean() > 128
        return Verdict(
            status=Status.FAIL if bright else Status.PASS,
            reason="answered",
            frame=FrameSize(width=frame.shape[1], height=frame.shape[0]),
            p_anomaly=float(bright),
            sentence="Yes." if bright else "No.",
            maps=np.full((1, 224, 224), 0.5, np.float32),
            score=0.5,
            peak=0.5,
        )


class FakeCamera:
    name = "fake camera"

    def __init__(self, frames, error: Exception | None = None):
        self._frames, self._error, self.closed = frames, error, False

    def frames(self) -> Iterator[Frame]:
        yield from self._frames
        if self._error:
            raise self._error

    def close(self) -> None:
        self.closed = True


class Silent:
    def __init__(self):
        self.seen, self.said, self.steps, self.closed = [], [], [], False

    def put(self, frame, verdict, latency_ms, tally):
        self.seen.append(frame.part_id)

    def progress(self, part_id, stage, done, total):
        self.steps.append((part_id, stage, done, total))

    def say(self, sentence):
        self.said.append(sentence)

    def close(self):
        self.closed = True


def frame(part_id: str, grey: int = 0, **more) -> Frame:
    return Frame(part_id, "fake", np.full((40, 60, 3), grey, np.uint8), **more)


def make_line(tmp_path, camera, inspector=None, **options) -> Line:
    return Line(
        camera,
        inspector or FakeInspector(),
        Silent(),
        IDENTITY,
        choose_recipe=options.pop("choose_recipe", lambda frame: "recipe"),
        records=options.pop("records", None) or RecordFile(tmp_path),
        **options,
    )


@pytest.fixture(scope="module")
def tiny_inspector(tiny_bundle):
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        yield inspector


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]


def test_every_part_has_exactly_one_record(tmp_path):
    broken = Frame("broken", "fake", None, problem="part.png does not decode")
    camera = FakeCamera([frame("a"), frame("b", 255), broken, frame("c", 13), frame("d")])
    line = make_line(tmp_path, camera)
    tally = line.run()
    stored = records(tmp_path)
    assert [record["part_id"] for record in stored] == ["a", "b", "broken", "c", "d"]
    assert [record["status"] for record in stored] == ["PASS", "FAIL", "NO_RESULT", "NO_RESULT", "PASS"]
    assert stored[2]["reason"] == "part.png does not decode"
    assert "the engine fell over" in stored[3]["reason"]
    assert stored[0]["recipe"] == "recipe"
    assert tally.counts() == "5 parts: 2 PASS, 1 FAIL, 2 NO_RESULT"
    assert camera.closed
    assert line.lost is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CameraError("camera 0 stopped after 2 frames: check its cable"), "check its cable"),
        (OSError("bus error"), "fake camera failed (OSError: bus error)"),
    ],
)
def test_a_lost_camera_gives_the_due_part_no_result(tmp_path, error, said):
    line = make_line(tmp_path, FakeCamera([frame("a"), frame("b")], error))
    line.run()
    assert [record["status"] for record in records(tmp_path)] == ["PASS", "PASS", "NO_RESULT"]
    assert said in records(tmp_path)[2]["reason"]
    assert said in str(line.lost)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, [("a", "encode", 12, 138)]), (60.0, [])])
def test_only_a_part_that_takes_long_shows_its_progress(tmp_path, monkeypatch, seconds, shown):
    class Slow:
        def inspect(self, frame):
            line.progress("encode", 12, 138)
            return Verdict(status=Status.PASS, reason="")

    monkeypatch.setattr(line_module, "PROGRESS_SECONDS", seconds)
    line = make_line(tmp_path, FakeCamera([frame("a")]), Slow())
    line.run()
    assert line._display.steps == shown


def test_a_product_without_recipe_is_no_result_and_the_line_goes_on(tmp_path):
    def choose(frame: Frame) -> str:
        return {"gear": "gears"}[frame.product]

    camera = FakeCamera([frame("a", product="bolt"), frame("b", product="gear")])
    make_line(tmp_path, camera, choose_recipe=choose).run()
    assert [record["status"] for record in records(tmp_path)] == ["NO_RESULT", "PASS"]
    assert "bolt" in records(tmp_path)[0]["reason"]


def test_a_verdict_that_makes_no_record_is_no_result(tmp_path):
    class Absurd:
        def inspect(self, frame):
            return Verdict(status=Status.PASS, reason="", p_anomaly=2.0)

    tally = make_line(tmp_path, FakeCamera([frame("a")]), Absurd()).run()
    assert tally.counts() == "1 parts: 0 PASS, 0 FAIL, 1 NO_RESULT"
    assert records(tmp_path)[0]["status"] == "NO_RESULT"


def test_the_truth_is_counted(tmp_path):
    parts = [
        frame("1", 255, defects=("hole",)),
        frame("2", 0, defects=("hole",)),
        frame("3", 255, defects=()),
    ]
    tally = make_line(tmp_path, FakeCamera([*parts, frame("4", 0, defects=())])).run()
    assert tally.catches() == "1 of 2 defective parts caught, 1 false alarms on 2 good parts"
    assert make_line(tmp_path / "x", FakeCamera([frame("1")])).run().catches() == ""


def test_overlays_for_all_or_rejects_only(tmp_path):
    parts = [frame("a"), frame("../../b", 255), Frame("c", "fake", None, problem="lost")]
    make_line(tmp_path, FakeCamera(parts), overlays=OverlayFolder(tmp_path / "all")).run()
    assert [path.name for path in sorted((tmp_path / "all").iterdir())] == [
        "00001_a.png",
        "00002_b.png",
        "00003_c.png",
    ]
    make_line(tmp_path, FakeCamera(parts), overlays=OverlayFolder(tmp_path / "some"), rejects_only=True).run()
    assert len(list((tmp_path / "some").iterdir())) == 2


def test_an_overlay_that_cannot_be_written_does_not_stop_the_line(tmp_path):
    overlays = OverlayFolder(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    line = make_line(tmp_path, FakeCamera([frame("a"), frame("b")]), overlays=overlays)
    line.run()
    assert len(records(tmp_path)) == 2
    assert line.num_overlays_missing == 2
    assert "cannot write" in line.overlay_failure
    assert len(line._display.said) == 1, "the operator hears of the first at once, not of each"
    assert "part a has no overlay" in line._display.said[0]


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (4, 4), (4, 4, 4), (2, 2, 0)])
def test_a_frame_that_is_none_costs_its_verdict_only(tmp_path, tiny_inspector, shape):
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    odd = Frame("odd", "fake", np.zeros(shape, np.uint8))
    parts = [Frame("a", "fake", blocks), odd, Frame("b", "fake", blocks)]
    line = make_line(
        tmp_path, FakeCamera(parts), tiny_inspector, overlays=OverlayFolder(tmp_path / "overlays")
    )
    line.run()
    stored = records(tmp_path)
    assert [record["status"] == "NO_RESULT" for record in stored] == [False, True, False]
    assert "the frame" in stored[1]["reason"]
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    assert line.num_overlays_missing == 0


def test_parts_that_were_not_inspected_do_not_make_the_line_look_fast(tmp_path):
    parts = [Frame(str(index), "fake", None, problem="lost") for index in range(50)]
    nothing = make_line(tmp_path / "a", FakeCamera([*parts, frame("c", 13)])).run()
    assert nothing.latency() == ""
    assert "inspections/s" not in nothing.pace()
    tally = make_line(tmp_path / "b", FakeCamera([*parts, frame("x"), frame("y", 255)])).run()
    assert len(tally.latencies_ms) == 2


def test_a_record_that_cannot_be_kept_stops_the_line(tmp_path):
    file = RecordFile(tmp_path)

    def refuse(record):
        raise AgptError("cannot write: free some space")

    file.put = refuse
    camera = FakeCamera([frame("a"), frame("b")])
    line = make_line(tmp_path, camera, records=file)
    with pytest.raises(AgptError, match="free some space"):
        line.run()
    assert line.tally.num_parts == 0  # what has no record is not counted
    assert camera.closed


def test_a_name_that_is_no_utf8_is_kept_readably(tmp_path):
    name = b"part-\xff.png".decode("utf-8", "surrogateescape")
    make_line(tmp_path, FakeCamera([Frame(name, name, None, problem=f"{name} does not decode")])).run()
    assert records(tmp_path)[0]["part_id"] == r"part-\udcff.png"


def test_the_line_stops_after_so_many_parts(tmp_path):
    line = make_line(tmp_path, FakeCamera([frame(str(i)) for i in range(9)]), max_parts=4)
    assert line.run().num_parts == 4
    assert len(records(tmp_path)) == 4


def test_a_line_runs_in_a_thread_too(tmp_path):
    line = make_line(tmp_path, FakeCamera([frame("a")]))
    thread = threading.Thread(target=line.run)
    thread.start()
    thread.join(10)
    assert len(records(tmp_path)) == 1


def test_everything_is_closed_when_the_screen_is_gone(tmp_path):
    class Gone(Silent):
        def put(self, frame, verdict, latency_ms, tally):
            raise BrokenPipeError

        def close(self):
            raise BrokenPipeError

    camera, file = FakeCamera([frame("a"), frame("b")]), RecordFile(tmp_path)
    line = Line(camera, FakeInspector(), Gone(), IDENTITY, choose_recipe=lambda frame: "", records=file)
    with pytest.raises(BrokenPipeError):
        line.run()
    assert camera.closed
    assert file._file.closed
    assert len(records(tmp_path)) == 1


def test_no_result_has_no_map():
    verdict = no_result("no frame")
    assert verdict.status is Status.NO_RESULT
    assert verdict.map_in_frame().size == 0


ENDLESS_LINE = """
    import itertools, pathlib, sys, time
    import numpy as np
    from anomalygpt_edge.runtime.cameras import Frame
    from anomalygpt_edge.runtime.outputs.display import open_display
    from anomalygpt_edge.runtime.station.line import Line
    from anomalygpt_edge.runtime.outputs.records import Identity, RecordFile
    from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict

    class Inspector:
        def inspect(self, frame):
            time.sleep(0.02)
            return Verdict(status=Status.PASS, reason="fine")

    class Endless:
        name = "endless"
        def frames(self):
            for index in itertools.count():
                yield Frame(str(index), "endless", np.zeros((8, 8, 3), np.uint8))
        def close(self):
            print("camera closed")

    line = Line(Endless(), Inspector(), open_display("endless"), Identity(bundle="b", bundle_sha256="s"),
                choose_recipe=lambda frame: "", records=RecordFile(pathlib.Path(sys.argv[1])))
    print(line.run().counts())
    print(f"stopped by {line.stopped_by}")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_ends_cleanly_with_all_records(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS_LINE), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    lines = [process.stdout.readline() for _ in range(4)]  # the title and three parts
    process.send_signal(number)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert errors == ""
    printed = [line for line in [*lines[1:], *out.splitlines()] if "PASS  " in line]
    assert len(records(tmp_path)) == len(printed) >= 3
    assert f"{len(printed)} parts: {len(printed)} PASS" in out
    assert "camera closed" in out
    assert f"stopped by {int(number)}\n" in out

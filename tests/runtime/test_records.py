"""Records: what a line of JSON holds, and that a file outlives a torn end."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.cameras import Frame
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.inspection.verdict import Region, Status, Verdict
from anomalygpt_edge.runtime.outputs.records import Identity, Record, RecordFile, make_record
from anomalygpt_edge.runtime.vision.views import FrameSize

IDENTITY = Identity(bundle="nano", bundle_sha256="ab" * 32)


def frame(part_id: str = "7") -> Frame:
    return Frame(part_id, "camera 0#7", np.zeros((4, 6, 3), np.uint8), product="gear", defects=("hole",))


def verdict(**changes) -> Verdict:
    values = {
        "status": Status.FAIL,
        "reason": "answered Yes",
        "frame": FrameSize(width=6, height=4),
        "resize": "crop",
        "p_anomaly": 0.9,
        "sentence": "Yes.",
        "score": 0.25,
        "peak": 0.5,
        "regions": (Region((1, 2, 3, 4), "top left", 7.5, 0.5),),
        "timings_ms": {"encode": 1.235},
    }
    return Verdict(**{**values, **changes})


def test_a_record_holds_everything_and_is_plain_json(tmp_path):
    file = RecordFile(tmp_path)
    file.put(make_record(file.next_sequence, frame(), verdict(), 12.3456, "gears", IDENTITY))
    file.close()
    stored = json.loads((tmp_path / "records.jsonl").read_text())
    assert stored["part_id"] == "7"
    assert stored["source"] == "camera 0#7"
    assert stored["status"] == "FAIL"
    region = {"box": [1, 2, 3, 4], "place": "top left", "area_px": 7.5, "peak": 0.5, "view": ""}
    assert stored["regions"] == [region]
    assert stored["score"] == 0.25
    assert stored["timings_ms"] == {"encode": 1.235}
    assert (stored["recipe"], stored["bundle"], stored["bundle_sha256"]) == ("gears", "nano", "ab" * 32)
    assert stored["defects"] == ["hole"]
    assert stored["captured_monotonic_ns"] > 0
    assert stored["captured_utc"] <= stored["recorded_utc"]
    assert msgspec.json.decode(json.dumps(stored), type=Record).sequence == 1


def test_a_number_that_is_not_one_is_null():
    record = make_record(
        1, frame(), verdict(p_anomaly=math.nan, score=math.inf, peak=None), 1.0, "", IDENTITY
    )
    assert (record.p_anomaly, record.score, record.peak) == (None, None, None)
    json.loads(msgspec.json.encode(record))


def test_each_record_is_on_disk_before_the_next(tmp_path):
    file = RecordFile(tmp_path)
    for count in (1, 2, 3):
        file.put(make_record(file.next_sequence, frame(str(count)), verdict(), 1.0, "", IDENTITY))
        assert len((tmp_path / "records.jsonl").read_text().splitlines()) == count


@pytest.mark.parametrize("torn", ["", '{"schema_version":1,"sequ', "\n", "not json\n"])
def test_a_second_run_goes_on_counting(tmp_path, torn):
    for expected in (1, 2):
        file = RecordFile(tmp_path)
        assert file.next_sequence == expected
        file.put(make_record(expected, frame(), verdict(), 1.0, "", IDENTITY))
        file.close()
        with (tmp_path / "records.jsonl").open("a") as handle:
            handle.write(torn)
    whole = [line for line in (tmp_path / "records.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["sequence"] for line in whole] == [1, 2]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AgptError, match="another --out folder"):
        RecordFile(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said(tmp_path):
    file = RecordFile(tmp_path)
    file.close()
    file._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(AgptError, match="free some space"):
        file.put(make_record(1, frame(), verdict(), 1.0, "", IDENTITY))


def put_one(folder: Path) -> int:
    """A run of one part; its sequence number."""
    file = RecordFile(folder)
    sequence = file.next_sequence
    file.put(make_record(sequence, frame(), verdict(), 1.0, "", IDENTITY))
    file.close()
    return sequence


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ('{"schema_version":99,"sequence":7,"other":true}\n', 8),
        ('{"schema_version":1,"sequence":7,"par', 8),  # torn: its overlay is there
        ('{"sequence":7}\n{"sequence":3}\nnot json\n', 8),
        ('{"sequence":7}\n' + "x" * (3 << 20) + "\n", 8),
        ('{"sequence":7}\n' + '{"sequence":-5}\n' * 3, 8),
        ('{"sequence":7}\n{"sequence":1e30}\n{"sequence":9.5}\n', 8),
        (f'{{"sequence":7}}\n{{"sequence":{2**63}}}\n{{"sequence":{10**40}}}\n', 8),
        ('{"sequence":"8"}\n\x00\x00\n[1]\nnull\n', 1),
        ("\n\n", 1),
    ],
)
def test_numbers_never_repeat_whatever_the_file_holds(tmp_path, old, expected):
    (tmp_path / "records.jsonl").write_text(old)
    given = [put_one(tmp_path) for _ in range(3)]
    assert given[0] == expected
    assert len(set(given)) == 3
    lines = (tmp_path / "records.jsonl").read_bytes().split(b"\n")
    assert sum(line.endswith(b"}") and b'"part_id":"7"' in line for line in lines) == 3


# All but those that use up the sequence numbers, and those that leave room for one record only.
NUMBERS = st.integers(max_value=10**12 - 3) | st.integers(min_value=10**13)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40) | st.builds(lambda n: b'{"sequence": %d}' % n, NUMBERS), max_size=8))
def test_any_old_file_can_be_continued(tmp_path, lines):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\n".join(lines))
    before = {int(number) for number in re.findall(rb'"sequence":\s*(-?\d+)', path.read_bytes())}
    given = [put_one(tmp_path) for _ in range(2)]
    assert len(set(given)) == 2
    assert before.isdisjoint(given)


def test_a_file_that_has_used_up_its_numbers_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text(f'{{"sequence":{10**12}}}\n')
    with pytest.raises(AgptError, match="used up its sequence numbers"):
        RecordFile(tmp_path)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    first = RecordFile(tmp_path)
    with pytest.raises(
        AgptError, match=r"another run is writing .*records\.jsonl: wait for it to end, or choose another"
    ):
        RecordFile(tmp_path)
    program = (
        "import sys, pathlib\n"
        "from anomalygpt_edge.runtime.outputs.records import RecordFile\n"
        "RecordFile(pathlib.Path(sys.argv[1]))\n"
    )
    other = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert "another run is writing" in other.stderr
    first.put(make_record(1, frame(), verdict(), 1.0, "", IDENTITY))
    first.close()
    assert put_one(tmp_path) == 2

"""One record per part: JSON, one line each, on its way to the disk before the next part is looked at."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..cameras.base import Frame, utc_now
from ..common.errors import AgptError
from ..common.files import lock
from ..common.printable import readable
from ..inspection.verdict import Verdict

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
MAX_LINE_BYTES = 1 << 20  # far more than one record
SEQUENCE = re.compile(rb'"sequence"\s*:\s*(\d{1,13})(?![\d.eE])')
MAX_SEQUENCE = 10**12  # a thousand parts a second for thirty years


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Strict both ways: what a reader does not know is an error."""


class RegionRecord(Schema, frozen=True):
    """A region of the map, in pixels of the frame."""

    box: tuple[int, int, int, int]  # x, y, width, height
    place: str
    area_px: float
    peak: float


class ViewRecord(Schema, frozen=True):
    """One of several regions or tiles; what was not reached is null or empty."""

    name: str
    box: tuple[float, float, float, float, float]  # x, y, width, height, degrees
    status: Literal["PASS", "FAIL", "NO_RESULT"] | None
    p_anomaly: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    sentence: str
    score: float | None
    peak: float | None


class LikenessRecord(Schema, frozen=True):
    """The spot of a normal sample that the most anomalous patch is most like."""

    sample: int  # in the order in which they were enrolled, from 1
    view: str
    place: str
    patch: tuple[int, int]  # row and column, from 0


class Identity(Schema, frozen=True):
    """What inspected: it goes into every record."""

    bundle: str
    bundle_sha256: str  # digest of the bundle's manifest, which holds the digest of every other file


class Record(Schema, frozen=True, kw_only=True):
    """What is kept of one part."""

    schema_version: int = SCHEMA_VERSION
    sequence: Annotated[int, msgspec.Meta(ge=1)]  # within its file; the part's overlay carries it in its name
    part_id: str
    source: str
    product: str
    status: Literal["PASS", "FAIL", "NO_RESULT"]
    reason: str
    p_anomaly: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    sentence: str
    score: float | None
    peak: float | None
    regions: list[RegionRecord]
    view: str = ""  # the region or tile that decided; "" for the whole frame
    views: list[ViewRecord] = []  # empty where frames are looked at as a whole
    most_like: LikenessRecord | None = None
    agreement: bool | None
    decided_by: Literal["answer", "operating point", "map"] | None = None
    contradiction: bool = False
    frame_size: tuple[int, int]  # height, width; zeros where no frame arrived
    latency_ms: float  # from the frame's arrival to the verdict
    timings_ms: dict[str, float]
    rung: Literal["sentence", "verdict", "map", "none"] = "none"
    costs_ms: dict[str, float] = {}
    captured_utc: str
    captured_monotonic_ns: int
    recorded_utc: str
    recipe: str
    bundle: str
    bundle_sha256: str
    defects: list[str] | None  # the truth, where the source knows it


def make_record(
    sequence: int, frame: Frame, verdict: Verdict, latency_ms: float, recipe: str, identity: Identity
) -> Record:
    """A part's record from what is known of it."""
    values = {
        **verdict.to_record(),
        **msgspec.structs.asdict(identity),
        "sequence": sequence,
        "part_id": frame.part_id,
        "source": frame.source,
        "product": frame.product,
        "latency_ms": round(latency_ms, 3),
        "captured_utc": frame.captured_utc,
        "captured_monotonic_ns": frame.captured_ns,
        "recorded_utc": utc_now(),
        "recipe": recipe,
        "defects": frame.defects,
    }
    return msgspec.convert({name: _readable(value) for name, value in values.items()}, Record)


def _readable(value: object) -> object:
    """A reason may name a file whose name is not UTF-8; JSON may not hold it."""
    return readable(value) if isinstance(value, str) else value


class RecordFile:
    """Appends to ``records.jsonl``: each record whole, and with the operating system before the next part.

    One process has the file at a time.
    """

    def __init__(self, folder: Path) -> None:
        """Continue the numbering of a file that is there.

        Raises:
            AgptError: the folder or file cannot be written, or another run writes it.
        """
        self.path = folder / RECORDS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            try:
                self._continue()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise AgptError(
                f"cannot write {self.path} ({error.strerror}): choose another --out folder"
            ) from error

    def _continue(self) -> None:
        """Lock the file and find where its numbering goes on."""
        if not lock(self._file):
            raise AgptError(
                f"another run writes {self.path}: wait for it to end, or choose another --out folder"
            )
        self._end_last_line()
        self.next_sequence = _last_sequence(self.path) + 1
        if self.next_sequence > MAX_SEQUENCE:
            raise AgptError(f"{self.path} has used up its sequence numbers: choose another --out folder")

    def put(self, record: Record) -> None:
        """Raises AgptError when the disk does not take the record."""
        line = msgspec.json.encode(record) + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise AgptError(f"cannot write {self.path} ({error.strerror}): free some space") from error
        if written != len(line):
            raise AgptError(f"cannot write {self.path} whole (disk full): free some space")
        self.next_sequence = record.sequence + 1

    def close(self) -> None:
        self._file.close()

    def _end_last_line(self) -> None:
        """End a torn last line where it broke off, so that the next record has a line of its own."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._file.write(b"\n")


def _last_sequence(path: Path) -> int:
    """The highest number that a run may have given a record of the file; 0 without any.

    Lines are searched, not parsed: those that are torn or of another schema version have used their numbers too. Of
    more than 13 digits no run has given any, and none will.
    """
    last = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            last = max(last, *map(int, SEQUENCE.findall(line)), 0)
    return last

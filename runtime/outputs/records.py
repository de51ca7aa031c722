"""Records: one line of JSON per part, handed to the operating system before the next part is inspected."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from ..cameras.base import Frame, utc_now
from ..common.errors import AgptError
from ..common.files import lock
from ..common.printable import readable
from ..inspection.verdict import Result, Verdict

SCHEMA_VERSION = 3  # 3: units of maps, meaning of place, agreement and decided_by; 2: names of the fields of Result
RECORDS_FILE = "records.jsonl"
MAX_LINE_BYTES = 1 << 20  # far more than one record
SEQUENCE = re.compile(rb'"sequence"\s*:\s*(\d{1,13})(?![\d.eE])')
MAX_SEQUENCE = 10**12  # a thousand parts a second for thirty years
UNKNOWN_PRODUCT = "unknown"


class Identity(NamedTuple):
    """The bundle that inspected the part; see ``Record``."""

    bundle: str
    bundle_sha256: str


class Record(Result, frozen=True, kw_only=True):
    """The record of one part: the result of its inspection, and its origin."""

    schema_version: Annotated[int, Meta(description="Version of this schema.")] = SCHEMA_VERSION
    sequence: Annotated[
        int,
        Meta(ge=1, description="Number of the record in its file; the overlay's file name begins with it."),
    ]
    part_id: Annotated[str, Meta(description="Identifier of the part, given by the source.")]
    source: Annotated[
        str, Meta(description="Where the frame came from: a file, a position in a video, or a camera.")
    ]
    product: Annotated[
        str,
        Meta(
            min_length=1,
            description='The product\'s name: from the source, else from the recipe, else "unknown".',
        ),
    ]
    recipe: Annotated[
        str, Meta(description='Name of the recipe that was used; "" when none could be chosen.')
    ]
    bundle: Annotated[str, Meta(description="Name of the bundle.")]
    bundle_sha256: Annotated[
        str,
        Meta(description="SHA-256 of the bundle's manifest, which contains the digest of every other file."),
    ]
    latency_ms: Annotated[
        float, Meta(description="Milliseconds from the frame's arrival at the inspector to the verdict.")
    ]
    captured_utc: Annotated[str, Meta(description="When the frame was captured, RFC 3339 UTC.")]
    captured_monotonic_ns: Annotated[
        int, Meta(description="Time of capture on this machine's monotonic clock, in nanoseconds.")
    ]
    recorded_utc: Annotated[str, Meta(description="When this record was created, RFC 3339 UTC.")]
    defects: Annotated[
        tuple[str, ...] | None,
        Meta(description="The part's true defects, known on the demo line only; null elsewhere."),
    ]


def make_record(
    sequence: int, frame: Frame, verdict: Verdict, latency_ms: float, recipe: str, identity: Identity
) -> Record:
    """Create a part's record.

    Raises:
        msgspec.ValidationError: a value is out of its range, for example a probability of 2.
    """
    values = {
        **verdict.to_record(),
        **identity._asdict(),
        "reason": readable(verdict.reason),
        "sequence": sequence,
        "part_id": frame.part_id,
        "source": frame.source,
        "product": frame.product or recipe or UNKNOWN_PRODUCT,
        "latency_ms": round(latency_ms, 3),
        "captured_utc": frame.captured_utc,
        "captured_monotonic_ns": frame.captured_ns,
        "recorded_utc": utc_now(),
        "recipe": recipe,
        "defects": frame.defects,
    }
    return msgspec.convert(values, Record)


def record_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a line of ``records.jsonl``."""
    schema = msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(Record)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"anomalygpt-edge record, schema version {SCHEMA_VERSION}",
        **schema,
    }


class RecordFile:
    """Appends complete records to ``records.jsonl``, unbuffered. Only one process at a time can have the file open."""

    def __init__(self, folder: Path) -> None:
        """Open the file, and continue the numbering of the records that it holds.

        Raises:
            AgptError: the folder or file cannot be written, or another run is writing it.
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
        """Lock the file and find the next sequence number."""
        if not lock(self._file):
            raise AgptError(
                f"another run is writing {self.path}: wait for it to end, or choose another --out folder"
            )
        self._end_last_line()
        self.next_sequence = _last_sequence(self.path) + 1
        if self.next_sequence > MAX_SEQUENCE:
            raise AgptError(f"{self.path} has used up its sequence numbers: choose another --out folder")

    def put(self, record: Record) -> None:
        """Append a record.

        Raises:
            AgptError: the record cannot be written completely.
        """
        line = msgspec.json.encode(record) + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise AgptError(f"cannot write {self.path} ({error.strerror}): free some space") from error
        if written != len(line):
            raise AgptError(f"cannot write a complete record to {self.path} (disk full): free some space")
        self.next_sequence = record.sequence + 1

    def close(self) -> None:
        self._file.close()

    def _end_last_line(self) -> None:
        """Add a newline to an incomplete last line, so that the next record begins on a new line."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._file.write(b"\n")


def _last_sequence(path: Path) -> int:
    """The highest sequence number found in the file; 0 without any.

    Lines are searched, not parsed, because incomplete lines and those of other schema versions count too. Numbers of
    more than 13 digits are ignored: they exceed ``MAX_SEQUENCE``.
    """
    last = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            last = max(last, *map(int, SEQUENCE.findall(line)), 0)
    return last

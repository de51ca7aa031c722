"""One record per part: JSON, one line each, on its way to the disk before the next part is looked at."""

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

SCHEMA_VERSION = 2  # 2: the fields of Result under new names, sizes as width and height
RECORDS_FILE = "records.jsonl"
MAX_LINE_BYTES = 1 << 20  # far more than one record
SEQUENCE = re.compile(rb'"sequence"\s*:\s*(\d{1,13})(?![\d.eE])')
MAX_SEQUENCE = 10**12  # a thousand parts a second for thirty years
UNKNOWN_PRODUCT = "unknown"


class Identity(NamedTuple):
    """What inspected the part; see ``Record``."""

    bundle: str
    bundle_sha256: str


class Record(Result, frozen=True, kw_only=True):
    """What is kept of one part: the result of its inspection, and where it came from."""

    schema_version: Annotated[int, Meta(description="Version of this schema.")] = SCHEMA_VERSION
    sequence: Annotated[
        int, Meta(ge=1, description="Number within the file; the name of the part's overlay begins with it.")
    ]
    part_id: Annotated[str, Meta(description="The part, as the source names it.")]
    source: Annotated[
        str, Meta(description="Where the frame came from: a file, a place in a video, a camera.")
    ]
    product: Annotated[
        str,
        Meta(
            min_length=1,
            description="The product: the source's name for it, else the recipe's, else \"unknown\".",
        ),
    ]
    recipe: Annotated[
        str, Meta(description='Name of the recipe that judged it; "" when none could be chosen.')
    ]
    bundle: Annotated[str, Meta(description="Name of the bundle.")]
    bundle_sha256: Annotated[
        str, Meta(description="Digest of the bundle's manifest, which holds the digest of every other file.")
    ]
    latency_ms: Annotated[
        float, Meta(description="Milliseconds from the frame's arrival at the inspector to the verdict.")
    ]
    captured_utc: Annotated[str, Meta(description="When the frame was captured, RFC 3339 UTC.")]
    captured_monotonic_ns: Annotated[
        int, Meta(description="The same on this machine's monotonic clock, in nanoseconds.")
    ]
    recorded_utc: Annotated[str, Meta(description="When this record was made, RFC 3339 UTC.")]
    defects: Annotated[
        tuple[str, ...] | None,
        Meta(description="What is truly wrong with the part, where the source knows it (the demo line)."),
    ]


def make_record(
    sequence: int, frame: Frame, verdict: Verdict, latency_ms: float, recipe: str, identity: Identity
) -> Record:
    """A part's record from what is known of it.

    Raises:
        msgspec.ValidationError: a value is out of its range, a probability of 2 for example.
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

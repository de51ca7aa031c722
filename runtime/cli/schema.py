"""``agpt schema``: the JSON Schema of a record."""

from __future__ import annotations

import msgspec

from ..outputs.records import record_schema


def print_schema() -> None:
    """Print it, indented, on standard output."""
    print(msgspec.json.format(msgspec.json.encode(record_schema()), indent=2).decode())

"""``agpt schema``."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON Schema of a record (one line of records.jsonl)."""
    import msgspec

    from ..outputs.records import record_schema

    print(msgspec.json.format(msgspec.json.encode(record_schema()), indent=2).decode())

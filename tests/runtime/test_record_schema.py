"""The published JSON Schema, checked by an independent validator."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

import anomalygpt_edge as agpt
from anomalygpt_edge.runtime.cameras.base import Frame
from anomalygpt_edge.runtime.outputs.records import Identity, Record, make_record, record_schema
from anomalygpt_edge.runtime.vision.views import FrameSize, Tiles

PUBLISHED = Path(__file__).parents[2] / "docs" / "record.schema.json"
IDENTITY = Identity("tiny", "0" * 64)


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == record_schema(), "agpt schema > docs/record.schema.json"


def test_every_field_is_described() -> None:
    schema = record_schema()
    for name in ("Record", "Region", "ViewResult", "NearestNormal"):
        for field, content in schema["$defs"][name]["properties"].items():
            assert content.get("description"), f"{name}.{field} has no description"


@pytest.fixture(scope="module")
def records(tiny_bundle: Path) -> list[dict]:
    """Records of a whole frame, with normal samples, in tiles, without a frame, and without time."""
    whole = agpt.Recipe(name="part")
    tiled = agpt.Recipe(name="part", frame=FrameSize(width=160, height=120), tiles=Tiles(rows=2, columns=2))
    with agpt.Inspector.open(tiny_bundle, threads=1) as inspector:
        verdicts = []
        for recipe in (whole, tiled):
            inspector.use(recipe)
            verdicts.append(inspector.inspect(frame()))
            inspector.use(inspector.make_bank([frame(1)]))
            verdicts.append(inspector.inspect(frame()))
        verdicts += [inspector.inspect(frame(), deadline=0.0), inspector.inspect(np.zeros(3, np.uint8))]
    part = Frame("7", "camera 0#7", frame(), product="gear", defects=("hole",))
    made = [make_record(n, part, verdict, 12.5, "gear", IDENTITY) for n, verdict in enumerate(verdicts, 1)]
    return [json.loads(msgspec.json.encode(record)) for record in made]


def test_real_records_are_valid(records: list[dict]) -> None:
    validator = jsonschema.Draft202012Validator(record_schema())
    assert {record["status"] for record in records} == {"FAIL", "NO_RESULT"}
    assert any(record["views"] for record in records)
    assert any(record["nearest_normal"] for record in records)
    for record in records:
        validator.validate(record)


@pytest.mark.parametrize(
    "change",
    [
        {"p_anomaly": 2.0},
        {"status": "OK"},
        {"sequence": 0},
        {"product": ""},
        {"unknown": 1},
        {"regions": [{}]},
    ],
)
def test_what_is_wrong_is_invalid(records: list[dict], change: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**records[0], **change}, record_schema())
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps({**records[0], **change}), type=Record)

"""Decisions by the greedy answer, by the recipe's operating point, or by the map when time runs out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.common.errors import ConfigError, RecipeError
from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.enrolment.operating_point import (
    check_rate,
    choose_operating_point,
    num_normals_needed,
    rate_limit,
)
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.outputs.overlay import headline
from anomalygpt_edge.runtime.outputs.records import Record
from anomalygpt_edge.runtime.recipes.recipe import OperatingPoint, Recipe, load_recipe


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def good_part(p: float, score: float = 0.5) -> Verdict:
    return Verdict(status=Status.PASS, reason="", p_anomaly=p, score=score)


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        yield inspector


@pytest.fixture
def inspector(opened: Inspector) -> Inspector:
    opened.use(None)
    return opened


def point(p: float, score: float = 0.5) -> OperatingPoint:
    return OperatingPoint(false_reject_rate=0.1, num_normals=9, p_anomaly=p, score=score)


def test_the_greedy_answer_decides_by_default(inspector: Inspector) -> None:
    verdict = inspector.inspect(frame())
    assert (verdict.status, verdict.decided_by, verdict.contradiction) == (Status.FAIL, "answer", False)
    assert verdict.to_record()["decided_by"] == "answer"


def test_an_operating_point_decides_instead_and_a_contradiction_is_reported(inspector: Inspector) -> None:
    p = inspector.inspect(frame()).p_anomaly
    assert p is not None
    inspector.use(Recipe(name="part", operating_point=point(p / 2)))
    agreeing = inspector.inspect(frame())
    assert (agreeing.status, agreeing.decided_by) == (Status.FAIL, "operating point")
    assert not agreeing.contradiction
    assert "is above the recipe's" in agreeing.reason
    inspector.use(Recipe(name="part", operating_point=point(p)))  # FAIL only above the limit
    verdict = inspector.inspect(frame())
    assert (verdict.status, verdict.decided_by, verdict.contradiction) == (
        Status.PASS,
        "operating point",
        True,
    )
    assert verdict.sentence.startswith("Yes")
    assert "not above" in verdict.reason
    assert verdict.reason.endswith("though it answered Yes")
    assert headline(verdict) == verdict.reason, "a contradiction shows the reason, not the sentence"
    assert verdict.to_record()["contradiction"] is True


@pytest.mark.parametrize(("score", "status"), [(-1.0, Status.FAIL), (1e9, Status.PASS)])
def test_the_map_decides_only_if_the_recipe_allows_it(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, score: float, status: Status
) -> None:
    """There is time for the map, not for the verdict: the clock is fixed, and the verdict costs a second."""
    monkeypatch.setattr(inspector, "clock", lambda: 0.0)
    inspector.costs.add("verdict", 1.0)
    recipe = Recipe(name="part", operating_point=point(0.5, score))
    inspector.use(recipe)
    undecided = inspector.inspect(frame(), deadline=0.5)
    assert (undecided.status, undecided.rung, undecided.decided_by) == (Status.NO_RESULT, "map", None)
    inspector.use(msgspec.structs.replace(recipe, without_verdict="map"))
    verdict = inspector.inspect(frame(), deadline=0.5)
    assert (verdict.status, verdict.rung, verdict.decided_by) == (status, "map", "map")
    assert "map score" in verdict.reason
    assert "no time for the verdict" in verdict.reason
    assert headline(verdict) == verdict.reason


def test_a_failed_inspection_is_not_decided_by_the_map(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector.use(Recipe(name="part", operating_point=point(0.5, 1e9), without_verdict="map"))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("llama_decode returned 1")

    monkeypatch.setattr(inspector.language.session, "decode", broken)
    assert inspector.inspect(frame()).status is Status.NO_RESULT


@pytest.mark.parametrize(("rate", "needed"), [(0.5, 2), (0.1, 9), (0.05, 19), (0.01, 99), (0.001, 999)])
def test_the_number_of_good_parts_needed(rate: float, needed: int) -> None:
    assert num_normals_needed(rate) == needed
    check_rate(rate, needed)
    with pytest.raises(ConfigError, match=f"needs at least {needed} good parts, but there are {needed - 1}"):
        check_rate(rate, needed - 1)


@pytest.mark.parametrize("rate", [0.0, -1.0, 0.51, float("nan")])
def test_an_invalid_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="over 0 and at most"):
        check_rate(rate, 1000)


def test_the_rate_holds_on_average() -> None:
    """20,000 sets of good parts from a skewed distribution, each with one further part."""
    rng = np.random.default_rng(0)
    rate, n = 0.05, 30
    rejected = 0
    for draws in rng.beta(0.5, 5, (20000, n + 1)):
        chosen = choose_operating_point([good_part(p) for p in draws[:n]], rate)
        rejected += draws[n] > chosen.p_anomaly
    assert 0.025 < rejected / 20000 <= 1 / (n + 1) + 0.004, "1 of 31 parts, 3.2 %, below 5 %"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=9, max_size=60), st.floats(0.1, 0.5))
def test_at_most_the_rate_of_the_same_good_parts_is_above(values: list[float], rate: float) -> None:
    chosen = choose_operating_point([good_part(p, 2 * p) for p in values], rate)
    assert sum(p > chosen.p_anomaly for p in values) <= rate * (len(values) + 1) - 1 + 1e-6
    assert chosen.score == 2 * chosen.p_anomaly


def test_the_limit_of_one_choice() -> None:
    assert rate_limit(0.01, 99) == pytest.approx(1 - 0.05 ** (1 / 99), abs=1e-6), "Beta(1, 99)"
    assert 0.05 < rate_limit(0.05, 10000) < 0.055


def test_a_good_part_without_a_verdict_is_named() -> None:
    parts = [good_part(0.1)] * 9 + [Verdict(status=Status.NO_RESULT, reason="no light")]
    with pytest.raises(RecipeError, match=r"good part 10 has no verdict \(no light\)"):
        choose_operating_point(parts, 0.1)


@pytest.mark.parametrize("num_held_out", [0, 5])
def test_enrolment_chooses_it_on_parts_outside_the_bank(
    inspector: Inspector, tmp_path: Path, num_held_out: int
) -> None:
    normals = [frame(i) for i in range(4)]
    held_out = [frame(100 + i) for i in range(num_held_out)]
    recipe = enroll(
        inspector,
        normals,
        tmp_path / "part.toml",
        name="part",
        false_reject_rate=0.2,
        held_out=held_out,
        without_verdict="map",
    )
    chosen = recipe.operating_point
    assert chosen is not None
    assert load_recipe(tmp_path / "part.toml") == recipe
    scores = []
    for i, judged in enumerate(held_out or normals):
        bank = normals if held_out else [other for j, other in enumerate(normals) if j != i]
        inspector.use(inspector.make_bank(bank))
        scores.append(inspector.inspect(judged).score)
    assert chosen.score == pytest.approx(max(scores)), "the largest score of these few parts"
    assert chosen.num_normals == len(scores)
    inspector.use(tmp_path / "part.toml")
    assert inspector.product.operating_point == chosen
    assert inspector.product.without_verdict == "map"
    assert inspector.vision.networks["encoder"].__class__.__module__.endswith("onnxruntime"), (
        "the encoder is restored"
    )


def test_enrolment_refuses_inconsistent_options(inspector: Inspector, tmp_path: Path) -> None:
    out = tmp_path / "part.toml"
    with pytest.raises(ConfigError, match="needs at least 99 good parts, but there are 4"):
        enroll(inspector, [frame(i) for i in range(4)], out, name="part", false_reject_rate=0.01)
    for options in ({"held_out": [frame()]}, {"without_verdict": "map"}):
        with pytest.raises(ConfigError, match="give --false-reject-rate too"):
            enroll(inspector, [frame()], out, name="part", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no_result or map, not 'pass'"):
        enroll(inspector, [frame()], out, name="part", without_verdict="pass")  # type: ignore[arg-type]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("without_verdict = 'map'", "no operating_point"),
        ("without_verdict = 'pass'", "pass"),
        (
            "[operating_point]\nfalse_reject_rate = 0.01\nnum_normals = 99\np_anomaly = 1.5\nscore = 1",
            "at most 1[)]",
        ),
        (
            "[operating_point]\nfalse_reject_rate = 0.9\nnum_normals = 99\np_anomaly = 0.5\nscore = 1",
            "at most 0.5",
        ),
        ("[operating_point]\nfalse_reject_rate = 0.1\nnum_normals = 9\np_anomaly = 0.5\nscore = nan", "nan"),
    ],
)
def test_a_recipe_that_cannot_decide_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"name = 'part'\n{text}\n")
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(path)


def test_records_of_earlier_versions_are_still_read() -> None:
    fields = Record.__struct_fields__
    assert {"decided_by", "contradiction"} <= set(fields)
    assert {f.name for f in msgspec.structs.fields(Record) if f.required}.isdisjoint(
        {"decided_by", "contradiction"}
    )

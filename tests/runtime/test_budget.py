"""The latency budget: all rungs, with a fake clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.inspection.budget import Budget, CostsOfViews, StageCosts
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status
from anomalygpt_edge.runtime.language.decoding import Noise
from anomalygpt_edge.runtime.recipes.recipe import Recipe
from anomalygpt_edge.runtime.vision.views import FrameSize, Tiles

FRAME = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
NUM_STEPS = 8  # passes of the tiny model's answer after the first one, one for each further token


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        yield inspector


@pytest.fixture
def clocked(opened: Inspector, monkeypatch: pytest.MonkeyPatch) -> tuple[Inspector, dict[str, float]]:
    """An inspector with a fake clock that each stage advances by its given seconds."""
    seconds = {"now": 0.0, "preprocess": 1.0, "encode": 1.0, "localise": 1.0, "prompt": 1.0, "pass": 1.0}

    def slow(stage: str) -> None:
        original = getattr(opened.vision, stage)

        def run(*arguments: object) -> object:
            seconds["now"] += seconds[stage]
            return original(*arguments)

        monkeypatch.setattr(opened.vision, stage, run)

    for stage in ("preprocess", "encode", "localise", "prompt"):
        slow(stage)
    decode = opened.language.session.decode

    def slow_decode(*arguments: object) -> object:
        seconds["now"] += seconds["pass"]
        return decode(*arguments)

    monkeypatch.setattr(opened.language.session, "decode", slow_decode)
    monkeypatch.setattr(opened.language.decoder, "drafting", False)
    monkeypatch.setattr(opened, "clock", lambda: seconds["now"])
    opened.language.decoder.ready_prefix()
    return opened, seconds


TIMES = st.floats(0.5, 20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TIMES, TIMES, TIMES, st.floats(0, 250))
def test_every_rung_is_reached_exactly_when_it_fits(
    clocked: tuple[Inspector, dict[str, float]], encode: float, prompt: float, one_pass: float, budget: float
) -> None:
    inspector, seconds = clocked
    inspector.reset_costs()
    seconds.update({"encode": encode, "prompt": prompt, "pass": one_pass})
    whole = inspector.inspect(FRAME)  # measures the costs
    assert whole.rung == "sentence"
    until_map, until_verdict = encode + 2, encode + 2 + prompt + one_pass
    until_sentence = until_verdict + NUM_STEPS * one_pass
    started = seconds["now"]
    verdict = inspector.inspect(FRAME, started + budget)
    took = seconds["now"] - started
    if any(abs(budget - edge) < 1e-6 for edge in (until_map, until_verdict, until_sentence)):
        return  # rounding decides
    assert took <= budget or verdict.rung == "none", "stages that would end late are not started"
    wanted = (
        "none" if budget < until_map else "map" if budget < until_verdict
        else "verdict" if budget < until_sentence else "sentence"
    )  # fmt: skip
    assert verdict.rung == wanted
    assert (verdict.status is Status.NO_RESULT) == (wanted in ("none", "map"))
    assert (verdict.anomaly_map is not None) == (wanted != "none")
    assert (verdict.p_anomaly is not None) == (wanted in ("verdict", "sentence"))
    assert bool(verdict.sentence) == (wanted == "sentence")
    record = verdict.to_record()
    assert record["rung"] == wanted
    assert record["costs_ms"]["encode"] == pytest.approx(1e3 * encode, rel=0.02)
    if verdict.status is Status.NO_RESULT:
        assert "no time for" in verdict.reason


def test_a_stages_cost_is_a_high_percentile_of_its_durations() -> None:
    costs = StageCosts()
    for milliseconds in range(1, 101):
        costs.add("encode", milliseconds / 1e3)
    assert 0.09 < costs.seconds(("encode",)) < 0.1
    assert costs.seconds(("never measured",)) == 0


def test_costs_scale_with_the_views_until_they_are_measured() -> None:
    costs = CostsOfViews()
    costs.of(1).add("encode", 2.0)
    assert costs.of(9).seconds(("encode",)) == pytest.approx(18)
    costs.of(9).add("encode", 12.0)
    assert costs.of(9).seconds(("encode",)) == pytest.approx(12)
    assert costs.of(1).seconds(("encode",)) == pytest.approx(2), (
        "the costs of nine views do not change those of one"
    )
    assert costs.of(8).seconds(("encode",)) == pytest.approx(12 * 8 / 9)
    assert costs.of(8).seconds(("prompt",)) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.5, 5), st.floats(0, 90), st.sampled_from([1, 2]))
@example(0.5, 6.9921875, 1)  # a skipped stage must not seem cheaper for the next view of the same frame
def test_every_view_has_its_verdict_before_any_has_its_sentence(
    clocked: tuple[Inspector, dict[str, float]], one_pass: float, budget: float, together: int
) -> None:
    """Four tiles, answered one or two at a time: all reach the same rung, before the deadline."""
    inspector, seconds = clocked
    recipe = Recipe(name="t", frame=FrameSize(width=64, height=64), tiles=Tiles(rows=2, columns=2))
    inspector.use(recipe)
    inspector.reset_costs()
    seconds["pass"] = one_pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspector.language.decoder, "noise", Noise(0.0, 0.0))  # nothing is decoded again
        assert inspector.language.num_together() >= 2
        num_groups = 4 // together
        patch.setattr(inspector.language, "num_together", lambda question: together)
        assert inspector.inspect(FRAME).rung == "sentence"
        until_verdict = 4 + num_groups * one_pass
        assert inspector.costs.seconds(("verdict",)) == pytest.approx(num_groups * one_pass)
        assert inspector.costs.seconds(("step",)) == pytest.approx(one_pass)
        started = seconds["now"]
        verdict = inspector.inspect(FRAME, started + budget)
        took = seconds["now"] - started
    inspector.use(None)
    if abs(budget - until_verdict) < 1e-6 or abs(budget - 3) < 1e-6:
        return  # rounding decides
    assert took <= budget + 1e-6 or verdict.rung == "none"
    judged = [view for view in verdict.views if view.status is not None]
    assert len(judged) == (4 if budget > until_verdict else 0)
    assert (verdict.status is Status.NO_RESULT) == (budget < until_verdict)
    if budget > until_verdict + (num_groups * NUM_STEPS) * one_pass:
        assert verdict.rung == "sentence"


def test_a_stage_is_tried_again_after_a_slow_period() -> None:
    costs = StageCosts()
    costs.add("encode", 10.0)
    refused = 0
    while refused < 500 and not Budget(costs, lambda: 0.0, 1.0).fits(("encode",)):
        refused += 1
    assert 0 < refused < 500


def test_a_skipped_stage_stays_skipped_for_the_same_part() -> None:
    costs = StageCosts()
    costs.add("step", 1.005)  # one per cent less would fit
    part = Budget(costs, lambda: 0.0, 1.0)
    assert [part.fits(("step",)) for _ in range(3)] == [False] * 3
    assert Budget(costs, lambda: 0.0, 1.0).fits(("step",))

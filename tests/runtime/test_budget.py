"""The deadline ladder, driven through all its rungs by a fake clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.budget import Budget, StageCosts
from anomalygpt_edge.runtime.inspector import Inspector
from anomalygpt_edge.runtime.verdict import Status

FRAME = np.full((64, 64, 3), 128, np.uint8)
NUM_STEPS = 8  # the tiny model's answer: a first pass, then one for each further token


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        yield inspector


@pytest.fixture
def clocked(opened: Inspector, monkeypatch: pytest.MonkeyPatch) -> tuple[Inspector, dict[str, float]]:
    """The inspector on a clock that only its stages advance, each by the seconds it is given."""
    seconds = {"now": 0.0, "preprocess": 1.0, "encode": 1.0, "localise": 1.0, "prompt": 1.0, "pass": 1.0}

    def slow(method: str, stage: str) -> None:
        original = getattr(opened, method)

        def run(*arguments: object) -> object:
            seconds["now"] += seconds[stage]
            return original(*arguments)

        monkeypatch.setattr(opened, method, run)

    for method, stage in (
        ("_preprocess", "preprocess"), ("_encode", "encode"), ("_localise", "localise"), ("_prompt", "prompt"),
    ):  # fmt: skip
        slow(method, stage)
    decode = opened._language.session.decode

    def slow_decode(*arguments: object) -> object:
        seconds["now"] += seconds["pass"]
        return decode(*arguments)

    monkeypatch.setattr(opened._language.session, "decode", slow_decode)
    monkeypatch.setattr(opened._language, "drafting", False)
    monkeypatch.setattr(opened, "_clock", lambda: seconds["now"])
    opened._language._ready_prefix()
    return opened, seconds


TIMES = st.floats(0.5, 20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TIMES, TIMES, TIMES, st.floats(0, 250))
def test_every_rung_is_entered_exactly_when_it_fits(
    clocked: tuple[Inspector, dict[str, float]], encode: float, prompt: float, one_pass: float, budget: float
) -> None:
    inspector, seconds = clocked
    inspector.costs = StageCosts()
    seconds.update({"encode": encode, "prompt": prompt, "pass": one_pass})
    whole = inspector.inspect(FRAME)  # learns the costs
    assert whole.rung == "sentence"
    until_map, until_verdict = encode + 2, encode + 2 + prompt + one_pass
    until_sentence = until_verdict + NUM_STEPS * one_pass
    started = seconds["now"]
    verdict = inspector.inspect(FRAME, started + budget)
    took = seconds["now"] - started
    if any(abs(budget - edge) < 1e-6 for edge in (until_map, until_verdict, until_sentence)):
        return  # rounding decides
    assert took <= budget or verdict.rung == "none", "no stage is begun that cannot end in time"
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


def test_a_stage_costs_what_its_slow_runs_took() -> None:
    costs = StageCosts()
    for milliseconds in range(1, 101):
        costs.add("encode", milliseconds / 1e3)
    assert 0.09 < costs.seconds(("encode",)) < 0.1
    assert costs.seconds(("never measured",)) == 0


def test_a_slow_spell_does_not_shut_a_rung_for_ever() -> None:
    costs = StageCosts()
    costs.add("encode", 10.0)
    budget = Budget(costs, lambda: 0.0, 1.0)
    refusals = 0
    while not budget.fits(("encode",)):
        refusals += 1
    assert 0 < refusals < 500

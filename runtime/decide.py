"""Who says PASS or FAIL: the language model's greedy answer, as in the original, unless the recipe says otherwise.

A recipe may move the operating point (p(anomaly) decides, see ``operating_point.py``), and it may let the map decide
where the deadline left no time for the language model. What decided is in the record, and so is a verdict that
contradicts the sentence.
"""

from __future__ import annotations

from typing import Any

from .bundle import PromptLayout
from .language import Answer
from .recipe import OperatingPoint
from .verdict import Status


def decide(answer: Answer, words: PromptLayout, point: OperatingPoint | None) -> dict[str, Any]:
    """The verdict's ``status``, ``reason``, ``decided_by`` and ``contradiction``.

    Args:
        answer: the language model's.
        words: how it says yes and no.
        point: None: the greedy answer decides.
    """
    if answer.affirmative is None:
        reason = f"the answer is neither yes nor no: {answer.text!r}"
        return {"status": Status.NO_RESULT, "reason": reason}
    said = words.affirmative if answer.affirmative else words.negative
    if point is None:
        status = Status.FAIL if answer.affirmative else Status.PASS
        return {"status": status, "reason": f"answered {said}", "decided_by": "answer"}
    rejected = answer.p_anomaly > point.p_anomaly
    contradiction = rejected != answer.affirmative
    return {
        "status": Status.FAIL if rejected else Status.PASS,
        "reason": _compare("p(anomaly)", answer.p_anomaly, point.p_anomaly)
        + (f", though it answered {said}" if contradiction else ""),
        "decided_by": "operating point",
        "contradiction": contradiction,
    }


def decide_by_map(score: float, point: OperatingPoint, why: str) -> dict[str, Any]:
    """The same without an answer.

    Args:
        score: the map's.
        point: the recipe's.
        why: there is no answer.
    """
    return {
        "status": Status.FAIL if score > point.score else Status.PASS,
        "reason": f"{_compare('map score', score, point.score)}; {why}",
        "decided_by": "map",
    }


def _compare(what: str, value: float, limit: float) -> str:
    return f"{what} {value:.6g} is {'above' if value > limit else 'not above'} the recipe's {limit:.6g}"

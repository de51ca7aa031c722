"""Who says PASS or FAIL: the language model's greedy answer, as in the original, unless the recipe says otherwise.

A recipe may move the operating point (p(anomaly) decides, see ``operating_point.py``), and it may let the map decide
where the deadline left no time for the language model. What decided is in the record, and so is a verdict that
contradicts the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bundles.bundle import PromptLayout
from ..language.answer import Answer
from ..recipes.recipe import OperatingPoint
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
    rejected = not answer.p_anomaly <= point.p_anomaly  # what is no number does not pass
    contradiction = rejected != answer.affirmative
    return {
        "status": Status.FAIL if rejected else Status.PASS,
        "reason": _compare("p(anomaly)", answer.p_anomaly, point.p_anomaly)
        + (f", though it answered {said}" if contradiction else ""),
        "decided_by": "operating point",
        "contradiction": contradiction,
    }


def decide_views(
    names: Sequence[str], answers: Sequence[Answer], words: PromptLayout, point: OperatingPoint | None
) -> tuple[list[Status], int, dict[str, Any]]:
    """The verdict about a part of several views: FAIL if any of them fails, NO_RESULT if any is unclear, PASS only
    if all of them pass.

    Args:
        names: of the views; "" for the whole frame.
        answers: one a view.
        words, point: as for ``decide``.

    Returns:
        The status of each view; which of them decides, of equals the most anomalous; and what ``decide`` says of it,
        with its name in the reason.
    """
    found = [decide(answer, words, point) for answer in answers]
    statuses = [each["status"] for each in found]
    worst = max(statuses, key=(Status.PASS, Status.NO_RESULT, Status.FAIL).index)
    alike = [index for index, status in enumerate(statuses) if status is worst]
    deciding = max(alike, key=lambda index: answers[index].p_anomaly)
    reason = found[deciding]["reason"]
    if names[deciding]:
        reason = f"{names[deciding]}: {reason}"
    if len(names) > 1:
        reason += f" ({len(alike)} of {len(names)} views {worst})"
    return statuses, deciding, {**found[deciding], "reason": reason}


def decide_by_map(score: float, point: OperatingPoint, why: str) -> dict[str, Any]:
    """The same without an answer.

    Args:
        score: the map's.
        point: the recipe's.
        why: there is no answer.
    """
    return {
        "status": Status.PASS if score <= point.score else Status.FAIL,
        "reason": f"{_compare('map score', score, point.score)}; {why}",
        "decided_by": "map",
    }


def _compare(what: str, value: float, limit: float) -> str:
    return f"{what} {value:.6g} is {'not above' if value <= limit else 'above'} the recipe's {limit:.6g}"

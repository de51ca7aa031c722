"""Who decides: the language model's greedy answer, as in the original, unless the recipe says otherwise.

A recipe may set an operating point, a limit of p(anomaly), and it may let the map decide where the deadline leaves no
time for the language model. The record says what decided, and whether the status contradicts the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..bundles.bundle import PromptLayout
from ..language.answer import Answer
from ..recipes.recipe import OperatingPoint
from .verdict import DecidedBy, Status


@dataclass(frozen=True)
class Decision:
    """The status of a part, or of one view of it.

    Attributes:
        decided_by: None for NO_RESULT.
        contradiction: the model's answer says the other thing.
        statuses: of each view, by its answer; empty where no answer led to the decision.
        deciding: index of the view that decides; None where nothing was decided.
    """

    status: Status
    reason: str
    decided_by: DecidedBy | None = None
    contradiction: bool = False
    statuses: tuple[Status, ...] = ()
    deciding: int | None = None

    @property
    def is_of_answers(self) -> bool:
        """Whether the language model's answers led to it."""
        return bool(self.statuses)


def decide(answer: Answer, words: PromptLayout, point: OperatingPoint | None) -> Decision:
    """The decision about one view.

    Args:
        answer: the language model's.
        words: how it says yes and no.
        point: None: the greedy answer decides.
    """
    if answer.affirmative is None:
        return Decision(Status.NO_RESULT, f"the answer is neither yes nor no: {answer.text!r}")
    word = words.affirmative if answer.affirmative else words.negative
    if point is None:
        return Decision(Status.FAIL if answer.affirmative else Status.PASS, f"answered {word}", "answer")
    rejected = not answer.p_anomaly <= point.p_anomaly  # NaN does not pass
    contradiction = rejected != answer.affirmative
    comparison = _compare("p(anomaly)", answer.p_anomaly, point.p_anomaly)
    return Decision(
        Status.FAIL if rejected else Status.PASS,
        f"{comparison}, though it answered {word}" if contradiction else comparison,
        "operating point",
        contradiction,
    )


def decide_views(
    names: Sequence[str], answers: Sequence[Answer], words: PromptLayout, point: OperatingPoint | None
) -> Decision:
    """The decision about a part of several views: FAIL if any of them fails, NO_RESULT if any is unclear, PASS only
    if all of them pass. Of the views with that status the one with the highest p(anomaly) decides.

    Args:
        names: of the views; "" for the whole frame.
        answers: one a view.
        words, point: as for ``decide``.
    """
    found = [decide(answer, words, point) for answer in answers]
    statuses = tuple(each.status for each in found)
    worst = max(statuses, key=(Status.PASS, Status.NO_RESULT, Status.FAIL).index)
    alike = [index for index, status in enumerate(statuses) if status is worst]
    deciding = max(alike, key=lambda index: answers[index].p_anomaly)
    reason = found[deciding].reason
    if names[deciding]:
        reason = f"{names[deciding]}: {reason}"
    if len(names) > 1:
        reason += f" ({len(alike)} of {len(names)} views {worst})"
    return replace(found[deciding], reason=reason, statuses=statuses, deciding=deciding)


def decide_by_map(score: float, point: OperatingPoint, why: str, deciding: int = 0) -> Decision:
    """The decision without an answer.

    Args:
        score: of the map.
        point: the recipe's limits.
        why: why there is no answer.
        deciding: index of the view that the score is of.
    """
    status = Status.PASS if score <= point.score else Status.FAIL
    reason = f"{_compare('map score', score, point.score)}; {why}"
    return Decision(status, reason, "map", deciding=deciding)


def _compare(what: str, value: float, limit: float) -> str:
    return f"{what} {value:.6g} is {'not above' if value <= limit else 'above'} the recipe's {limit:.6g}"

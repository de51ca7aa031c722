"""The decision about a part: by the language model's greedy answer, as in AnomalyGPT, or by the recipe's limits.

The anomaly map can overrule in one direction: a part whose map score is over the limit that few good parts exceed is
rejected although the answer is negative. A recipe may have an operating point, a limit of p(anomaly) that decides
instead of the answer. It may also let the map score decide when there is no time for the language model before the
deadline. The record contains which of them decided, and whether the status contradicts the sentence.
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
        status: the status.
        reason: the reason in a few words.
        decided_by: what decided; None for NO_RESULT.
        contradiction: whether the language model's answer contradicts the status.
        statuses: the status of each view by its answer; empty if the decision is not based on answers.
        deciding: index of the view that decides; None if none does.
    """

    status: Status
    reason: str
    decided_by: DecidedBy | None = None
    contradiction: bool = False
    statuses: tuple[Status, ...] = ()
    deciding: int | None = None

    @property
    def is_of_answers(self) -> bool:
        """Whether the decision is based on the language model's answers."""
        return bool(self.statuses)


def decide(answer: Answer, words: PromptLayout, point: OperatingPoint | None) -> Decision:
    """The decision about one view.

    Args:
        answer: the language model's answer.
        words: the manifest's prompt, with the affirmative and the negative word.
        point: the operating point; None: the greedy answer decides.
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
    """The decision about a part with one or several views.

    It is FAIL if any view fails, otherwise NO_RESULT if any view has no result, otherwise PASS. Among the views with
    that status, the one with the highest p(anomaly) decides.

    Args:
        names: names of the views; "" for the whole frame.
        answers: one answer for each view.
        words, point: as in ``decide``.
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


def overrule(decision: Decision, score: float, limit: float, place: str, view: int, answer: str) -> Decision:
    """The decision, or FAIL instead of PASS if the map score is over the limit.

    Args:
        decision: by the answers.
        score: the highest map score of the views.
        limit: the score that few good parts exceed.
        place: of the highest region ("top left"), with the view's name before it if there are several.
        view: index of the view with this score.
        answer: the language model's answer about this view.
    """
    if decision.status is not Status.PASS or score <= limit:
        return decision
    reason = f"rejected by the map at {place} (score {score:.3g}, limit {limit:.3g}); the model answered "
    statuses = tuple(Status.FAIL if i == view else each for i, each in enumerate(decision.statuses))
    return Decision(Status.FAIL, f"{reason}{answer!r}", "map", True, statuses, view)


def decide_by_map(score: float, point: OperatingPoint, why: str, deciding: int = 0) -> Decision:
    """The decision by the map score, without an answer.

    Args:
        score: the map score.
        point: the recipe's operating point.
        why: the reason why there is no answer.
        deciding: index of the view with this score.
    """
    status = Status.PASS if score <= point.score else Status.FAIL
    reason = f"{_compare('map score', score, point.score)}; {why}"
    return Decision(status, reason, "map", deciding=deciding)


def _compare(what: str, value: float, limit: float) -> str:
    return f"{what} {value:.6g} is {'not above' if value <= limit else 'above'} the recipe's {limit:.6g}"

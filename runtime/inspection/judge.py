"""The language model's answers about all views of a frame, within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..language.answer import Answer, Part
from ..language.model import LanguageModel
from .budget import Budget, PassTimer, StageCosts


def judge(
    language: LanguageModel,
    parts: Sequence[Part],
    question: str,
    budget: Budget,
    costs: StageCosts,
    clock: Callable[[], float],
) -> list[Answer]:
    """One answer for each view, as many at a time as the language model has room for.

    Args:
        parts: its input for each view.
        question: that all of them ask.
        budget: when it ends, answers are cut after their first token: every view's verdict comes before any view's
            sentence.
        costs: of the stages; the durations of the passes are added to them.
        clock: seconds.
    """
    timer = PassTimer(costs, clock, budget, len(parts))
    together = language.num_together(question)
    answers: list[Answer] = []
    for first in range(0, len(parts), together):
        group = parts[first : first + together]
        answers += language.answer_all(group, stop=timer.begin(len(group)))
        timer.lap()
    return answers

"""The language model's answers about all views of a frame, within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..language.answer import Answer, Part
from ..language.model import LanguageModel
from ..vision.batches import Progress
from .budget import Budget, PassTimer, StageCosts


def judge(
    language: LanguageModel,
    parts: Sequence[Part],
    question: str,
    budget: Budget,
    costs: StageCosts,
    clock: Callable[[], float],
    progress: Progress | None = None,
) -> list[Answer]:
    """One answer for each view, in groups as large as fit into the language model's context.

    Args:
        language: the language model.
        parts: its input for each view.
        question: the question of all of them.
        budget: when it runs out, answers are cut after their first token; the verdicts of all views have priority
            over the sentences.
        costs: the stage costs; the durations of the passes are added to them.
        clock: current time in seconds.
        progress: called after each group if there are several.
    """
    timer = PassTimer(costs, clock, budget, len(parts))
    group_size = language.num_together(question)
    answers: list[Answer] = []
    for first in range(0, len(parts), group_size):
        group = parts[first : first + group_size]
        answers += language.answer_all(group, stop=timer.begin(len(group)))
        timer.lap()
        if progress is not None and len(parts) > group_size:
            progress("judge", len(answers), len(parts))
    return answers

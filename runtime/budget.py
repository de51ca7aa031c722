"""The deadline ladder: sentence, verdict, map, none, each rung entered only when its measured cost fits.

What a stage costs is a high percentile of its last durations on this machine: a line is judged by its slowest parts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np

Rung = Literal["sentence", "verdict", "map", "none"]

MAP_STAGES = ("preprocess", "encode", "localise")
VERDICT_STAGES = ("prompt", "verdict")  # "verdict": the language model's first pass
SENTENCE_STAGES = ("step",)  # each pass after that
PERCENTILE = 95
NUM_KEPT = 100
RELAXED = 0.99


class StageCosts:
    """Seconds per stage, learned from what passed."""

    def __init__(self) -> None:
        self._durations: dict[str, deque[float]] = {}
        self._costs: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        durations = self._durations.setdefault(stage, deque(maxlen=NUM_KEPT))
        durations.append(seconds)
        self._costs[stage] = float(np.percentile(durations, PERCENTILE))

    def relax(self, stages: tuple[str, ...]) -> None:
        """These were left out: hold their costs for a little less, so that after a slow spell they are tried again."""
        for stage in stages:
            if durations := self._durations.get(stage):
                self._durations[stage] = deque((RELAXED * seconds for seconds in durations), maxlen=NUM_KEPT)
                self._costs[stage] *= RELAXED

    def seconds(self, stages: tuple[str, ...]) -> float:
        """Of these stages together; one that was never measured costs nothing, so that it is tried."""
        return sum(self._costs.get(stage, 0.0) for stage in stages)

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(1e3 * seconds, 3) for stage, seconds in self._costs.items()}


class Budget:
    """The time left to one part."""

    def __init__(self, costs: StageCosts, clock: Callable[[], float], deadline: float | None) -> None:
        """
        Args:
            costs: of the stages.
            clock: seconds.
            deadline: by the same clock; None leaves all the time in the world.
        """
        self._costs, self._clock = costs, clock
        self._deadline = math.inf if deadline is None else deadline

    def fits(self, stages: tuple[str, ...]) -> bool:
        """Whether these stages would end in time."""
        fits = self._clock() + self._costs.seconds(stages) <= self._deadline
        if not fits:
            self._costs.relax(stages)
        return fits


class PassTimer:
    """Times the passes of an answer, and stops it when another would be late; asked between passes."""

    def __init__(self, costs: StageCosts, clock: Callable[[], float], budget: Budget) -> None:
        self._costs, self._clock, self._budget = costs, clock, budget
        self._stage, self._started = "verdict", clock()

    def __call__(self) -> bool:
        self.lap()
        return not self._budget.fits(SENTENCE_STAGES)

    def lap(self) -> None:
        """A pass has ended."""
        now = self._clock()
        self._costs.add(self._stage, now - self._started)
        self._stage, self._started = "step", now

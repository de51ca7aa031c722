"""The latency budget: the stages of an inspection run only if they are expected to end before the deadline.

How far an inspection came is its rung: "none", "map", "verdict" (the first answer token) or "sentence". A stage's
expected duration is a high percentile of its last durations on this machine, because the slowest parts limit a line.
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
RELAXED = 0.99  # factor for the expected duration of a stage each time it is skipped


class StageCosts:
    """Expected seconds of each stage, from its measured durations."""

    def __init__(self) -> None:
        self._durations: dict[str, deque[float]] = {}
        self._costs: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Add a measured duration."""
        durations = self._durations.setdefault(stage, deque(maxlen=NUM_KEPT))
        durations.append(seconds)
        self._costs[stage] = float(np.percentile(durations, PERCENTILE))

    def relax(self, stages: tuple[str, ...]) -> None:
        """Lower the expected durations of skipped stages a little, so that they are tried again after a slow period."""
        for stage in stages:
            if stage in self._costs:
                durations = self._durations.get(stage, ())
                self._durations[stage] = deque((RELAXED * seconds for seconds in durations), maxlen=NUM_KEPT)
                self._costs[stage] *= RELAXED

    def in_proportion(self, factor: float) -> StageCosts:
        """Expected durations for frames that take ``factor`` times as long, until such a frame is measured."""
        expected = StageCosts()
        expected._costs = {stage: factor * seconds for stage, seconds in self._costs.items()}
        return expected

    def seconds(self, stages: tuple[str, ...]) -> float:
        """Expected seconds of these stages together; 0 for a stage that was never measured, so that it is tried."""
        return sum(self._costs.get(stage, 0.0) for stage in stages)

    def milliseconds(self) -> dict[str, float]:
        """Expected milliseconds of each stage."""
        return {stage: round(1e3 * seconds, 3) for stage, seconds in self._costs.items()}


class CostsOfViews:
    """Stage costs by the number of views of a frame: nine tiles take about nine times as long as the whole frame."""

    def __init__(self) -> None:
        self._costs: dict[int, StageCosts] = {}

    def of(self, num_views: int) -> StageCosts:
        """Costs for frames with ``num_views`` views; before the first one, scaled from the nearest number of views."""
        if num_views not in self._costs:
            nearest = min(self._costs, key=lambda known: abs(known - num_views), default=None)
            self._costs[num_views] = (
                StageCosts() if nearest is None else self._costs[nearest].in_proportion(num_views / nearest)
            )
        return self._costs[num_views]


class Budget:
    """The time left for one part."""

    def __init__(self, costs: StageCosts, clock: Callable[[], float], deadline: float | None) -> None:
        """
        Args:
            costs: expected durations of the stages.
            clock: current time in seconds.
            deadline: in seconds of the same clock; None for no deadline.
        """
        self._costs, self._clock = costs, clock
        self._deadline = math.inf if deadline is None else deadline
        self._refused: dict[tuple[str, ...], float] = {}  # seconds of skipped stages

    def fits(self, stages: tuple[str, ...], reserved: float = 0.0) -> bool:
        """Whether these stages are expected to end ``reserved`` seconds before the deadline."""
        seconds = max(self._costs.seconds(stages), self._refused.get(stages, 0.0))
        fits = self._clock() + seconds + reserved <= self._deadline
        if not fits and stages not in self._refused:
            self._refused[stages] = seconds  # ``relax`` must not affect the next view of this part
            self._costs.relax(stages)
        return fits


class PassTimer:
    """Times the language model's passes for a frame, and stops the answers when another pass would end too late.

    Views that do not fit into the language model's context together are answered group by group. The verdicts of all
    views have priority over the sentences of the first groups.
    """

    def __init__(
        self, costs: StageCosts, clock: Callable[[], float], budget: Budget, num_views: int = 1
    ) -> None:
        self._costs, self._clock, self._budget = costs, clock, budget
        self._num_views = self._num_waiting = num_views
        self._verdict_seconds = 0.0  # duration of the first passes of all groups
        self._in_first_pass, self._started = True, clock()

    def begin(self, num_views: int) -> PassTimer:
        """Start timing the first pass of the next group, which has ``num_views`` views."""
        self._num_waiting -= num_views
        self._in_first_pass, self._started = True, self._clock()
        return self

    def __call__(self) -> bool:
        """Called between passes: whether to stop."""
        self.lap()
        share = self._num_waiting / self._num_views
        return not self._budget.fits(SENTENCE_STAGES, share * self._costs.seconds(("verdict",)))

    def lap(self) -> None:
        """Record the duration of the pass that has ended."""
        now = self._clock()
        if not self._in_first_pass:
            self._costs.add("step", now - self._started)
        else:
            self._verdict_seconds += now - self._started
            if not self._num_waiting:
                self._costs.add("verdict", self._verdict_seconds)
        self._in_first_pass, self._started = False, now

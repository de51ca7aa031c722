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
            if stage in self._costs:
                durations = self._durations.get(stage, ())
                self._durations[stage] = deque((RELAXED * seconds for seconds in durations), maxlen=NUM_KEPT)
                self._costs[stage] *= RELAXED

    def in_proportion(self, factor: float) -> StageCosts:
        """What to expect of frames that take so many times as long, until one of them is measured."""
        expected = StageCosts()
        expected._costs = {stage: factor * seconds for stage, seconds in self._costs.items()}
        return expected

    def seconds(self, stages: tuple[str, ...]) -> float:
        """Of these stages together; one that was never measured costs nothing, so that it is tried."""
        return sum(self._costs.get(stage, 0.0) for stage in stages)

    def milliseconds(self) -> dict[str, float]:
        return {stage: round(1e3 * seconds, 3) for stage, seconds in self._costs.items()}


class CostsOfViews:
    """Costs by the number of views of a frame: nine tiles take about nine times what the whole frame does."""

    def __init__(self) -> None:
        self._costs: dict[int, StageCosts] = {}

    def of(self, num_views: int) -> StageCosts:
        """Learned from frames of so many views; before the first one, in proportion to the nearest number's."""
        if num_views not in self._costs:
            nearest = min(self._costs, key=lambda known: abs(known - num_views), default=None)
            self._costs[num_views] = (
                StageCosts() if nearest is None else self._costs[nearest].in_proportion(num_views / nearest)
            )
        return self._costs[num_views]


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
        self._refused: dict[tuple[str, ...], float] = {}  # seconds that were too many for this part

    def fits(self, stages: tuple[str, ...], reserved: float = 0.0) -> bool:
        """Whether these stages would end in time, with so many seconds left for what must come after them."""
        seconds = max(self._costs.seconds(stages), self._refused.get(stages, 0.0))
        fits = self._clock() + seconds + reserved <= self._deadline
        if not fits and stages not in self._refused:
            self._refused[stages] = seconds  # relaxed for the next part, not for this one's next view
            self._costs.relax(stages)
        return fits


class PassTimer:
    """Times the passes of a frame's answers, and stops an answer when another pass would be late.

    Views that do not fit into the language model's context together are judged one group after the other: every
    view's verdict comes before any view's sentence.
    """

    def __init__(
        self, costs: StageCosts, clock: Callable[[], float], budget: Budget, num_views: int = 1
    ) -> None:
        self._costs, self._clock, self._budget = costs, clock, budget
        self._num_views = self._num_waiting = num_views
        self._verdict_seconds = 0.0  # first passes, all groups together
        self._in_first_pass, self._started = True, clock()

    def begin(self, num_views: int) -> PassTimer:
        """The first pass over a group of so many views comes next."""
        self._num_waiting -= num_views
        self._in_first_pass, self._started = True, self._clock()
        return self

    def __call__(self) -> bool:
        """Asked between passes."""
        self.lap()
        share = self._num_waiting / self._num_views
        return not self._budget.fits(SENTENCE_STAGES, share * self._costs.seconds(("verdict",)))

    def lap(self) -> None:
        """A pass has ended."""
        now = self._clock()
        if not self._in_first_pass:
            self._costs.add("step", now - self._started)
        else:
            self._verdict_seconds += now - self._started
            if not self._num_waiting:
                self._costs.add("verdict", self._verdict_seconds)
        self._in_first_pass, self._started = False, now

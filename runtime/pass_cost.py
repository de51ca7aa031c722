"""What a pass of the language model costs on this machine, by its number of positions: measured, not assumed.

On a GPU sixty-four positions cost little more than one; on a CPU each costs nearly its share, and some numbers are
cheaper than smaller ones (llama.cpp changes its algorithms at certain sizes). So it is timed when a model opens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# ggml's CPU attention works in tiles from 64 rows on, its products in blocks of 16: the 65th row is dear.
SIZES = (1, 2, 4, 16, 48, 63, 64, 65, 96, 128)
MAX_MEASURING_SECONDS = 8.0
QUICK_SECONDS = 0.05  # a shorter pass is timed more than once
NUM_QUICK_RUNS = 5
NUM_LOGITS = 16  # positions whose logits are timed
INSURANCE_SHARE = 0.03  # of a pass's time: what may be spent on less likely drafts
INSURANCE_SECONDS = 0.75e-3  # the same, for short passes


@dataclass(frozen=True, eq=False)
class PassCosts:
    """Seconds of a pass.

    Attributes:
        sizes: numbers of positions, ascending.
        times: seconds, one for each, with the logits of one position.
        logits_seconds: of every further position whose logits are wanted: a draft's all are.
    """

    sizes: np.ndarray
    times: np.ndarray
    logits_seconds: float = 0.0

    def seconds(self, num_positions: np.ndarray | int) -> np.ndarray:
        """Interpolated; beyond the largest size in proportion to the slope of the last two."""
        found = np.interp(num_positions, self.sizes, self.times)
        if len(self.sizes) > 1:
            slope = max(0.0, (self.times[-1] - self.times[-2]) / (self.sizes[-1] - self.sizes[-2]))
            found = found + slope * np.maximum(0, np.asarray(num_positions) - self.sizes[-1])
        return found

    def num_worth_drafting(self, num_positions: int, chances: np.ndarray, saved: float) -> tuple[int, int]:
        """How many draft tokens to add to a pass.

        Args:
            num_positions: the pass without drafts.
            chances: float [n], that each token will be accepted, descending.
            saved: seconds of the step that an accepted token makes needless.

        Returns:
            The number that makes the expected time least; and the number, not smaller, up to which the pass
            becomes 3 % or three quarters of a millisecond longer: insurance, for a line is judged by its slowest parts.
        """
        num_drafted = np.arange(len(chances) + 1)
        cost = self.seconds(num_positions + num_drafted) + self.logits_seconds * num_drafted
        expected = cost - np.concatenate([[0.0], np.cumsum(chances)]) * saved
        best = int(expected.argmin())
        insured = cost[best] + max(INSURANCE_SHARE * cost[best], INSURANCE_SECONDS)
        affordable = np.flatnonzero(cost <= insured)
        return best, max(best, int(affordable[-1]))


def measure_costs(
    run: Callable[[int, int], None], max_positions: int, clock: Callable[[], float] = time.perf_counter
) -> PassCosts:
    """Time passes of growing size until they would take too long together.

    Args:
        run: makes a pass of so many positions that gives the logits of so many.
        max_positions: more than these are not tried.
        clock: seconds.
    """
    sizes: list[int] = []
    times: list[float] = []
    started = clock()
    for size in SIZES:
        if size > max_positions:
            break
        if sizes and clock() - started + times[-1] * size / sizes[-1] > MAX_MEASURING_SECONDS:
            break
        sizes.append(size)
        times.append(time_pass(run, size, 1, clock))
    logits_seconds = 0.0
    if NUM_LOGITS in sizes:
        more = time_pass(run, NUM_LOGITS, NUM_LOGITS, clock) - times[sizes.index(NUM_LOGITS)]
        logits_seconds = max(0.0, more / (NUM_LOGITS - 1))
    return PassCosts(np.array(sizes), np.array(times), logits_seconds)


def time_pass(
    run: Callable[[int, int], None],
    size: int,
    num_logits: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one pass; the best of a few when it is short."""
    times: list[float] = []
    while not times or (times[-1] < QUICK_SECONDS and len(times) < NUM_QUICK_RUNS):
        before = clock()
        run(size, num_logits)
        times.append(clock() - before)
    return min(times)


def fixed_costs(seconds: Sequence[tuple[int, float]]) -> PassCosts:
    """Costs that are known already: (positions, seconds), ascending."""
    sizes, times = zip(*seconds, strict=True)
    return PassCosts(np.array(sizes), np.array(times, float))

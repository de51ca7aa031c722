"""What a pass of the language model costs on this machine, by its number of rows: measured, not assumed.

On a GPU sixty-four rows cost little more than one; on a CPU each costs nearly its share, but not evenly. llama.cpp
multiplies in blocks of sixteen rows, so that of 7B's layers in q4_k_m (two cores) the 17th row costs as much as the
fourteen after it together; and its attention changes its algorithm at 64 rows, so that nano's pass of 64 takes half as
long as one of 63. So passes are timed when a model opens, and a pass is made larger where a larger one is cheaper.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLOCK = 16  # rows that ggml multiplies together
# In the order of what is missed most where a large model leaves no time for all of them. The 17th and the 65th row
# tell how a block begins.
SIZES = (1, 16, 64, 48, 17, 2, 32, 8, 4, 65, 96, 80, 128)
MAX_MEASURING_SECONDS = 8.0
MAX_ROUNDS = 12  # of short passes; something else may run on the machine during some of them
MAX_REPEATING_SECONDS = 1.0
NUM_LOGITS = 16  # rows whose logits are timed
WORTH_PADDING = 0.95  # of its time: a pass is filled up with nothing when that makes it so much shorter
INSURANCE_SECONDS = (
    2e-3  # what may be spent on answers that do not pay, but may be said; of a large model nothing
)
LEAST_CHANCE = 0.02  # and less likely ones are not worth it


@dataclass(frozen=True, eq=False)
class PassCosts:
    """Seconds of a pass.

    Attributes:
        sizes: int [n], numbers of rows, ascending.
        times: float [n], seconds of each, with the logits of one row.
        logits_seconds: of every further row whose logits are wanted: a draft's all are.
    """

    sizes: np.ndarray
    times: np.ndarray
    logits_seconds: float = 0.0

    def seconds(self, num_rows: np.ndarray | int) -> np.ndarray:
        """Of a pass that holds so many rows, filled up where that is cheaper; beyond the largest size measured at
        the price that a row has between the last two."""
        _, times = self._ladder
        largest = len(times) - 1
        found = times[np.minimum(num_rows, largest)]
        if len(self.sizes) > 1:
            slope = max(0.0, (self.times[-1] - self.times[-2]) / (self.sizes[-1] - self.sizes[-2]))
            found = found + slope * np.maximum(0, np.asarray(num_rows) - largest)
        return found

    def cheapest(self, num_rows: int) -> int:
        """The number of rows, at least this, that takes the least time."""
        sizes, _ = self._ladder
        return int(sizes[num_rows]) if num_rows < len(sizes) else num_rows

    @cached_property
    def _ladder(self) -> tuple[np.ndarray, np.ndarray]:
        """For 0, 1, 2 … rows the number to make of them, and its seconds."""
        sizes = np.arange(int(self.sizes[-1]) + 1)
        times = np.interp(sizes, *self._knots())
        best = len(sizes) - 1
        for size in reversed(range(len(sizes))):
            if times[size] < times[best]:
                best = size
            elif times[best] < WORTH_PADDING * times[size]:
                sizes[size], times[size] = best, times[best]
        return sizes, times

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """What was measured, and the first row of every block that was not, as dear a beginning as the 17th row's."""
        known = dict(zip(self.sizes.tolist(), self.times.tolist(), strict=True))
        first = BLOCK + 1
        rise = known.get(2 * BLOCK, 0.0) - known.get(BLOCK, 0.0)
        if first in known and BLOCK in known and rise > 0:
            share = min(1.0, max(0.0, (known[first] - known[BLOCK]) / rise))
            for start in range(2 * BLOCK, int(self.sizes[-1]), BLOCK):
                before, after = np.interp([start, start + BLOCK], self.sizes, self.times)
                known.setdefault(start + 1, float(before + share * max(0.0, after - before)))
        sizes = sorted(known)
        return np.array(sizes), np.array([known[size] for size in sizes])

    def num_worth_drafting(self, num_rows: int, chances: np.ndarray, saved: float) -> int:
        """How many draft tokens to add to a pass.

        The number that makes the expected time least; and beyond that, as insurance, what may well be said, as long
        as the pass becomes little longer by it: a line is judged by its slowest parts.

        Args:
            num_rows: the pass without drafts.
            chances: float [n], that each token will be accepted, descending.
            saved: seconds of the step that an accepted token makes needless.
        """
        num_drafted = np.arange(len(chances) + 1)
        cost = self.seconds(num_rows + num_drafted) + self.logits_seconds * num_drafted
        expected = cost - np.concatenate([[0.0], np.cumsum(chances)]) * saved
        best = int(expected.argmin())
        affordable = int(np.flatnonzero(cost <= cost[best] + INSURANCE_SECONDS)[-1])
        return max(best, min(affordable, int((chances >= LEAST_CHANCE).sum())))


def measure_costs(
    run: Callable[[int, int], None], max_rows: int, clock: Callable[[], float] = time.perf_counter
) -> PassCosts:
    """Time passes of every size, in rounds: the best of each, so that what else runs meanwhile counts little.

    Args:
        run: makes a pass of so many rows that gives the logits of so many.
        max_rows: more than these are not tried.
        clock: seconds.
    """

    def timed(size: int, num_logits: int = 1) -> float:
        before = clock()
        run(size, num_logits)
        return clock() - before

    started = clock()
    times: dict[int, float] = {}
    for size in (size for size in SIZES if size <= max_rows):
        expected = size * times[max(times)] / max(times) if times else 0.0
        if clock() - started + expected <= MAX_MEASURING_SECONDS:
            times[size] = timed(size)
    with_logits = timed(NUM_LOGITS, NUM_LOGITS) if NUM_LOGITS in times else 0.0
    for _ in range(MAX_ROUNDS - 1):
        if clock() - started + sum(times.values()) > MAX_REPEATING_SECONDS:
            break
        times = {size: min(best, timed(size)) for size, best in times.items()}
        if NUM_LOGITS in times:
            with_logits = min(with_logits, timed(NUM_LOGITS, NUM_LOGITS))
    more = with_logits - times.get(NUM_LOGITS, with_logits)
    sizes = sorted(times)
    return PassCosts(
        np.array(sizes), np.array([times[size] for size in sizes]), max(0.0, more / (NUM_LOGITS - 1))
    )


def fixed_costs(seconds: Sequence[tuple[int, float]]) -> PassCosts:
    """Costs that are known already: (rows, seconds), ascending."""
    sizes, times = zip(*seconds, strict=True)
    return PassCosts(np.array(sizes), np.array(times, float))

"""The measured duration of a pass of the language model as a function of its number of rows.

It decides how many draft tokens to add to a pass, and it is not proportional to the number of rows. On a GPU 64 rows
cost little more than one. On a CPU llama.cpp multiplies in blocks of 16 rows: for the layers of the 7B model in q4_k_m
(two cores) the 17th row costs as much as the next fourteen together. From 64 rows on its attention uses another
algorithm: nano's pass of 64 rows takes half as long as one of 63. Therefore passes of several sizes are timed when a
model opens, and a pass is padded where a larger one takes less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLOCK = 16  # rows that ggml multiplies together
# Sizes to time, the most important first, because a large model leaves no time for all of them. 17 and 65 rows show the
# cost of the first row of a block.
SIZES = (1, 16, 64, 48, 17, 2, 32, 8, 4, 65, 96, 80, 128)
MAX_MEASURING_SECONDS = 8.0
MAX_ROUNDS = 12  # repeated measurements, because other processes may slow some of them down
MAX_REPEATING_SECONDS = 1.0
NUM_LOGITS = 16  # rows whose logits are timed
WORTH_PADDING = 0.95  # a pass is padded if that reduces its time to less than this share
# Less likely drafts may make a pass this much longer than the optimum, because they can save a second pass. A large
# model computes no further row in this time.
INSURANCE_SECONDS = 2e-3
LEAST_PROBABILITY = 0.02  # of such a less likely draft token


@dataclass(frozen=True, eq=False)
class PassCosts:
    """Durations of passes.

    Attributes:
        sizes: int [n], the numbers of rows that were timed, ascending.
        times: float [n], seconds of a pass of each size with the logits of one row.
        logits_seconds: seconds for each further row with logits; every draft token needs its logits.
    """

    sizes: np.ndarray
    times: np.ndarray
    logits_seconds: float = 0.0

    def seconds(self, num_rows: np.ndarray | int) -> np.ndarray:
        """Expected seconds of a pass of ``num_rows`` rows, padded where that is cheaper, with the logits of one row.

        Between the measured sizes it is interpolated; beyond the largest one it is extrapolated from the last two.
        """
        _, times = self._padded
        largest = len(times) - 1
        found = times[np.minimum(num_rows, largest)]
        if len(self.sizes) > 1:
            slope = max(0.0, (self.times[-1] - self.times[-2]) / (self.sizes[-1] - self.sizes[-2]))
            found = found + slope * np.maximum(0, np.asarray(num_rows) - largest)
        return found

    def cheapest(self, num_rows: int) -> int:
        """The size to pad a pass of ``num_rows`` rows to; ``num_rows`` itself where padding does not pay."""
        sizes, _ = self._padded
        return int(sizes[num_rows]) if num_rows < len(sizes) else num_rows

    @cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        """For 0, 1, 2 … rows the size to pad them to, int [n], and its seconds, float [n]."""
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
        """Sizes and seconds to interpolate between: those measured, and estimates for the first row of other blocks.

        A block's first row is assumed to take the same share of the block's time as the 17th row of the second block.
        """
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

    def num_worth_drafting(self, num_rows: int, probabilities: np.ndarray, saved: float) -> int:
        """Number of draft tokens to add to a pass.

        It minimises the expected time. Beyond that minimum, tokens of at least ``LEAST_PROBABILITY`` are added as long
        as the pass becomes at most ``INSURANCE_SECONDS`` longer, because the slowest parts limit the line's rate.

        Args:
            num_rows: rows of the pass without drafts.
            probabilities: float [n], the probability that each token is accepted, descending.
            saved: seconds saved by each accepted token, the duration of a pass of one row.
        """
        num_drafted = np.arange(len(probabilities) + 1)
        cost = self.seconds(num_rows + num_drafted) + self.logits_seconds * num_drafted
        expected = cost - np.concatenate([[0.0], np.cumsum(probabilities)]) * saved
        best = int(expected.argmin())
        affordable = int(np.flatnonzero(cost <= cost[best] + INSURANCE_SECONDS)[-1])
        return max(best, min(affordable, int((probabilities >= LEAST_PROBABILITY).sum())))


def measure_costs(
    run: Callable[[int, int], None], max_rows: int, clock: Callable[[], float] = time.perf_counter
) -> PassCosts:
    """Time passes of several sizes in rounds and keep the minimum of each, so that other processes affect it little.

    Args:
        run: runs a pass, given its number of rows and the number of rows with logits.
        max_rows: the largest size to time.
        clock: current time in seconds.
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
    extra = with_logits - times.get(NUM_LOGITS, with_logits)
    sizes = sorted(times)
    return PassCosts(
        np.array(sizes), np.array([times[size] for size in sizes]), max(0.0, extra / (NUM_LOGITS - 1))
    )


def fixed_costs(seconds: Sequence[tuple[int, float]]) -> PassCosts:
    """Costs from known pairs (rows, seconds), ascending."""
    sizes, times = zip(*seconds, strict=True)
    return PassCosts(np.array(sizes), np.array(times, float))

"""The operating point for a false-reject rate, chosen on good parts that the model was not shown.

The limit is a split-conformal quantile: of n good parts, the k-th largest p(anomaly) with k = (n + 1) · rate. Whatever
the distribution, the next good part of the same kind is above it with a probability of at most ``rate``, averaged over
such sets of n; the rate of one particular set is distributed as Beta(k, n + 1 - k). So fewer than 1 / rate - 1 good
parts say nothing about a rate. (Papadopoulos et al., ECML 2002; Vovk, Conditional validity, ACML 2012.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.errors import ConfigError, RecipeError
from ..inspection.verdict import Status, Verdict
from ..recipes.recipe import MAX_FALSE_REJECT_RATE, OperatingPoint

CONFIDENCE = 0.95
ROUNDING = 1e-9


def check_rate(rate: float, num_normals: int) -> None:
    """
    Raises:
        ConfigError: not a rate, or so many good parts cannot tell.
    """
    if not 0 < rate <= MAX_FALSE_REJECT_RATE:
        raise ConfigError(f"a false-reject rate is over 0 and at most {MAX_FALSE_REJECT_RATE}, not {rate:g}")
    if num_normals < (needed := num_normals_needed(rate)):
        within = f"or ask for at least {1 / (num_normals + 1):.2g}" if num_normals > 1 else ""
        raise ConfigError(
            f"a false-reject rate of {rate:g} needs at least {needed} good parts and there are {num_normals}: "
            f"give more {within}".rstrip()
        )


def num_normals_needed(rate: float) -> int:
    """The least number of good parts for which one of them may be above the limit; 2, for one to compare with."""
    return max(2, math.ceil(1 / rate - 1 - ROUNDING))


def num_above(rate: float, num_normals: int) -> int:
    """k: the limit is the k-th largest value."""
    return math.floor((num_normals + 1) * rate + ROUNDING)


def choose_operating_point(verdicts: Sequence[Verdict], rate: float) -> OperatingPoint:
    """
    Args:
        verdicts: of good parts, none of which is in the memory bank it was compared with.
        rate: of good parts that may be rejected, 0..0.5.

    Raises:
        ConfigError: see ``check_rate``.
        RecipeError: a good part had no verdict.
    """
    check_rate(rate, len(verdicts))
    chances: list[float] = []
    scores: list[float] = []
    for number, verdict in enumerate(verdicts, 1):
        if verdict.status is Status.NO_RESULT or verdict.p_anomaly is None or verdict.score is None:
            raise RecipeError(f"good part {number} has no verdict ({verdict.reason}): leave it out")
        chances.append(verdict.p_anomaly)
        scores.append(verdict.score)
    rank = num_above(rate, len(verdicts)) - 1
    return OperatingPoint(
        false_reject_rate=rate,
        num_normals=len(verdicts),
        p_anomaly=sorted(chances, reverse=True)[rank],
        score=sorted(scores, reverse=True)[rank],
    )


def rate_limit(rate: float, num_normals: int) -> float:
    """What the false-reject rate of one set of good parts stays under, with 95 % confidence: quantile of a Beta."""
    rank = num_above(rate, num_normals)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _at_least(rank, num_normals, middle) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def _at_least(count: int, tries: int, chance: float) -> float:
    """Chance of ``count`` or more out of ``tries``, each with ``chance``."""
    return 1.0 - sum(
        math.exp(
            math.lgamma(tries + 1) - math.lgamma(i + 1) - math.lgamma(tries - i + 1)
            + i * math.log(chance) + (tries - i) * math.log1p(-chance)
        )
        for i in range(count)
    )  # fmt: skip

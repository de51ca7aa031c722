"""The operating point for a false-reject rate, chosen on good parts that are not in the memory bank.

The limit is a split-conformal quantile: of n good parts, the k-th largest p(anomaly) with k = (n + 1) · rate. For any
distribution, the probability that the next good part of the same kind exceeds it is at most ``rate``, averaged over
sets of n parts; the rate of one particular set is distributed as Beta(k, n + 1 - k). Fewer than 1 / rate - 1 good parts
are not enough for a rate. (Papadopoulos et al., ECML 2002; Vovk, Conditional validity, ACML 2012.)
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
    """Check a false-reject rate and the number of good parts.

    Raises:
        ConfigError: the rate is out of range, or there are too few good parts for it.
    """
    if not 0 < rate <= MAX_FALSE_REJECT_RATE:
        raise ConfigError(
            f"the false-reject rate must be over 0 and at most {MAX_FALSE_REJECT_RATE}: {rate:g}"
        )
    if num_normals < (needed := num_normals_needed(rate)):
        within = f"or ask for at least {1 / (num_normals + 1):.2g}" if num_normals > 1 else ""
        raise ConfigError(
            f"a false-reject rate of {rate:g} needs at least {needed} good parts, but there are {num_normals}: "
            f"give more {within}".rstrip()
        )


def num_normals_needed(rate: float) -> int:
    """The least number of good parts for a rate; at least 2, so that one can be compared with another."""
    return max(2, math.ceil(1 / rate - 1 - ROUNDING))


def num_above(rate: float, num_normals: int) -> int:
    """k, the rank of the limit: it is the k-th largest value of ``num_normals``."""
    return math.floor((num_normals + 1) * rate + ROUNDING)


def choose_operating_point(verdicts: Sequence[Verdict], rate: float) -> OperatingPoint:
    """Choose the limits of p(anomaly) and map score.

    Args:
        verdicts: verdicts about good parts, none of which was in the memory bank that it was compared with.
        rate: share of good parts that may be rejected, 0..0.5.

    Raises:
        ConfigError: see ``check_rate``.
        RecipeError: a good part has no verdict.
    """
    check_rate(rate, len(verdicts))
    probabilities: list[float] = []
    scores: list[float] = []
    for number, verdict in enumerate(verdicts, 1):
        if verdict.status is Status.NO_RESULT or verdict.p_anomaly is None or verdict.score is None:
            raise RecipeError(f"good part {number} has no verdict ({verdict.reason}): leave it out")
        probabilities.append(verdict.p_anomaly)
        scores.append(verdict.score)
    rank = num_above(rate, len(verdicts)) - 1
    return OperatingPoint(
        false_reject_rate=rate,
        num_normals=len(verdicts),
        p_anomaly=sorted(probabilities, reverse=True)[rank],
        score=sorted(scores, reverse=True)[rank],
    )


def rate_limit(rate: float, num_normals: int) -> float:
    """Upper limit of the false-reject rate of one particular set of good parts, with 95 % confidence."""
    rank = num_above(rate, num_normals)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _at_least(rank, num_normals, middle) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def _at_least(count: int, tries: int, probability: float) -> float:
    """Binomial probability of at least ``count`` successes in ``tries``, each with probability ``probability``."""
    return 1.0 - sum(
        math.exp(
            math.lgamma(tries + 1) - math.lgamma(i + 1) - math.lgamma(tries - i + 1)
            + i * math.log(probability) + (tries - i) * math.log1p(-probability)
        )
        for i in range(count)
    )  # fmt: skip

"""Normal variation: how much good parts of one product differ among themselves, which is the unit of its anomaly maps.

Each normal sample is compared with the others (leave-one-out); a single sample is compared with augmented versions of
itself, the same ones for every product. The distance that a patch has then is the unit of that patch: a part's patch is
as anomalous as its distance exceeds that of the normal patch that it matches. Maps are also divided by the level, the
score of good parts among themselves, so that 1.0 is a good part of any product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np

from ...kernels import match, normalise, prepare_bank, summarise, upsample

LOCAL_SHARE = 0.3  # of a patch's unit that is its own distance; the rest is the mean of its tap
LOCAL_SIDE = 3  # patches per side over which these distances are averaged
SOFTNESS = -4.0  # exponent of the mean of the leave-one-out scores: one unusual sample hardly raises it
LEAST = 1e-6  # smallest unit: a cosine distance below is rounding
SAME = 1e-4  # mean distance below which two samples are copies of one image, which show no variation
MAX_MEASURED = 16  # samples that are compared with each other; of more, evenly spaced ones
MAX_OTHERS = 16 * 1024  # patches that a sample is compared with; of more, evenly spaced ones
# The limit is ``WIDTH`` predicted standard deviations of the logarithm of a good part's score above its mean. The
# deviation of few samples is mixed with that of most products (``PRIOR_SPREAD``, which counts as ``PRIOR_SAMPLES``).
# A single sample does not show how parts differ: ``SINGLE_SPREAD`` is how far its augmented versions mislead.
WIDTH = 1.5
PRIOR_SPREAD, PRIOR_SAMPLES = 0.2, 2
SINGLE_SPREAD = 0.9


class Variation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What good parts of a product score, in the recipe.

    Attributes:
        levels: their score in units of the patches, of each region that has its own patches; maps are divided by it.
        spread: standard deviation of the logarithm of their scores.
        limit: map score, in multiples of the level, that few good parts exceed.
        num_samples: number of different samples it was measured on, at most 16.
    """

    levels: tuple[float, ...]
    spread: float
    limit: float
    num_samples: int

    def __post_init__(self) -> None:
        if not self.levels or not all(0 < value < np.inf for value in (*self.levels, self.limit)):
            raise ValueError("levels and limit must be positive")
        if not 0 <= self.spread < np.inf:
            raise ValueError("the spread must not be negative")


@dataclass(frozen=True, eq=False)
class Measured:
    """The variation of normal samples.

    Attributes:
        units: float32 [samples, views, T, P], the unit of each patch.
        scores: the score of each sample against the others, in multiples of the level; of a single sample those of
            its augmented versions.
        variation: levels, spread and limit.
    """

    units: np.ndarray
    scores: tuple[float, ...]
    variation: Variation


def measure_variation(
    samples: Sequence[np.ndarray],
    versions: Iterable[np.ndarray],
    weights: Sequence[float],
    map_size: int,
    *,
    per_view: bool = False,
    threads: int = 1,
) -> Measured:
    """Measure the variation of normal samples.

    Args:
        samples: patch features of each, float32 [views, T, P, V], not augmented.
        versions: patch features of augmented versions of the first sample; read only if no two samples differ.
        weights: of the taps; empty: equal.
        map_size: side of the maps in pixels.
        per_view: compare each view with the same view of the others only (regions), instead of with all views.
        threads: the most CPU threads to use.
    """
    features = [normalise(sample) for sample in samples]
    shares = tap_shares(weights, features[0].shape[1])
    by_sample = _leave_one_out(features, per_view, threads)
    different = [i for i, found in enumerate(by_sample) if found is not None]
    comparisons = [found for found in by_sample if found is not None]
    if len(different) < 2:
        comparisons = [
            _compare(normalise(version), features[:1], [0], per_view, threads) for version in versions
        ]
        distances = np.mean([found.distance for found in comparisons], axis=0)  # of the one sample's patches
        units = np.repeat(_units(distances[None], per_view), len(features), axis=0)
        different = []
    else:
        own = _units(np.stack([found.distance for found in comparisons]), per_view)
        units = np.empty((len(features), *own.shape[1:]), np.float32)
        units[:] = own.mean(axis=0)  # of samples that are not measured
        units[different] = own
    by_view = np.array([_scores(found, units, shares, map_size, threads) for found in comparisons])
    single = not different
    if not per_view:
        by_view = by_view.max(axis=1, keepdims=True)
    levels = by_view.mean(axis=0) if single else (by_view**SOFTNESS).mean(axis=0) ** (1 / SOFTNESS)
    scores = (by_view / levels).max(axis=1)
    spread = float(np.log(scores).std(ddof=1)) if len(scores) > 1 else 0.0
    limit = overrule_limit(scores, single)
    variation = Variation(tuple(map(float, levels)), spread, limit, max(1, len(different)))
    return Measured(units, tuple(map(float, scores)), variation)


def tap_shares(weights: Sequence[float], num_taps: int) -> np.ndarray:
    """The weights of taps as shares of their sum, float32 [T]; without weights equal ones."""
    shares = np.asarray(weights, np.float64) if len(weights) else np.ones(num_taps)
    return (shares / shares.sum()).astype(np.float32)


def overrule_limit(scores: np.ndarray, single: bool) -> float:
    """The map score that few good parts exceed: about one in fifteen if the logarithm of scores is normal.

    It is the upper end of the prediction interval for the next good part (Hahn and Meeker, Statistical Intervals,
    1991), with a prior for the spread.

    Args:
        scores: float [n], of the samples against each other, or of augmented versions, in multiples of the level.
        single: the scores are of augmented versions of a single sample.
    """
    logarithms = np.log(scores)
    centre = float(logarithms.mean())
    if single:
        return float(np.exp(max(centre, 0.0) + WIDTH * SINGLE_SPREAD))
    squares = float(((logarithms - centre) ** 2).sum())
    degrees = PRIOR_SAMPLES + len(scores) - 1
    variance = (PRIOR_SAMPLES * PRIOR_SPREAD**2 + squares) / degrees
    return float(np.exp(centre + WIDTH * np.sqrt(variance * (1 + 1 / len(scores)))))


@dataclass(frozen=True, eq=False)
class _Comparison:
    """A sample against others: distances float32 [views, T, P], and where the nearest patches are: int [views, T, P]
    of the other's number, its view, and its patch."""

    distance: np.ndarray
    sample: np.ndarray
    view: np.ndarray
    patch: np.ndarray


def _leave_one_out(
    features: Sequence[np.ndarray], per_view: bool, threads: int
) -> list[_Comparison | None]:
    """Each measured sample against the others; None for the rest, and for a copy of an earlier one, which is left out
    everywhere."""
    kept: list[int] = []
    measured = np.unique(np.linspace(0, len(features) - 1, MAX_MEASURED).round().astype(int)).tolist()
    for index in measured:
        sample = features[index]
        if not any(_is_copy(sample, features[other]) for other in kept):
            kept.append(index)
    found: list[_Comparison | None] = [None] * len(features)
    if len(kept) > 1:
        for index in kept:
            others = [other for other in kept if other != index]
            found[index] = _compare(
                features[index], [features[o] for o in others], others, per_view, threads
            )
    return found


def _is_copy(sample: np.ndarray, other: np.ndarray) -> bool:
    """Whether two samples, unit rows [views, T, P, V], show the same image: patch by patch nearly the same features."""
    return float(1 - np.einsum("vtpc,vtpc->vtp", sample, other).mean()) < SAME


def _compare(
    sample: np.ndarray, others: Sequence[np.ndarray], numbers: Sequence[int], per_view: bool, threads: int
) -> _Comparison:
    """A sample, unit rows [views, T, P, V], against others with these numbers."""
    views, taps, patches, width = sample.shape
    distance = np.empty((views, taps, patches), np.float32)
    row = np.empty((views, taps, patches), np.int64)  # over the others, their views, their patches
    groups = [[view] for view in range(views)] if per_view else [list(range(views))]
    for group in groups:
        everything = np.stack([other[group] for other in others])  # [others, group, T, P, V]
        total = len(others) * len(group) * patches
        chosen = np.arange(total)
        if total > MAX_OTHERS:
            chosen = np.linspace(0, total - 1, MAX_OTHERS).round().astype(np.int64)
        for tap in range(taps):
            rows = everything[:, :, tap].reshape(total, width)[chosen]
            bank = prepare_bank(rows[None])
            query = np.ascontiguousarray(sample[group, tap][:, None])
            best, nearest = match(query, bank, indices=True, threads=threads)
            distance[group, tap] = best
            number, place = np.divmod(chosen[nearest[:, 0]], len(group) * patches)
            view, patch = np.divmod(place, patches)
            row[group, tap] = (number * views + np.asarray(group)[view]) * patches + patch
    place, patch = np.divmod(row, patches)
    other, view = np.divmod(place, views)
    return _Comparison(np.maximum(distance, 0), np.asarray(numbers)[other], view, patch)


def _units(distances: np.ndarray, per_view: bool) -> np.ndarray:
    """Units of patches [samples, views, T, P] from their distances to the others."""
    grid = round(distances.shape[-1] ** 0.5)
    planes = distances.reshape(-1, grid, grid).astype(np.float32)
    window = (LOCAL_SIDE, LOCAL_SIDE)
    smooth = np.stack([cv2.blur(plane, window, borderType=cv2.BORDER_REFLECT_101) for plane in planes])
    mean = distances.mean(axis=(0, 3) if per_view else (0, 1, 3), keepdims=True)
    units = LOCAL_SHARE * smooth.reshape(distances.shape) + (1 - LOCAL_SHARE) * mean
    return np.maximum(units, LEAST).astype(np.float32)


def _scores(
    found: _Comparison, units: np.ndarray, shares: np.ndarray, map_size: int, threads: int
) -> list[float]:
    """The score of each view of a sample, in units of the patches."""
    taps = np.arange(len(shares))[:, None]
    scaled = found.distance / units[found.sample, found.view, taps, found.patch]
    patches = np.ascontiguousarray(np.einsum("vtp,t->vp", scaled, shares), np.float32)
    maps = upsample(patches, map_size, threads=threads)
    return [max(summarise(each).top_mean, LEAST) for each in maps]

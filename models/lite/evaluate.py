"""How well the encoder sees: figures on labelled sets, from the distances between patches alone.

Maps are in units of normal variation. A patch's distance is divided by what the normal patch that it matched lies
away from the other normal samples (with one sample: what augmented versions of it lie away from it), and the map by
what good parts score among themselves, so that 1.0 means the same on every product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import upsample
from ...runtime.evaluation.metrics import auroc
from .encoder import LiteEncoder
from .features import Features, tap_name
from .sets import DRAWS, LabelledSet

MAP_SCALE = 2  # pixels of the image per pixel of a map, a side
TOP_SHARE = 0.01  # of a map's pixels, whose mean is the part's score
LOCAL_SHARE = 0.3  # of a patch's unit: the matched normal patch's own; the rest is the mean over all
SOFTNESS = -4.0  # exponent of the mean of what normals score among themselves: one odd sample hardly raises it
LOCAL_SIDE = 3  # patches a side over which the units of normal patches are averaged
Describe = Callable[[Features], Tensor]  # cached features → patch features [N, T, P, V]


def describer(encoder: LiteEncoder, step: int = 16) -> Describe:
    """What turns cached features into the encoder's patch features."""

    @torch.no_grad()
    def describe(features: Features) -> Tensor:
        names = [tap_name(block) for block in encoder.config.tap_blocks]
        taps = zip(*(torch.from_numpy(features[name]).split(step) for name in names), strict=True)
        return torch.cat([encoder.project([encoder.gather(tap.float()) for tap in part]) for part in taps])

    return describe


@dataclass
class Matched:
    """One set's images against each normal image that is used, by the largest cosine in each tap.

    Attributes:
        draws: int [draws, n], rows of the N normals.
        queries, normals: 1 − cosine, float32 [Q, N, T, P] and [N, N, T, P].
        query_nearest, normal_nearest: the patch of that normal image that was nearest, int16, of the same shapes.
        versions: float32 [N, A, T, P], augmented versions of the first normal of each draw to it; others NaN.
        map_size: side of the maps in pixels.
        weights: of the taps, summing to one, float32 [T].
    """

    draws: NDArray[np.int64]
    queries: NDArray[np.float32]
    query_nearest: NDArray[np.int16]
    normals: NDArray[np.float32]
    normal_nearest: NDArray[np.int16]
    versions: NDArray[np.float32]
    map_size: int
    weights: NDArray[np.float32]


@torch.no_grad()
def match(found: LabelledSet, encoder: LiteEncoder, most_normals: int, num_draws: int = DRAWS) -> Matched:
    """Match a set with the normals of its first draws, cut to ``most_normals``."""
    describe = describer(encoder)
    order = found.draws[:num_draws, :most_normals]
    used = np.unique(order)
    draws = np.searchsorted(used, order)
    bank = F.normalize(describe(_rows(found.normals, used)), dim=-1)
    count, taps, patches, _ = bank.shape
    columns = bank.transpose(0, 1).flatten(1, 2).transpose(1, 2).contiguous()  # [T, V, N · P]

    def against_all(rows: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        distance = np.empty((len(rows), count, taps, patches), np.float32)
        nearest = np.empty(distance.shape, np.int16)
        for index, row in enumerate(rows):
            largest = (row @ columns).unflatten(2, (count, patches)).max(dim=-1)  # [T, P, N]
            distance[index] = 1 - largest.values.permute(2, 0, 1).numpy()
            nearest[index] = largest.indices.permute(2, 0, 1).numpy()
        return distance, nearest

    queries = against_all(F.normalize(describe(found.queries), dim=-1))
    normals = against_all(bank)
    num_versions = int((found.augmented_of == used[draws[0, 0]]).sum())
    versions = np.full((count, num_versions, taps, patches), np.nan, np.float32)
    for normal in np.unique(draws[:, 0]):
        rows = F.normalize(describe(_rows(found.augmented, found.augmented_of == used[normal])), dim=-1)
        versions[normal] = 1 - (rows @ bank[normal].transpose(-1, -2)).amax(dim=-1).numpy()
    weights = np.array(encoder.config.tap_weights, np.float32)
    size = found.masks.shape[-1] // MAP_SCALE
    return Matched(draws, *queries, *normals, versions, size, weights / weights.sum())


def _rows(features: Features, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Features:
    return {name: column[chosen] for name, column in features.items()}


class Units:
    """What is normal for one draw of normals, learned from them alone.

    Args:
        matched: the set.
        normals: rows of its normals.
        local_share: see ``LOCAL_SHARE``; 0 leaves only the mean of each tap.
    """

    def __init__(self, matched: Matched, normals: Sequence[int], local_share: float = LOCAL_SHARE) -> None:
        self._matched, self._normals = matched, list(normals)
        variation = np.stack([self._variation(normal) for normal in self._normals])  # [n, T, P]
        mean = variation.mean(axis=(0, 2), keepdims=True)
        self._units = local_share * _smooth(variation) + (1 - local_share) * mean
        if len(self._normals) > 1:
            among = np.stack([self._patches(*self._of_normal(n), leave_out=n) for n in self._normals])
            self.level = float((scores(self._maps(among)) ** SOFTNESS).mean() ** (1 / SOFTNESS))
        else:
            versions = matched.versions[self._normals[0]] / self._units  # [A, T, P]
            self.level = float(scores(self._maps(np.einsum("atp,t->ap", versions, matched.weights))).mean())

    def patches(self) -> NDArray[np.float32]:
        """Patch maps of the queries, 1.0 = what good parts score, float32 [Q, P]."""
        matched = self._matched
        rows = zip(matched.queries, matched.query_nearest, strict=True)
        return np.stack([self._patches(*row) for row in rows]) / np.float32(self.level)

    def maps(self) -> NDArray[np.float32]:
        """``patches`` as maps, float32 [Q, S, S]."""
        return self._maps(self.patches())

    def _variation(self, normal: int) -> NDArray[np.float32]:
        """Distance of a normal's patches to the other normals, or of its augmented versions to it, [T, P]."""
        others = [other for other in self._normals if other != normal]
        if others:
            return self._matched.normals[normal, others].min(axis=0)
        return self._matched.versions[normal].mean(axis=0)

    def _of_normal(self, normal: int) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        return self._matched.normals[normal], self._matched.normal_nearest[normal]

    def _patches(
        self, distance: NDArray[np.float32], nearest: NDArray[np.int16], leave_out: int | None = None
    ) -> NDArray[np.float32]:
        """One image's distances to all normals [N, T, P] → in units, weighted mean of the taps, [P]."""
        places = [place for place, normal in enumerate(self._normals) if normal != leave_out]
        rows = [self._normals[place] for place in places]
        best = distance[rows].argmin(axis=0)[None]  # [1, T, P]
        patch = np.take_along_axis(nearest[rows], best, axis=0)[0]
        taps = np.arange(patch.shape[0])[:, None]
        units = self._units[np.array(places)[best[0]], taps, patch]
        scaled = np.take_along_axis(distance[rows], best, axis=0)[0] / units
        return np.einsum("tp,t->p", scaled, self._matched.weights)

    def _maps(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        return upsample(np.ascontiguousarray(patches, np.float32), self._matched.map_size)


def _smooth(variation: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over neighbouring patches, [n, T, P]."""
    grid = int(variation.shape[-1] ** 0.5)
    planes = variation.reshape(-1, grid, grid)
    window = (LOCAL_SIDE, LOCAL_SIDE)
    smoothed = [cv2.blur(plane, window, borderType=cv2.BORDER_REFLECT_101) for plane in planes]
    return np.asarray(smoothed, np.float32).reshape(variation.shape)


def scores(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the largest values of each map [B, S, S]."""
    flat = maps.reshape(len(maps), -1)
    count = max(1, int(flat.shape[1] * TOP_SHARE))
    return np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:].mean(axis=1)


def pixel_auroc(maps: NDArray[np.float32], masks: NDArray[np.bool_], levels: int = 50_000) -> float:
    """Of all pixels of a set, maps rounded to so many steps; masks [B, M, M] are thinned to the maps' size."""
    step = MAP_SCALE
    truth = masks[:, step // 2 :: step, step // 2 :: step]
    low, high = maps.min(), maps.max()
    steps = ((maps - low) * (levels / max(high - low, 1e-12))).astype(np.int32)
    positives = np.bincount(steps[truth], minlength=levels + 1)
    negatives = np.bincount(steps[~truth], minlength=levels + 1)
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


@dataclass
class Trial:
    """One draw of normals of one set: scores [Q] in units, the truth [Q], and the areas under the curves."""

    scores: NDArray[np.float32]
    defective: NDArray[np.bool_]
    image_auroc: float
    pixel_auroc: float


def try_draw(found: LabelledSet, units: Units) -> Trial:
    maps = units.maps()
    found_scores = scores(maps)
    area = auroc(found.defective, found_scores)
    if area is None:
        raise ValueError(f"{found.name} holds only good or only defective parts")
    return Trial(found_scores, found.defective, area, pixel_auroc(maps, found.masks))


def figures(
    sets: Iterable[LabelledSet],
    encoder: LiteEncoder,
    shots: Sequence[int],
    num_draws: int = DRAWS,
    local_share: float = LOCAL_SHARE,
) -> Iterator[dict[str, object]]:
    """A record of each set and number of normals as it is found, then the means over the sets.

    The balanced accuracy is of one limit for all sets, which for each set the others have chosen.
    """
    trials: dict[int, dict[str, list[Trial]]] = {shot: {} for shot in shots}
    for found in sets:
        matched = match(found, encoder, max(shots), num_draws)
        for shot in shots:
            drawn = [Units(matched, order[:shot], local_share) for order in matched.draws]
            trials[shot][found.name] = [try_draw(found, units) for units in drawn]
            areas = _areas(trials[shot][found.name])
            yield {"set": found.name, "normals": shot, **areas}
    for shot, by_set in trials.items():
        means = _areas([trial for drawn in by_set.values() for trial in drawn])
        accuracy = balanced_accuracy(list(by_set.values()))
        yield {"set": "mean", "normals": shot, **means, "balanced_accuracy": float(np.mean(accuracy))} | {
            f"balanced_{name}": share for name, share in zip(by_set, accuracy, strict=True) if len(by_set) < 12
        }


def _areas(trials: list[Trial]) -> dict[str, float]:
    return {
        "image_auroc": float(np.mean([trial.image_auroc for trial in trials])),
        "pixel_auroc": float(np.mean([trial.pixel_auroc for trial in trials])),
    }


def balanced_accuracy(sets: list[list[Trial]], steps: int = 400) -> list[float]:
    """Of each set, mean over its draws, with the limit that is best for the other sets, all draws together."""
    every = np.concatenate([trial.scores for drawn in sets for trial in drawn])
    limits = np.quantile(every, np.linspace(0, 1, steps))
    table = np.array([np.mean([_balanced(trial, limits) for trial in drawn], axis=0) for drawn in sets])
    found = []
    for index, row in enumerate(table):
        others = np.delete(table, index, axis=0).mean(axis=0) if len(sets) > 1 else row
        best = np.flatnonzero(others >= others.max() - 1e-9)
        found.append(float(row[best[len(best) // 2]]))
    return found


def _balanced(trial: Trial, limits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Balanced accuracy of "defective above the limit" for every limit."""
    above = trial.scores[:, None] > limits
    return (above[trial.defective].mean(axis=0) + (~above[~trial.defective]).mean(axis=0)) / 2

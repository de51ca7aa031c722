"""How well the encoder sees: figures on labelled sets, from the distances between patches alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import upsample
from ...runtime.evaluation.metrics import auroc
from .features import Features
from .sets import DRAWS, NUM_AUGMENTED, LabelledSet

MAP_SIZE = 224
Describe = Callable[[Features], Tensor]  # cached features → patch features [N, T, P, V]


@dataclass
class Distances:
    """Distances of one set's images to each normal image: 1 − max cosine over that image's patches.

    Attributes:
        queries: float32 [Q, N, T, P].
        normals: float32 [N, N, T, P]; an image to itself is 0.
        augmented: float32 [M, N, T, P], versions of normals to the normals.
    """

    queries: NDArray[np.float32]
    normals: NDArray[np.float32]
    augmented: NDArray[np.float32]


@torch.no_grad()
def distances(found: LabelledSet, describe: Describe, most_normals: int = 12, draws: int = DRAWS) -> Distances:
    """Match a set's images with the normals of its first draws, cut to ``most_normals``; what no draw needs is NaN."""
    order = found.draws[:draws, :most_normals]
    used = np.unique(order)
    bank = F.normalize(describe(_rows(found.normals, used)), dim=-1)
    taps, patches = bank.shape[1:3]
    flat = bank.transpose(0, 1).flatten(1, 2).transpose(1, 2).contiguous()  # [T, V, N · P]

    def match(rows: Tensor) -> NDArray[np.float32]:
        out = np.full((len(rows), found.num_normals, taps, patches), np.nan, np.float32)
        for index, row in enumerate(rows):
            nearest = (row @ flat).unflatten(2, (len(used), patches)).amax(dim=-1)  # [T, P, N]
            out[index][used] = 1 - nearest.permute(2, 0, 1).numpy()
        return out

    queries = match(F.normalize(describe(found.queries), dim=-1))
    normals = np.full((found.num_normals, *queries.shape[1:]), np.nan, np.float32)
    normals[used] = match(bank)
    few = np.unique(order[:, :NUM_AUGMENTED])
    versions = np.isin(found.augmented_of, few)
    augmented = np.full((len(versions), *queries.shape[1:]), np.nan, np.float32)
    augmented[versions] = match(F.normalize(describe(_rows(found.augmented, versions)), dim=-1))
    return Distances(queries, normals, augmented)


def _rows(features: Features, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Features:
    return {name: column[chosen] for name, column in features.items()}


def patch_maps(found: NDArray[np.float32], normals: Sequence[int], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """[Q, N, T, P] → nearest of these normals, weighted mean over the taps, [Q, P]."""
    nearest = found[:, list(normals)].min(axis=1)
    return np.einsum("qtp,t->qp", nearest, weights / weights.sum()).astype(np.float32)


def scores(maps: NDArray[np.float32], share: float = 0.01) -> NDArray[np.float32]:
    """Mean of the largest values of each map [B, S, S]."""
    flat = maps.reshape(len(maps), -1)
    count = max(1, int(flat.shape[1] * share))
    return np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:].mean(axis=1)


def pixel_auroc(maps: NDArray[np.float32], masks: NDArray[np.bool_], levels: int = 50_000) -> float:
    """Of all pixels of a set, maps rounded to so many steps; masks [B, M, M] are thinned to the maps' size."""
    step = masks.shape[-1] // maps.shape[-1]
    truth = masks[:, step // 2 :: step, step // 2 :: step]
    low, high = maps.min(), maps.max()
    steps = ((maps - low) * (levels / max(high - low, 1e-12))).astype(np.int32)
    positives = np.bincount(steps[truth], minlength=levels + 1)
    negatives = np.bincount(steps[~truth], minlength=levels + 1)
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


@dataclass
class Trial:
    """One draw of normals of one set.

    Attributes:
        scores: [Q], top 1 % of each map.
        unit: what the normals score among themselves, mean and largest.
    """

    scores: NDArray[np.float32]
    unit: float
    largest: float
    image_auroc: float
    pixel_auroc: float


def try_draw(
    found: LabelledSet, matched: Distances, normals: Sequence[int], weights: NDArray[np.float32], blur: float = 0.0
) -> Trial:
    """Score the queries against these normals, and the normals among themselves (one or two: versions of them)."""

    def as_maps(patches: NDArray[np.float32]) -> NDArray[np.float32]:
        maps = upsample(np.ascontiguousarray(patches), MAP_SIZE)
        if blur:
            maps = np.stack([cv2.GaussianBlur(m, (0, 0), blur) for m in maps])
        return maps

    maps = as_maps(patch_maps(matched.queries, normals, weights))
    image_scores = scores(maps)
    if len(normals) > 2:
        among = [
            scores(as_maps(patch_maps(matched.normals[[n]], [m for m in normals if m != n], weights)))[0]
            for n in normals
        ]
    else:
        versions = np.isin(found.augmented_of, list(normals))
        among = list(scores(as_maps(patch_maps(matched.augmented[versions], normals, weights))))
    return Trial(
        image_scores,
        float(np.mean(among)),
        float(np.max(among)),
        float(auroc(found.defective, image_scores)),  # type: ignore[arg-type]
        pixel_auroc(maps, found.masks),
    )

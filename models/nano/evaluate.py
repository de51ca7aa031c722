"""Accuracy of encoder and image decoder on validation products, logged during training."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ...runtime.synthetic.data import fixed_samples, normalise, validation_families
from ..anomalygpt import few_shot_distance, upsample_map
from ..image_decoder import ImageDecoder
from ..imagebind import VisionEncoder


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; ties count half (Mann-Whitney).

    Args:
        scores: float [N].
        labels: float [N], 1 for positive, 0 for negative.
    """
    values, inverse = np.unique(scores, return_inverse=True)
    positives = np.bincount(inverse, weights=labels, minlength=len(values))
    negatives = np.bincount(inverse, weights=1 - labels, minlength=len(values))
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def pixel_auroc(maps: np.ndarray, masks: np.ndarray, levels: int = 20_000) -> float:
    """``auroc`` over all pixels of maps [B, H, W] in 0..1 and masks bool [B, H, W]. The maps are rounded to ``levels``
    steps, as counting is faster than sorting."""
    steps = np.clip(np.rint(maps * levels), 0, levels).astype(np.int32)
    positives = np.bincount(steps[masks], minlength=levels + 1)
    negatives = np.bincount(steps[~masks], minlength=levels + 1)
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def top_share(maps: np.ndarray, share: float = 0.01) -> np.ndarray:
    """Maps [B, S, S] → mean of the largest values of each map [B]; ``share`` of its pixels count."""
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    return flat[:, -max(1, int(flat.shape[1] * share)) :].mean(axis=1)


@torch.no_grad()
def evaluate_vision(
    encoder: VisionEncoder, decoder: ImageDecoder, text: Tensor, num_families: int = 35, num_queries: int = 4
) -> dict[str, float]:
    """Mean over the families of image AUROC (by the top 1 %) and pixel AUROC, one-shot and zero-shot.

    Args:
        encoder: on the device of ``text``.
        decoder: on the same device.
        text: [2, E], the text features of class "object".
        num_families: from the fixed validation list.
        num_queries: good parts of each family, and the same number of defective ones.
    """
    device = text.device
    figures: dict[str, list[float]] = {}
    for pixels, truth, defective in _validation(num_families, num_queries):
        _, taps = encoder(torch.from_numpy(normalise(pixels)).to(device))
        bank = taps[:1].expand(len(taps) - 1, -1, -1, -1)
        maps = {
            "one_shot": upsample_map(few_shot_distance(taps[1:], bank)),
            "zero_shot": decoder(taps[1:], text),
        }
        for name, anomaly_map in maps.items():
            array = anomaly_map.cpu().numpy()
            figures.setdefault(f"{name}_image", []).append(auroc(top_share(array), defective))
            figures.setdefault(f"{name}_pixel", []).append(pixel_auroc(array, truth))
    return {name: float(np.mean(values)) for name, values in figures.items()}


@functools.cache
def _validation(num_families: int, num_queries: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (the normal sample first), masks of the queries, and their labels (1: defective) of each family."""
    drawn = []
    for family in validation_families(num_families):
        reference, good, bad = fixed_samples(family, 1, num_queries, num_queries)
        pixels = np.stack([s.pixels for s in reference + good + bad])
        drawn.append(
            (pixels, np.stack([s.mask for s in good + bad]), np.repeat([0.0, 1.0], [len(good), len(bad)]))
        )
    return drawn

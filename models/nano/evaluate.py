"""How well the eyes see: figures on held-out products, logged while training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..anomalygpt import few_shot_distance, upsample_map
from ..image_decoder import ImageDecoder
from ..imagebind import VisionEncoder
from .data import held_out_families, held_out_samples, normalise


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half (Mann-Whitney)."""
    values, inverse = np.unique(scores, return_inverse=True)
    positives = np.bincount(inverse, weights=labels, minlength=len(values))
    negatives = np.bincount(inverse, weights=1 - labels, minlength=len(values))
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def top_share(maps: np.ndarray, share: float = 0.01) -> np.ndarray:
    """[B, S, S] → mean of each map's largest values."""
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    return flat[:, -max(1, int(flat.shape[1] * share)) :].mean(axis=1)


@torch.no_grad()
def evaluate_vision(
    encoder: VisionEncoder, decoder: ImageDecoder, text: Tensor, num_families: int = 22, num_queries: int = 4
) -> dict[str, float]:
    """Mean per-family image (top 1 %) and pixel AUROC, 1-shot and zero-shot.

    Args:
        text: [2, E], the text features of class "object".
        num_families: of the fixed held-out list; ``num_queries`` good and as many defective parts of each.
    """
    device = text.device
    figures: dict[str, list[float]] = {}
    for family in held_out_families(num_families):
        reference, good, bad = held_out_samples(family, 1, num_queries, num_queries)
        pixels = normalise(np.stack([s.pixels for s in reference + good + bad]))
        _, taps = encoder(torch.from_numpy(pixels).to(device))
        bank = taps[:1].expand(len(taps) - 1, -1, -1, -1)
        maps = {
            "one_shot": upsample_map(few_shot_distance(taps[1:], bank)),
            "zero_shot": decoder(taps[1:], text),
        }
        truth = np.stack([s.mask for s in good + bad])
        defective = np.array([0.0] * len(good) + [1.0] * len(bad))
        for name, anomaly_map in maps.items():
            array = anomaly_map.cpu().numpy()
            figures.setdefault(f"{name}_image", []).append(auroc(top_share(array), defective))
            pixel = auroc(np.round(array.ravel(), 5), truth.ravel().astype(float))
            figures.setdefault(f"{name}_pixel", []).append(pixel)
    return {name: float(np.mean(values)) for name, values in figures.items()}

"""Figures of merit for anomaly detection: AUROC by rank, accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: how often an anomalous sample scores above a normal one, ties counting half.

    Exact, O(n log n), fit for whole sets of pixels (the rank form of Mann and Whitney's U).

    Args:
        labels: bool or 0/1, any shape; true is anomalous.
        scores: float, same number of elements; higher is more anomalous.

    Returns:
        The area in 0..1, or None where it is not defined: only one kind of sample.

    Raises:
        ValueError: lengths differ, or a score is NaN.
    """
    truth = np.asarray(labels).ravel().astype(bool)
    values = np.asarray(scores, np.float32).ravel()
    if truth.size != values.size:
        raise ValueError(f"{truth.size} labels for {values.size} scores")
    if np.isnan(values).any():
        raise ValueError("a score is NaN: leave that sample out and count it")
    anomalous, normal = values[truth], values[~truth]
    if not anomalous.size or not normal.size:
        return None
    # Sorted queries walk the sorted haystack forwards: far fewer cache misses than in random order.
    anomalous, normal = np.sort(anomalous), np.sort(normal)
    below = np.searchsorted(normal, anomalous, side="left").sum(dtype=np.float64)
    not_above = np.searchsorted(normal, anomalous, side="right").sum(dtype=np.float64)
    return float((below + not_above) / 2 / (float(anomalous.size) * normal.size))


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float | None:
    """Share of predictions equal to their label; None for an empty set."""
    truth, predicted = np.asarray(labels).astype(bool), np.asarray(predictions).astype(bool)
    if truth.shape != predicted.shape:
        raise ValueError(f"{truth.size} labels for {predicted.size} predictions")
    return float((truth == predicted).mean()) if truth.size else None


def mean(values: list[float | None]) -> float | None:
    """Mean of those that are defined; None when none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None

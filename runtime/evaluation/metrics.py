"""Figures of merit for anomaly detection: AUROC by rank, accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: the probability that an anomalous sample scores above a normal one, ties counting half.

    It is exact and takes O(n log n), so it can be used for the pixels of a whole data set (rank form of Mann and
    Whitney's U).

    Args:
        labels: bool or 0/1, any shape; true is anomalous.
        scores: float, the same number of elements; higher is more anomalous.

    Returns:
        The area, 0..1; None if all samples have the same label.

    Raises:
        ValueError: the lengths differ, or a score is NaN.
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
    # Sorted queries access the sorted array in order, with far fewer cache misses than random access.
    anomalous, normal = np.sort(anomalous), np.sort(normal)
    below = np.searchsorted(normal, anomalous, side="left").sum(dtype=np.float64)
    not_above = np.searchsorted(normal, anomalous, side="right").sum(dtype=np.float64)
    return float((below + not_above) / 2 / (float(anomalous.size) * normal.size))


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float | None:
    """Share of predictions that equal their label, 0..1; None for an empty set.

    Raises:
        ValueError: the lengths differ.
    """
    truth, predicted = np.asarray(labels).astype(bool), np.asarray(predictions).astype(bool)
    if truth.shape != predicted.shape:
        raise ValueError(f"{truth.size} labels for {predicted.size} predictions")
    return float((truth == predicted).mean()) if truth.size else None


def mean(values: list[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None

"""How far each stage may be from the float32 reference, in one table; what the limits are made of.

The gate before publishing, the golden tests and the choice of what int8 leaves alone read the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["relative", "absolute", "decorrelation"]


@dataclass(frozen=True)
class Tolerance:
    """Largest error: ``absolute``, ``relative`` to the reference's largest value, or 1 − correlation."""

    kind: Kind
    limit: float


# Precision of the networks → stage → tolerance. The sizes come from rounding, errors of layers adding up as a random
# walk. fp16: unit round-off 2⁻¹¹ = 4.9e-4, 64 residual branches of ViT-H: √64 · 4.9e-4 = 3.9e-3 (measured 1e-3 on
# generated weights); the map's logits carry a factor of 100 and softmax's slope of 1/4. int8: a step of 1/127 of the
# token's peak is off by 1/(127 √12) = 2.3e-3 (RMS), input and weights alike, 128 products: √256 · 2.3e-3 = 0.036, the
# largest of many values three times that. Maps in int8 are held to what they are for, being like float32's: r ≥ 0.999.
TOLERANCES = {
    "fp32": {
        "image_embedding": Tolerance("relative", 1e-4),
        "patch_features": Tolerance("relative", 1e-4),
        "zero_shot_map": Tolerance("absolute", 1e-3),
        "few_shot_distance": Tolerance("absolute", 1e-4),
        "few_shot_map": Tolerance("absolute", 1e-4),
        "prompt_embeddings": Tolerance("relative", 1e-4),
    },
    "fp16": {
        "image_embedding": Tolerance("relative", 5e-3),
        "patch_features": Tolerance("relative", 5e-3),
        "zero_shot_map": Tolerance("absolute", 2e-2),
        "few_shot_map": Tolerance("absolute", 2e-3),
        "prompt_embeddings": Tolerance("relative", 1e-2),
    },
    "int8": {
        "image_embedding": Tolerance("relative", 0.1),
        "patch_features": Tolerance("relative", 0.1),
        "zero_shot_map": Tolerance("decorrelation", 1e-3),
        "few_shot_map": Tolerance("decorrelation", 1e-3),
        "prompt_embeddings": Tolerance("relative", 0.1),
    },
}


def error_of(expected: np.ndarray, actual: np.ndarray, kind: str) -> float:
    """Largest difference, over the reference's largest absolute value when ``kind`` is relative; or 1 − r."""
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return math.inf
    if kind == "decorrelation":
        return 1 - float(np.corrcoef(expected.ravel(), actual.ravel())[0, 1])  # NaN for a flat map: fails
    difference = float(np.abs(expected - actual).max())
    return difference / float(np.abs(expected).max()) if kind == "relative" else difference

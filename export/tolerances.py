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


# Precision of the networks → stage → tolerance. Those of fp16 and int8 are made of what was measured: the worst on the
# gate's images, of a full-size export (generated weights, seed 11), of one a quarter as wide and as deep (seed 21,
# benchmarks/precision_errors.py), and of nano. At full size int8's are those of the ten golden cases.
#
#                      fp16: full, quarter, nano   int8: full, quarter, nano
#   image_embedding    9.6e-4   8.4e-4   0         1.1e-2   8.7e-3   5.0e-3
#   patch_features     7.4e-4   7.2e-4   0         1.2e-2   1.4e-2   1.0e-2
#   zero_shot_map      7.2e-4   1.9e-4   2.7e-4    3.6e-4   2.4e-4   6.4e-6 (1 - r)
#   few_shot_map       1.4e-4   1.1e-4   0         2.7e-6   4.3e-6   1.9e-5 (1 - r)
#   prompt_embeddings  2.4e-4   1.5e-4   6.3e-4    3.4e-3   5.0e-3   3.7e-3
#
# fp16 is allowed five times as much: onnxruntime's CPU rounds the weights only (nano's are float16 numbers, and its
# encoder's error is 0); on a GPU what flows between them and attention's products are rounded too. int8 is allowed
# three times as much, as it rounds the same everywhere; its maps are held to what they are for, being like float32's:
# r ≥ 0.999.
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
        "patch_features": Tolerance("relative", 4e-3),
        "zero_shot_map": Tolerance("absolute", 4e-3),
        "few_shot_map": Tolerance("absolute", 1e-3),
        "prompt_embeddings": Tolerance("relative", 3e-3),
    },
    "int8": {
        "image_embedding": Tolerance("relative", 0.03),
        "patch_features": Tolerance("relative", 0.05),
        "zero_shot_map": Tolerance("decorrelation", 1e-3),
        "few_shot_map": Tolerance("decorrelation", 1e-3),
        "prompt_embeddings": Tolerance("relative", 0.02),
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

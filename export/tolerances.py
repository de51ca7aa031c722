"""The largest accepted error of each stage against the float32 reference, and the measurements behind the limits.

The parity check before publishing, the golden tests and the choice of int8 layers use the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["relative", "absolute", "decorrelation"]


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted error: ``absolute``, ``relative`` to the reference's largest value, or ``decorrelation``,
    1 − Pearson's r."""

    kind: Kind
    limit: float


# Precision of the networks → stage → tolerance. The limits of fp16 and int8 follow from measurements. The table lists
# the largest errors on the images of the parity check: of a full-size export (generated weights, seed 11), of one a
# quarter as wide and as deep (seed 21, benchmarks/precision_errors.py), and of nano. At full size, int8's errors are
# those of the ten golden cases.
#
#                      fp16: full, quarter, nano   int8: full, quarter, nano
#   image_embedding    9.6e-4   8.4e-4   0         1.1e-2   8.7e-3   5.0e-3
#   patch_features     7.4e-4   7.2e-4   0         1.2e-2   1.4e-2   1.0e-2
#   zero_shot_map      7.2e-4   1.9e-4   2.7e-4    3.6e-4   2.4e-4   6.4e-6 (1 - r)
#   few_shot_map       1.4e-4   1.1e-4   0         2.7e-6   4.3e-6   1.9e-5 (1 - r)
#   prompt_embeddings  2.4e-4   1.5e-4   6.3e-4    3.4e-3   5.0e-3   3.7e-3
#
# fp16's limits are five times the measured errors: onnxruntime's CPU engine rounds only the weights (nano's are float16
# numbers, so its encoder's error is 0), while GPUs also round activations and attention's products. int8's limits are
# three times the measured errors, as it rounds the same on every device; its maps must correlate with float32's:
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
    """Error of ``kind`` (see ``Tolerance``) between arrays of one shape; infinite if shapes differ or a value is not
    finite."""
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return math.inf
    if kind == "decorrelation":
        return 1 - float(np.corrcoef(expected.ravel(), actual.ravel())[0, 1])  # NaN for a flat map: fails
    difference = float(np.abs(expected - actual).max())
    return difference / float(np.abs(expected).max()) if kind == "relative" else difference

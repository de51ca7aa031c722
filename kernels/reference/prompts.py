"""A prompt's batch in NumPy."""

from __future__ import annotations

import numpy as np

from ..dequantise import dequantise


def pack_prompt(
    table: np.ndarray, type: str, token_ids: np.ndarray, injected: np.ndarray, out: np.ndarray, threads: int
) -> None:
    own = token_ids >= 0
    out[own] = dequantise(table[token_ids[own]], type)
    out[~own] = injected

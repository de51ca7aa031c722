"""The interface of an implementation of the kernels. The public functions check their arguments, then call it.

Every array that is passed is C-contiguous and has the type that the public function names; only a frame and an
embedding table keep their strides. All shapes fit each other. An implementation may be an object or a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .sampling import Sampling
from .types import Bank


class Implementation(Protocol):
    """Operations, in the order in which a frame passes through them; most write to arrays that the caller made."""

    @property
    def name(self) -> str: ...

    def preprocess(
        self,
        frame: np.ndarray,
        format: str,
        samplings: Sequence[Sampling],
        table: np.ndarray,
        out: np.ndarray,
        threads: int,
    ) -> None:
        """``table`` float32 [3, 256] in RGB order → ``out`` float32 or float16 [B, 3, S, S]."""

    def pack_bank(self, bank: Bank) -> Any:
        """The bank's rows in the layout that ``match`` of this implementation takes."""

    def match(
        self,
        features: np.ndarray,
        bank: Any,
        distance: np.ndarray,
        nearest: np.ndarray | None,
        threads: int,
        gains: np.ndarray | None = None,
        scaled: np.ndarray | None = None,
    ) -> None:
        """``features`` float32 [B, T, P, V] → ``distance`` float32 [B, P], ``nearest`` int32 [B, T, P].

        With ``gains`` float32 [T, N] also ``scaled`` float32 [B, P]; then ``nearest`` is never None.
        """

    def match_places(
        self, features: np.ndarray, reference: np.ndarray, radius: int, out: np.ndarray, threads: int
    ) -> None:
        """``features`` float32 [B, T, G * G, V], ``reference`` float32 [K, T, G * G, V] → ``out`` float32
        [B, K, T, G * G]."""

    def coreset(self, features: np.ndarray, chosen: np.ndarray, threads: int) -> None:
        """``features`` float32 [T, N, V] → ``chosen`` int32 [T, M]."""

    def localise(self, logits: np.ndarray, out: np.ndarray, threads: int) -> None:
        """``logits`` float32 [B, T, G * G, 2] → ``out`` float32 [B, S, S]."""

    def upsample(self, patch_map: np.ndarray, out: np.ndarray, threads: int) -> None:
        """``patch_map`` float32 [B, G * G] → ``out`` float32 [B, S, S]."""

    def project(self, maps: np.ndarray, places: np.ndarray, out: np.ndarray, threads: int) -> None:
        """``maps`` float32 [M, S, S], ``places`` float64 [M, 6] → ``out`` float32 [H, W], only where covered."""

    def summarise(self, anomaly_map: np.ndarray, count: int) -> tuple[float, float, float, float]:
        """float32 [H, W] → peak, lowest, median, mean of the ``count`` highest."""

    def cell_peaks(self, anomaly_map: np.ndarray, out: np.ndarray) -> None:
        """float32 [H, W] → ``out`` float32 [cells, cells]."""

    def components(self, anomaly_map: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        """float32 [H, W] → int32 [R, 5] (x, y, width, height, area), float32 [R] peaks."""

    def pack_prompt(
        self,
        table: np.ndarray,
        type: str,
        token_ids: np.ndarray,
        injected: np.ndarray,
        out: np.ndarray,
        threads: int,
    ) -> None:
        """``table`` uint8 [vocab, row bytes], ``token_ids`` int32 [L] → ``out`` float32 [L, D]."""

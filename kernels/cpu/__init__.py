"""The C++ kernels: one implementation for each instruction-set level that this machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from .. import reference
from ..sampling import Sampling, Taps
from ..types import Bank

_native = import_module("._native", __name__)  # "from . import" would report a missing one as circular

_FORMATS = {"BGR8": 0, "RGB8": 1, "Mono8": 2, "NV12": 3, "YUYV": 4, "BayerRG8": 5}  # kernels.h, Format
_ROWS = {"F32": 0, "F16": 1, "BF16": 2, "Q8_0": 3, "Q4_0": 4, "Q4_K": 5, "Q6_K": 6}  # kernels.h, Rows


def levels() -> list[Level]:
    """Every instruction-set level that this machine runs, the fastest first."""
    return [Level(name) for name in _native.levels()]


@dataclass(frozen=True)
class Level:
    """``implementation.Implementation`` on one level: "cpu-vnni", "cpu-avx2", "cpu-baseline" …"""

    name: str

    def preprocess(
        self,
        frame: np.ndarray,
        format: str,
        samplings: Sequence[Sampling],
        table: np.ndarray,
        out: np.ndarray,
        threads: int,
    ) -> None:
        boxes = [(*map(int, sampled.box[:4]), sampled.rotation) for sampled in samplings]
        filters = [(_filter(self.name, s.across), _filter(self.name, s.down)) for s in samplings]
        values = table.astype(out.dtype, copy=False)
        _native.preprocess(self.name, frame, _FORMATS[format], boxes, filters, values, out, threads)

    def pack_bank(self, bank: Bank) -> Any:
        return _native.Bank(self.name, bank.rows, bank.scales)

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
        _native.match(bank, features, distance, nearest, threads, gains, scaled)

    def match_places(
        self, features: np.ndarray, reference: np.ndarray, radius: int, out: np.ndarray, threads: int
    ) -> None:
        _native.match_places(self.name, features, reference, radius, out, threads)

    def coreset(self, features: np.ndarray, chosen: np.ndarray, threads: int) -> None:
        _native.coreset(self.name, features, chosen, threads)

    def localise(self, logits: np.ndarray, out: np.ndarray, threads: int) -> None:
        _native.localise(self.name, logits, round(logits.shape[2] ** 0.5), out, threads)

    def upsample(self, patch_map: np.ndarray, out: np.ndarray, threads: int) -> None:
        _native.upsample(self.name, patch_map, round(patch_map.shape[1] ** 0.5), out, threads)

    def project(self, maps: np.ndarray, places: np.ndarray, out: np.ndarray, threads: int) -> None:
        _native.project(maps, places, out, threads)

    def summarise(self, anomaly_map: np.ndarray, count: int) -> tuple[float, float, float, float]:
        return _native.summarise(anomaly_map, count)

    def cell_peaks(self, anomaly_map: np.ndarray, out: np.ndarray) -> None:
        _native.cell_peaks(self.name, anomaly_map, out)

    def components(self, anomaly_map: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        return _native.components(anomaly_map, level)

    def pack_prompt(
        self,
        table: np.ndarray,
        type: str,
        token_ids: np.ndarray,
        injected: np.ndarray,
        out: np.ndarray,
        threads: int,
    ) -> None:
        if type in _ROWS:
            _native.pack_prompt(self.name, table, _ROWS[type], token_ids, injected, out, threads)
        else:
            reference.pack_prompt(table, type, token_ids, injected, out, threads)


@lru_cache(maxsize=1024)
def _filter(level: str, taps: Taps) -> Any:
    return _native.Filter(level, taps.starts, taps.counts, taps.weights)

"""Nearest normal patches in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ..types import COSINE_EPSILON, Bank

CHUNK = 4096  # bank rows of one product: the similarity matrix is never whole
EXACT_WIDTH = 2**24 // 127**2  # up to here float32 sums of int8 products are exact
SMALLEST = np.float32(1e-30)  # of a patch's largest value: below, it counts as zero


def pack_bank(bank: Bank) -> Bank:
    return bank


def match(
    features: np.ndarray,
    bank: Bank,
    distance: np.ndarray,
    nearest: np.ndarray | None,
    threads: int,
    gains: np.ndarray | None = None,
    scaled: np.ndarray | None = None,
) -> None:
    total = np.zeros(distance.shape, np.float32)
    if scaled is not None:
        scaled[:] = 0
    for tap, (rows, scales) in enumerate(zip(bank.rows, bank.scales, strict=True)):
        best, index = _best(features[:, tap], rows, scales)
        total += best
        if nearest is not None:
            nearest[:, tap] = np.where(np.isnan(best), -1, index)
        if gains is not None and scaled is not None:
            scaled += gains[tap, index] * np.maximum(1 - best, 0)  # maximum keeps NaN
    distance[:] = 1 - total / np.float32(len(bank.rows))


def _best(queries: np.ndarray, rows: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest cosine similarity of float32 [B, P, V] with rows [N, V], and where: [B, P] each."""
    length = np.sqrt(np.einsum("bpv,bpv->bp", queries, queries, dtype=np.float64))
    inverse = (1 / np.maximum(length, COSINE_EPSILON)).astype(np.float32)
    valid = np.isfinite(queries).all(axis=-1)
    queries = np.where(valid[..., None], queries, 0)
    if rows.dtype == np.int8:
        peak = np.abs(queries).max(axis=-1)
        inverse = np.where(peak < SMALLEST, 0, inverse * (peak / np.float32(127)))
        queries = np.rint(queries * (np.float32(127) / np.maximum(peak, SMALLEST))[..., None])
        queries[peak < SMALLEST] = 0
        if queries.shape[-1] > EXACT_WIDTH:
            queries = queries.astype(np.float64)
    else:
        queries = queries * inverse[..., None]
        inverse = np.ones_like(inverse)
    best = np.full(length.shape, -np.inf, np.float32)
    index = np.zeros(length.shape, np.int32)
    for first in range(0, len(rows), CHUNK):
        chunk = slice(first, first + CHUNK)
        similarity = (queries @ rows[chunk].astype(queries.dtype).T).astype(np.float32) * scales[chunk]
        where = similarity.argmax(axis=-1)
        value = np.take_along_axis(similarity, where[..., None], axis=-1)[..., 0]
        index = np.where(value > best, first + where, index)
        best = np.maximum(best, value)
    return np.where(valid, best * inverse, np.float32(np.nan)).astype(np.float32), index


def match_places(
    features: np.ndarray, reference: np.ndarray, radius: int, out: np.ndarray, threads: int
) -> None:
    side = math.isqrt(features.shape[2])
    length = np.sqrt(np.einsum("btpv,btpv->btp", features, features, dtype=np.float64))
    inverse = (1 / np.maximum(length, COSINE_EPSILON)).astype(np.float32)
    inverse[~np.isfinite(features).all(axis=-1)] = np.nan
    part = _grid(features * inverse[..., None], side)[:, None]
    normal = _grid(reference, side)[None]
    best = np.full((*out.shape[:3], side, side), -np.inf, np.float32)
    shifts = [_shifted(side, by) for by in range(-min(radius, side - 1), min(radius, side - 1) + 1)]
    for (y, part_y), (x, part_x) in itertools.product(shifts, shifts):
        cosine = np.einsum("bktyxv,bktyxv->bktyx", normal[:, :, :, y, x], part[:, :, :, part_y, part_x])
        best[:, :, :, y, x] = np.maximum(best[:, :, :, y, x], cosine)  # keeps NaN
    out[:] = 1 - best.reshape(out.shape)


def _grid(patches: np.ndarray, side: int) -> np.ndarray:
    return patches.reshape(*patches.shape[:2], side, side, patches.shape[-1])


def _shifted(side: int, by: int) -> tuple[slice, slice]:
    """Indices of a grid's side, and the same moved by ``by``, as far as both are in the grid."""
    return slice(max(0, -by), side - max(0, by)), slice(max(0, by), side - max(0, -by))


def coreset(features: np.ndarray, chosen: np.ndarray, threads: int) -> None:
    for rows, picks in zip(features, chosen, strict=True):
        picks[0] = (rows @ rows.mean(axis=0, dtype=np.float64).astype(np.float32)).argmax()
        nearest = rows @ rows[picks[0]]
        for step in range(1, len(picks)):
            nearest[picks[step - 1]] = np.inf  # never twice
            picks[step] = nearest.argmin()
            np.maximum(nearest, rows @ rows[picks[step]], out=nearest)

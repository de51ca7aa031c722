"""Compares patch features of a part with those of normal samples: the original's few-shot distance."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np

from .choice import implementation
from .types import COSINE_EPSILON, Bank, aligned, check_host

STORAGE = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8))


def normalise(features: np.ndarray) -> np.ndarray:
    """Unit length along the last axis: float32 [..., V] → float32 [..., V]; a zero vector stays zero."""
    length = np.sqrt(np.einsum("...v,...v->...", features, features, dtype=np.float64))[..., None]
    return (features / np.maximum(length, COSINE_EPSILON)).astype(np.float32)


def prepare_bank(features: np.ndarray, dtype: Any = np.float32) -> Bank:
    """Normalise the patch features of normal samples once, and round them for storage.

    Args:
        features: float [T, N, V], raw or normalised.
        dtype: float32; float16 (half the memory, distances to 1e-3); int8 (a quarter; each row is
            rounded to 127ths of its largest value, map correlation ≥ 0.9995).

    Raises:
        ValueError: another shape or type, no patch, or a feature that is not finite.
    """
    check_host("prepare_bank", features)
    dtype = np.dtype(dtype)
    if features.ndim != 3 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(
            f"a bank is made of float features [T, N, V] with N >= 1, not {features.dtype} {list(features.shape)}"
        )
    if dtype not in STORAGE:
        raise ValueError(f"a bank is stored as float32, float16 or int8, not {dtype}")
    if not np.isfinite(features).all():
        raise ValueError("a bank's features must be finite: leave out the sample that gives others")
    unit = normalise(features.astype(np.float32))
    scales = np.ones(unit.shape[:2], np.float32)
    if dtype == np.int8:
        scales = np.maximum(np.abs(unit).max(axis=-1) / np.float32(127), np.float32(1e-30))
        unit = np.rint(unit / scales[..., None])
    return Bank(np.ascontiguousarray(unit, dtype), scales.astype(np.float32))


@overload
def match(
    patch_features: np.ndarray, bank: Bank | np.ndarray, *, indices: Literal[False] = False, threads: int = 1
) -> np.ndarray: ...


@overload
def match(
    patch_features: np.ndarray, bank: Bank | np.ndarray, *, indices: Literal[True], threads: int = 1
) -> tuple[np.ndarray, np.ndarray]: ...


def match(
    patch_features: np.ndarray, bank: Bank | np.ndarray, *, indices: bool = False, threads: int = 1
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """The original's few-shot distance: 1 − max cosine similarity with any normal patch, mean over the taps.

    Args:
        patch_features: float32 [B, T, P, V], raw taps of the queries. With an int8 bank each patch is rounded to
            127ths of its largest value, too.
        bank: made by ``prepare_bank``; an array [T, N, V] is prepared again in every call.
        indices: also return which row of the bank is nearest.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [B, P], 0 = identical to some normal patch; NaN where a feature is not finite. With ``indices``
        also int32 [B, T, P]: the index of the nearest row of the bank in each tap; ties go to the lowest index; -1
        where a feature of the tap is not finite. ``nearest_row`` selects one row for all taps.

    Raises:
        ValueError: shapes or types that do not fit each other.
    """
    bank = _check_match("match", patch_features, bank)
    chosen = implementation()
    batch, taps, patches, _ = patch_features.shape
    distance = np.empty((batch, patches), np.float32)
    nearest = np.empty((batch, taps, patches), np.int32) if indices else None
    features = aligned(patch_features)
    chosen.match(features, bank.packed_for(chosen), distance, nearest, threads)
    return distance if nearest is None else (distance, nearest)


def match_scaled(
    patch_features: np.ndarray, bank: Bank | np.ndarray, gains: np.ndarray, *, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``match``, and the distances once more in the units of the rows that are nearest.

    Normal parts vary more at some places than at others. With ``gains[t, n]`` = weight of tap t / distance that is
    usual for normal patches like row n, a value of 1 means: as far from the bank as a normal part.

    Args:
        patch_features, bank, threads: as in ``match``.
        gains: float32 [T, N], finite: the factor of each row of the bank. The values are not checked.

    Returns:
        distance: float32 [B, P], exactly as ``match`` returns it.
        scaled: float32 [B, P], the sum over the taps of ``gains[t, nearest[b, t, p]] * max(0, 1 - similarity)``; NaN
            where a feature is not finite.
        nearest: int32 [B, T, P], exactly as ``match`` returns it.

    Raises:
        ValueError: shapes or types that do not fit each other.
    """
    bank = _check_match("match_scaled", patch_features, bank)
    check_host("match_scaled", gains)
    if gains.shape != bank.scales.shape or gains.dtype != np.float32:
        raise ValueError(
            f"match_scaled takes float32 gains {list(bank.scales.shape)}, one for each tap and row of the bank, "
            f"not {gains.dtype} {list(gains.shape)}"
        )
    chosen = implementation()
    batch, taps, patches, _ = patch_features.shape
    distance, scaled = np.empty((2, batch, patches), np.float32)
    nearest = np.empty((batch, taps, patches), np.int32)
    features = aligned(patch_features)
    chosen.match(features, bank.packed_for(chosen), distance, nearest, threads, aligned(gains), scaled)
    return distance, scaled, nearest


def match_places(
    patch_features: np.ndarray, reference: np.ndarray, radius: int, *, threads: int = 1
) -> np.ndarray:
    """The reverse of ``match``: is what normal images show at a place found near that place of the part?

    ``match`` compares each patch of the part with all normal patches, so it does not notice that something is
    missing if what is there instead is normal elsewhere.

    Args:
        patch_features: float32 [B, T, P, V], raw taps of the part; the P = G * G patches form a square grid.
        reference: float32 [K, T, P, V], patch features of K normal images of unit length (``normalise``); the values
            are not checked.
        radius: of the square window of (2 * radius + 1)² patches around each place, at least 0. The window ends at
            the border of the grid.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [B, K, T, P]: 1 − largest cosine similarity of the reference's patch with the part's patches in the
        window around the same place; 0 = one of them is identical. NaN where a feature in the window is not finite.

    Raises:
        ValueError: shapes or types that do not fit each other, patches that form no square, or a negative radius.
    """
    check_host("match_places", patch_features, reference)
    shape = patch_features.shape
    if patch_features.ndim != 4 or reference.ndim != 4 or shape[1:] != reference.shape[1:] or 0 in shape:
        raise ValueError(
            f"match_places takes features [B, T, P, V] and a reference [K, T, P, V] of the same T, P and V, "
            f"not {list(shape)} and {list(reference.shape)}"
        )
    if patch_features.dtype != np.float32 or reference.dtype != np.float32 or len(reference) == 0:
        raise ValueError(
            f"match_places takes float32 features and at least one float32 reference, "
            f"not {patch_features.dtype} and {len(reference)} of {reference.dtype}"
        )
    if math.isqrt(shape[2]) ** 2 != shape[2] or radius < 0:
        raise ValueError(
            f"match_places takes the patches of a square grid and a radius of at least 0, not {shape[2]} patches "
            f"and {radius}"
        )
    out = np.empty((shape[0], len(reference), *shape[1:3]), np.float32)
    implementation().match_places(aligned(patch_features), aligned(reference), int(radius), out, threads)
    return out


def _check_match(name: str, patch_features: np.ndarray, bank: Bank | np.ndarray) -> Bank:
    """The bank, prepared, if the features fit it; ``name`` is the function that was called, for the message.

    Raises:
        ValueError: shapes or types that do not fit each other.
    """
    check_host(name, patch_features)
    if not isinstance(bank, Bank):
        bank = prepare_bank(bank)
    taps, _, width = bank.rows.shape
    if patch_features.ndim != 4 or patch_features.shape[1::2] != (taps, width) or 0 in patch_features.shape:
        raise ValueError(
            f"{name} takes features [B, T, P, V] and a bank [T, N, V] of the same T and V, "
            f"not {list(patch_features.shape)} and {list(bank.rows.shape)}"
        )
    if patch_features.dtype != np.float32:
        raise ValueError(f"{name} takes float32 features, not {patch_features.dtype}: convert them")
    return bank


def nearest_row(nearest: np.ndarray) -> int:
    """One row of the bank for a patch, from its nearest rows in each tap, int32 [T].

    It is the row that is nearest in the most taps. If rows tie, the deepest tap that has one of them
    decides, because its features carry the most meaning.
    """
    rows, counts = np.unique(nearest, return_counts=True)
    often = set(rows[counts == counts.max()].tolist())
    return next(int(row) for row in nearest[::-1] if int(row) in often)


def check_choice(name: str, features: np.ndarray, size: int) -> None:
    """Check the arguments of a function that chooses rows of a bank.

    Args:
        name: the function that was called, for the message.
        features: finite float32 [T, N, V].
        size: rows to keep in each tap, at least 1.

    Raises:
        ValueError: another shape, type or size, or a value that is not finite.
    """
    if features.ndim != 3 or 0 in features.shape or features.dtype != np.float32 or size < 1:
        raise ValueError(
            f"{name} takes float32 [T, N, V] and a size of at least 1, "
            f"not {features.dtype} {list(features.shape)} and {size}"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{name} takes finite features: leave out the sample that gives others")


def coreset(features: np.ndarray, size: int, *, threads: int = 1) -> np.ndarray:
    """Choose the rows of a bank that cover the others best: greedy k-centre in each tap (PatchCore, Roth et al. 2022).

    The first row is the one nearest the mean direction; each next one is the farthest, in cosine distance, from
    those chosen. Ties go to the lowest index.

    Args:
        features: float32 [T, N, V] of unit length (``normalise``).
        size: rows to keep in each tap; all rows are kept if there are no more.
        threads: at most this many CPU threads work on it.

    Returns:
        int32 [T, min(size, N)]: rows of each tap in the order they were chosen, so that a prefix is a smaller
        coreset.

    Raises:
        ValueError: another shape, type or size, or a value that is not finite.
    """
    check_host("coreset", features)
    check_choice("coreset", features, size)
    chosen = np.empty((features.shape[0], min(size, features.shape[1])), np.int32)
    implementation().coreset(aligned(features), chosen, threads)
    return chosen

"""Which rows a bank with copies keeps: those that cover the rest, chosen so that noise changes few of them.

Greedy k-centre (``kernels.coreset``) takes one row at a time, and each choice turns on all before it: among copies that
hardly differ, int8's noise changes an early choice and then many later ones. The bank is as good, but another, and
AUROC over a few dozen images moves by hundredths with it. In a few rounds of many rows each a row is kept for its own
distance, and noise matters to rows at a round's edge: of 1,024 rows of 4,096 int8's leaves 99 % the same, of the
greedy choice 89 % (``models/nano/training/ablation.md``).
"""

from __future__ import annotations

import numpy as np

from ...kernels.matching import check_choice

ROUNDS = 4
FIRST = 1 / 16  # of the rows kept, in the first round; each later one makes them 2.5 times as many
NEAR = 0.3  # of its own distance: a row that is so near to a farther one waits until the others are in
CANDIDATES = 3  # times as many as a round takes
CHUNK = 256  # rows that all others are compared with at once: 12 MB for 12,288 rows
GOLDEN_RATIO = 0.6180339887498949  # its multiples modulo 1 are spread evenly, however many there are


def cover(rows: np.ndarray, size: int) -> np.ndarray:
    """Choose the rows of each tap that cover the others, in ``ROUNDS`` rounds.

    The first round is spread evenly over the indices, whatever the rows show: over all samples and copies and all
    places in them, without falling into step with the grid of patches. Each later round takes the rows that are
    farthest, in cosine distance, from all that is kept so far, at once, without near duplicates where there is a
    choice; of equals the lowest.

    Args:
        rows: float32 [T, N, V] of unit length (``kernels.normalise``).
        size: rows to keep in each tap; all when there are no more.

    Returns:
        int32 [T, min(size, N)]: indices of each tap's rows, ascending.

    Raises:
        ValueError: another shape, type or size, or a value that is not finite.
    """
    check_choice("cover", rows, size)
    return np.stack([_cover_tap(tap, min(size, rows.shape[1])) for tap in rows])


def _cover_tap(rows: np.ndarray, size: int) -> np.ndarray:
    """float32 [N, V] → int32 [size], ascending."""
    ends = np.ceil(size * FIRST ** np.linspace(1, 0, ROUNDS)).astype(int)
    new = kept = (np.arange(ends[0]) * GOLDEN_RATIO % 1 * len(rows)).astype(np.int64)
    similarity = np.full(len(rows), -np.inf, np.float32)  # cosine of each row with the kept one most like it
    for end in ends[1:]:
        for start in range(0, len(new), CHUNK):
            np.maximum(similarity, (rows @ rows[new[start : start + CHUNK]].T).max(axis=1), out=similarity)
        similarity[new] = np.inf  # never twice
        share, left = end - len(kept), len(rows) - len(kept)
        candidates = np.argsort(similarity, kind="stable")[: min(CANDIDATES * share, left)]
        near = _near_farther(rows[candidates], NEAR * (1 - similarity[candidates]))
        new = np.concatenate([candidates[~near], candidates[near]])[:share]
        kept = np.concatenate([kept, new])
    return np.sort(kept).astype(np.int32)


def _near_farther(rows: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Whether each row, float32 [n, V], has one before it within its radius, float32 [n]: bool [n]."""
    near = np.zeros(len(rows), bool)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        within = 1 - rows[chunk] @ rows[: start + CHUNK].T < radius[chunk, None]
        near[chunk] = np.tril(within, start - 1).any(axis=1)
    return near

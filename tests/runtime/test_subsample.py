"""``cover``: the rows that it chooses, and their stability under noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels import coreset, normalise
from anomalygpt_edge.runtime.vision.subsample import cover

VERSIONS, CLUSTERS = 4, 24


def augmented_rows(seed: int, patches: int = 256, width: int = 32, taps: int = 1) -> np.ndarray:
    """Unit rows [taps, VERSIONS * patches, width] as augmentation makes them: few surfaces, similar versions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLUSTERS, width))[rng.integers(CLUSTERS, size=patches)]
    sample = centres + rng.normal(size=(taps, patches, width)) * 0.3
    versions = [sample + rng.normal(size=sample.shape) * 0.1 for _ in range(VERSIONS)]
    return normalise(np.concatenate(versions, axis=1).astype(np.float32))


def farthest(rows: np.ndarray, chosen: np.ndarray) -> float:
    """Largest cosine distance of any row to the chosen one nearest to it."""
    return float(1 - (rows @ rows[chosen].T).max(axis=1).min())


def kept_share(before: np.ndarray, after: np.ndarray) -> float:
    return len(np.intersect1d(before, after)) / len(before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 90), st.integers(1, 100))
def test_rows_are_ascending_distinct_and_of_the_requested_number(
    seed: int, taps: int, num_rows: int, size: int
) -> None:
    rows = normalise(np.random.default_rng(seed).normal(size=(taps, num_rows, 5)).astype(np.float32))
    chosen = cover(rows, size)
    assert chosen.shape == (taps, min(size, num_rows))
    assert chosen.dtype == np.int32
    assert (np.diff(chosen, axis=1) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < num_rows
    np.testing.assert_array_equal(chosen, cover(rows, size))
    for tap, found in zip(rows, chosen, strict=True):
        np.testing.assert_array_equal(cover(tap[None], size)[0], found)


@pytest.mark.parametrize("seed", range(5))
def test_it_covers_better_than_chance(seed: int) -> None:
    (rows,) = augmented_rows(seed)
    size = len(rows) // VERSIONS
    (chosen,) = cover(rows[None], size)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:size]
    assert farthest(rows, chosen) < farthest(rows, drawn)


def test_noise_changes_few_choices_but_many_greedy_ones() -> None:
    kept = []
    for seed in range(20):
        rows = augmented_rows(seed)
        noise = np.random.default_rng(seed + 100).normal(size=rows.shape) * 1e-3
        noisy, size = normalise((rows + noise).astype(np.float32)), rows.shape[1] // VERSIONS
        kept.append(
            [kept_share(choose(rows, size)[0], choose(noisy, size)[0]) for choose in (cover, coreset)]
        )
    steady, greedy = np.mean(kept, axis=0)
    assert steady > 0.95
    assert greedy < 0.9


def test_a_rare_surface_is_kept() -> None:
    """The one patch that differs from all others is chosen, at any index."""
    (rows,) = augmented_rows(3)
    for place in (1, 100, 777, len(rows) - 1):
        changed = rows.copy()
        changed[place] = normalise(np.random.default_rng(place).normal(size=(1, 32)).astype(np.float32))
        assert place in cover(changed[None], 256)[0]


def test_of_equal_rows_the_lowest_are_kept() -> None:
    chosen = cover(np.full((1, 40, 4), 0.5, np.float32), 32)[0]
    first = sorted([0, int(40 * 0.6180339887498949)])
    others = [index for index in range(40) if index not in first][:30]
    assert chosen.tolist() == sorted(first + others)


@pytest.mark.parametrize(
    ("rows", "size", "word"),
    [
        (np.ones((4, 3), np.float32), 2, "T, N, V"),
        (np.ones((1, 4, 3)), 2, "float64"),
        (np.ones((1, 0, 3), np.float32), 2, "0"),
        (np.ones((1, 4, 3), np.float32), 0, "at least 1"),
        (np.full((1, 4, 3), np.nan, np.float32), 2, "finite"),
    ],
)
def test_invalid_rows_are_refused(rows: np.ndarray, size: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        cover(rows, size)

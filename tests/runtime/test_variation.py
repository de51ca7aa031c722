"""Units of normal variation: what good parts score is 1, whatever the product."""

from __future__ import annotations

import numpy as np
import pytest

from anomalygpt_edge.kernels import summarise, upsample
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
from anomalygpt_edge.runtime.vision.variation import measure_variation

GRID, WIDTH, TAPS, MAP = 8, 16, 2, 64
DIGEST = "0" * 64


def parts(count: int, noise: float, seed: int = 0, views: int = 1) -> list[np.ndarray]:
    """Samples of one product, whose features differ by ``noise``: float32 [views, T, P, V] each."""
    product = np.random.default_rng(99).normal(size=(views, TAPS, GRID**2, WIDTH))
    rng = np.random.default_rng(seed)
    return [(product + noise * rng.normal(size=product.shape)).astype(np.float32) for _ in range(count)]


def bank_of(samples: list[np.ndarray], versions: list[np.ndarray] | None = None, **options: object) -> MemoryBank:
    measured = measure_variation(samples, versions or [], (), MAP, per_view=bool(options.get("per_view")))
    return MemoryBank.from_features(samples, DIGEST, measured=measured, **options)  # type: ignore[arg-type]


def score(bank: MemoryBank, part: np.ndarray) -> float:
    scaled = bank.match(part, 1)[2]
    assert scaled is not None
    return max(summarise(each).top_mean for each in upsample(scaled, MAP))


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.4])
def test_a_good_part_scores_about_one_on_every_product(noise: float) -> None:
    bank = bank_of(parts(6, noise))
    scores = [score(bank, part) for part in parts(8, noise, seed=1)]
    assert 0.8 < np.mean(scores) < 1.25
    assert bank.variation is not None
    assert np.median(scores) < bank.variation.limit
    defective = parts(1, noise, seed=2)[0]
    defective[:, :, 20:24] += 8 * noise * np.random.default_rng(3).normal(size=(1, TAPS, 4, WIDTH)).astype(np.float32)
    assert score(bank, defective) > bank.variation.limit


def test_augmented_versions_stand_in_for_the_others_of_a_single_sample() -> None:
    sample, *versions = parts(9, 0.1)
    bank = bank_of([sample], versions)
    assert bank.variation is not None
    assert bank.variation.num_samples == 1
    assert 0.8 < np.mean([score(bank, part) for part in parts(8, 0.1, seed=1)]) < 1.25


def test_copies_of_a_sample_show_no_variation() -> None:
    first, second, *versions = parts(10, 0.1)
    alone, copied = (bank_of(samples, versions) for samples in ([first], [first] * 9))
    assert copied.variation == alone.variation
    pair, with_copies = (bank_of(samples, versions) for samples in ([first, second], [first, first, second]))
    assert pair.variation is not None
    assert with_copies.variation is not None
    assert with_copies.variation.num_samples == 2
    assert with_copies.variation.levels[0] == pytest.approx(pair.variation.levels[0], rel=0.1)


def test_units_belong_to_the_rows_that_are_kept() -> None:
    samples = parts(4, 0.1)
    every, few = bank_of(samples), bank_of(samples, max_patches=100)
    assert few.units is not None
    assert few.origins is not None
    assert every.units is not None
    np.testing.assert_array_equal(few.units, np.take_along_axis(every.units, few.origins, axis=2))
    part = parts(1, 0.1, seed=5)[0]
    assert score(few, part) == pytest.approx(score(every, part), rel=0.2)


def test_regions_have_units_of_their_own() -> None:
    samples = parts(4, 0.1, views=2)
    for sample in samples:
        sample[1] += 0.5 * np.random.default_rng(int(1e6 * sample[1, 0, 0, 0])).normal(size=sample[1].shape)
    bank = bank_of(samples, per_view=True)
    assert bank.units is not None
    assert bank.units.shape[0] == 2
    tiles = bank_of(samples)
    assert tiles.units is not None
    assert tiles.units.shape == (1, TAPS, 4 * 2 * GRID**2)

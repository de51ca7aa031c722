"""The generator: deterministic, honest about its masks, and with held-out products really held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng

from anomalygpt_edge.models.nano import line
from anomalygpt_edge.models.nano.data import (
    HELD_OUT_FAMILY_SEEDS,
    TRAINING_FAMILY_SEEDS,
    draw,
    held_out_families,
    patch_coverage,
    training_group,
)
from anomalygpt_edge.models.nano.defects import DEFECTS, MIN_CHANGE, add_defects, plausible_defects
from anomalygpt_edge.models.nano.products import (
    GENERATOR_VERSION,
    HELD_OUT_KINDS,
    KINDS,
    OBJECTS,
    TRAINED_KINDS,
    Family,
    render,
)

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**31 - 1)


TRAINED_MEANS = [138.1, 138.8, 148.6, 131.2]  # grey levels of the first group
TRAINED_AREA = 0.4006  # defective shares of 12 groups, added up


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, seeds)
def test_a_part_is_a_function_of_its_seeds(kind: str, family_seed: int, part_seed: int) -> None:
    family = Family(kind, family_seed)
    first, again = (draw(family, default_rng(part_seed), 0).pixels for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (224, 224, 3)
    assert first.dtype == np.uint8


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(OBJECTS)), seeds)
def test_objects_are_in_the_picture_with_background_around_or_filling_it(kind: str, seed: int) -> None:
    scene = render(Family(kind, seed), default_rng(seed))
    assert 0.01 < scene.coverage.mean() <= 1
    assert np.isfinite(scene.image).all()


@pytest.mark.parametrize("name", sorted(DEFECTS))
def test_every_defect_changes_what_its_mask_says(name: str) -> None:
    made = 0
    for seed in range(12):
        kind = next(k for k in KINDS[seed:] + KINDS if name in plausible_defects(k))
        scene = render(Family(kind, seed), default_rng(seed))
        image, mask, defects = add_defects(scene, default_rng(seed), 1, (name,))
        assert 0.0004 < mask.mean() < 0.2
        change = np.abs(image - scene.image).max(axis=2)
        assert change[~mask].max() <= MIN_CHANGE
        made += defects[0].name == name
        row, column = (int(c * 223) for c in defects[0].center)
        assert mask[max(row - 60, 0) : row + 60, max(column - 60, 0) : column + 60].any()
    assert made >= 8, f"{name} is mostly rejected as invisible"


def test_groups_are_reproducible_and_differ() -> None:
    first, again, other = training_group(3, 5), training_group(3, 5), training_group(3, 6)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].pixels, other[0].pixels)
    assert [bool(s.defects) for s in first][:3] == [False, False, True]
    assert not first[0].mask.any()
    assert first[2].mask.any()


def test_held_out_products_are_held_out() -> None:
    families = held_out_families()
    assert all(HELD_OUT_FAMILY_SEEDS[0] <= f.seed < HELD_OUT_FAMILY_SEEDS[1] for f in families)
    assert TRAINING_FAMILY_SEEDS[1] <= HELD_OUT_FAMILY_SEEDS[0]
    assert set(HELD_OUT_KINDS) <= {f.kind for f in families}
    assert not set(HELD_OUT_KINDS) & set(TRAINED_KINDS)
    assert len(set(families)) == len(families)


def test_patch_coverage_counts_the_right_patch() -> None:
    mask = np.zeros((224, 224), bool)
    mask[14:28, 28:35] = True
    coverage = patch_coverage(mask).reshape(16, 16)
    assert coverage[1, 2] == pytest.approx(0.5)
    assert coverage.sum() == pytest.approx(0.5)


def test_the_demo_line_knows_its_truth() -> None:
    parts = list(line.render_line(20, seed=1))
    assert {p.product for p in parts} <= set(line.PRODUCTS)
    defective = [p for p in parts if p.defects]
    assert 0 < len(defective) < 20
    assert all(p.mask[:, 80:560].any() for p in defective)
    assert all(not p.mask.any() for p in parts if not p.defects)
    assert np.array_equal(next(line.render_line(1, seed=1)).frame, parts[0].frame)
    assert line.normal_sample(line.PRODUCTS[0]).shape == (480, 640, 3)


def test_the_generator_is_the_one_the_shipped_model_was_trained_with() -> None:
    """A change of what is drawn is a new generator: raise train again, renew these figures.

    Coarse statistics, so that another NumPy or OpenCV build with other rounding still passes.
    """
    assert GENERATOR_VERSION == 1
    samples = [sample for index in range(12) for sample in training_group(20, index)]
    means = np.array([sample.pixels.mean() for sample in samples])
    areas = np.array([sample.mask.mean() for sample in samples])
    assert means[:4] == pytest.approx(TRAINED_MEANS, abs=0.5)
    assert areas.sum() == pytest.approx(TRAINED_AREA, rel=0.02)

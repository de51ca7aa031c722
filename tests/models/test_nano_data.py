"""The generator: deterministic, honest about its masks, and with held-out products really held out."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng

from anomalygpt_edge.models.nano import pool
from anomalygpt_edge.models.nano.pool import NORMALS, Pool, build_pool, draw_group
from anomalygpt_edge.runtime.synthetic import line
from anomalygpt_edge.runtime.synthetic.data import (
    HELD_OUT_FAMILY_SEEDS,
    TRAINING_FAMILY_SEEDS,
    VALIDATION_FAMILY_SEEDS,
    draw,
    held_out_families,
    patch_coverage,
    validation_families,
)
from anomalygpt_edge.runtime.synthetic.defects import (
    DEFECTS,
    MIN_CHANGE,
    VISIBLE_CHANGE,
    Defect,
    add_defects,
    plausible_defects,
)
from anomalygpt_edge.runtime.synthetic.products import (
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


GENERATED_MEANS = [162.9, 161.0, 167.6, 165.7]  # grey levels of the first group
GENERATED_AREA = 0.2028  # defective shares of 12 groups, added up


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
    first, again, other = draw_group(3, 5), draw_group(3, 5), draw_group(3, 6)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.defects == again.defects
    assert not np.array_equal(first.pixels, other.pixels)
    defective = [bool(d) for d in first.defects]
    assert defective[:NORMALS] == [False] * NORMALS
    assert defective[NORMALS]
    assert not defective[-1]
    assert [m.any() for m in first.masks] == defective


def test_a_pool_goes_on_where_it_stopped_and_gives_what_was_drawn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pool, "SHARD_GROUPS", 2)
    build_pool(tmp_path, 7, 4)
    (tmp_path / "00001.npz").unlink()  # as if interrupted while the second shard was written
    kept = (tmp_path / "00000.npy").stat().st_mtime_ns
    build_pool(tmp_path, 7, 4)
    assert (tmp_path / "00000.npy").stat().st_mtime_ns == kept
    stored, drawn = Pool(tmp_path, 4)[3], draw_group(7, 3)
    assert np.array_equal(stored.pixels, drawn.pixels)
    assert np.array_equal(stored.masks, drawn.masks)
    assert (stored.defects, stored.kind) == (drawn.defects, drawn.kind)
    with pytest.raises(ValueError, match="another seed"):
        build_pool(tmp_path, 8, 4)


def test_dirt_and_light_change_every_shot_of_a_good_part_but_not_its_mask() -> None:
    for kind in ("ground", "biscuit", "screw"):
        shots = [draw(Family(kind, 11), default_rng(part), 0) for part in range(2)]
        assert not np.array_equal(shots[0].pixels, shots[1].pixels)
        assert not any(s.mask.any() for s in shots)


def appearance(defect: Defect) -> str:
    """ "neither" where most of the change is in colour or structure."""
    if abs(defect.shade) < 0.5 * defect.contrast:
        return "neither"
    return "darker" if defect.shade < 0 else "brighter"


def test_defects_go_down_to_faint_and_tiny_ones_and_say_how_they_look() -> None:
    defects = [d for i in range(40) for ds in draw_group(4, i).defects for d in ds]
    assert min(d.contrast for d in defects) < 0.06
    assert min(d.area for d in defects) < 0.002
    assert all(d.contrast >= VISIBLE_CHANGE for d in defects)
    assert all(abs(d.shade) <= d.contrast + 1e-6 for d in defects)
    assert {appearance(d) for d in defects} == {"darker", "brighter", "neither"}


def test_held_out_products_are_held_out() -> None:
    ranges = sorted((TRAINING_FAMILY_SEEDS, VALIDATION_FAMILY_SEEDS, HELD_OUT_FAMILY_SEEDS))
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(ranges))
    for families, (low, high) in (
        (held_out_families(), HELD_OUT_FAMILY_SEEDS),
        (validation_families(), VALIDATION_FAMILY_SEEDS),
    ):
        assert all(low <= f.seed < high for f in families)
        assert {f.kind for f in families} == set(KINDS)
        assert len(set(families)) == len(families)
    shown = {product.seed for product in line._LINE.values()}
    assert not any(TRAINING_FAMILY_SEEDS[0] <= seed < TRAINING_FAMILY_SEEDS[1] for seed in shown)
    assert not set(HELD_OUT_KINDS) & set(TRAINED_KINDS)


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


def test_the_generator_draws_what_its_version_says() -> None:
    """A change of what is drawn is a new generator: raise its version, train again, renew these figures.

    Coarse statistics, so that another NumPy or OpenCV build with other rounding still passes.
    """
    assert GENERATOR_VERSION == 2
    groups = [draw_group(21, index) for index in range(12)]
    means = groups[0].pixels.mean(axis=(1, 2, 3))
    areas = np.array([group.masks.mean(axis=(1, 2)) for group in groups])
    assert means[:4] == pytest.approx(GENERATED_MEANS, abs=0.5)
    assert areas.sum() == pytest.approx(GENERATED_AREA, rel=0.02)

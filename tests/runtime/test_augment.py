"""Augmentation of normal samples: the patches shown, and a bank that covers more poses at the same size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anomalygpt_edge.kernels import coreset, normalise
from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.recipes.recipe import load_recipe
from anomalygpt_edge.runtime.synthetic.data import fixed_samples, validation_families
from anomalygpt_edge.runtime.vision import bank_builder
from anomalygpt_edge.runtime.vision.augment import NUM_IMAGES, augment
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank, load_bank
from anomalygpt_edge.runtime.vision.subsample import cover
from anomalygpt_edge.runtime.vision.views import RegionOfInterest, Tiles

NANO = Path(__file__).parents[2] / "models" / "nano" / "bundle"  # its patches overlap
GRID, PATCH = 4, 6
PIXELS = np.random.default_rng(0).random((2, 3, GRID * PATCH, GRID * PATCH), np.float32)


@pytest.fixture(scope="module")
def inspector():
    with Inspector.open(NANO, threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_enrolled(inspector: Inspector):
    inspector.use(None)


@pytest.fixture(scope="module")
def part() -> np.ndarray:
    return fixed_samples(validation_families(3)[2], 1, 0, 0)[0][0].pixels


def patch(pixels: np.ndarray, number: int) -> np.ndarray:
    row, column = divmod(int(number), GRID)
    return pixels[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


@pytest.mark.parametrize("augmentation", NUM_IMAGES)
def test_the_sample_comes_first_and_the_number_of_images_is_right(augmentation) -> None:
    made = augment(PIXELS, augmentation, GRID)
    assert len(made) == NUM_IMAGES[augmentation]
    np.testing.assert_array_equal(made[0][0], PIXELS)
    for pixels, patches in made:
        assert pixels.shape == PIXELS.shape
        assert pixels.flags.c_contiguous
        assert sorted(patches) == list(range(GRID**2))


def test_a_turned_version_gives_the_sample_patch_of_each_of_its_patches() -> None:
    for turns, (pixels, patches) in enumerate(augment(PIXELS, "turned", GRID)):
        for place, number in enumerate(patches):
            np.testing.assert_array_equal(
                patch(pixels, place), np.rot90(patch(PIXELS, number), turns, (2, 3))
            )


def test_a_moved_version_shows_the_sample_shifted_by_half_a_patch() -> None:
    half = PATCH // 2
    _, (right, _), (down, _), (both, _) = augment(PIXELS, "moved", GRID)
    np.testing.assert_array_equal(right[..., :-half], PIXELS[..., half:])
    np.testing.assert_array_equal(down[:, :, :-half], PIXELS[:, :, half:])
    np.testing.assert_array_equal(both[:, :, :-half, :-half], PIXELS[:, :, half:, half:])
    np.testing.assert_array_equal(right[..., -half:], PIXELS[..., : -half - 1 : -1])  # the edge mirrored


@pytest.mark.parametrize(
    ("augmentation", "seen_as"),
    [("moved", lambda part: np.roll(part, -3, axis=1)), ("turned", lambda part: np.rot90(part).copy())],
)
def test_an_augmented_bank_covers_the_moved_or_turned_part_at_the_same_size(
    augmentation, seen_as, inspector: Inspector, part: np.ndarray
) -> None:
    plain, augmented = (inspector.make_bank([part], augmentation=each) for each in ("none", augmentation))
    assert augmented.features.shape == plain.features.shape
    distances = [distance_to(bank, inspector, seen_as(part)) for bank in (plain, augmented)]
    assert distances[1] < 0.9 * distances[0]


def distance_to(bank: MemoryBank, inspector: Inspector, frame: np.ndarray) -> float:
    """Mean of the highest distances of a frame's patches to a bank."""
    distance = bank.match(inspector.vision.encode_frame(frame, inspector.product).patch_features, 1)[0]
    return float(np.sort(distance.ravel())[-10:].mean())


def test_origins_give_the_sample_patch_of_every_row(inspector: Inspector, part: np.ndarray) -> None:
    bank = inspector.make_bank([part, part[::-1].copy()], "float32", 300, "both")
    assert bank.features.shape[2] == 300
    assert bank.origins is not None
    assert bank.origins.min() >= 0
    assert 2 * 256 <= bank.origins.max() < 2 * 961
    vision, product = inspector.vision, inspector.product
    made = augment(vision.preprocess(part, vision.views(part, product), product), "both", 31)
    shown = np.concatenate([patches for _, patches in made])
    taps = np.concatenate([vision.encode(pixels).patch_features for pixels, _ in made], axis=2)[0]
    own = bank.origins[0, 0] < 961
    for row, origin in zip(bank.features[0, 0][own], bank.origins[0, 0][own], strict=True):
        unit = taps[0] / np.linalg.norm(taps[0], axis=1, keepdims=True)
        nearest = np.flatnonzero(unit @ row > 1 - 1e-5)
        assert origin in shown[nearest]


def test_few_samples_get_the_bundles_augmentation_and_many_get_none(
    inspector: Inspector, part: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = msgspec.structs.replace(inspector.bundle.manifest, augmentation="moved")
    monkeypatch.setattr(inspector.vision, "bundle", replace(inspector.bundle, manifest=manifest))
    few, layout = bank_builder.MAX_CANDIDATES // (4 * 961), inspector.product.layout
    assert bank_builder.default_augmentation(manifest, layout, few) == "moved"
    assert bank_builder.default_augmentation(manifest, layout, few + 1) == "none"
    expected = inspector.make_bank([part], augmentation="moved")
    np.testing.assert_array_equal(inspector.make_bank([part]).features, expected.features)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tiles": Tiles(rows=2, columns=2)},
        {"regions": [RegionOfInterest("a", 0, 0, 100, 100), RegionOfInterest("b", 90, 60, 120, 80)]},
    ],
    ids=["whole", "tiles", "regions"],
)
def test_a_recipe_with_augmentation_is_enrolled_and_opened_again(
    layout, inspector: Inspector, part: np.ndarray, tmp_path: Path
) -> None:
    recipe = tmp_path / "part.toml"
    enroll(inspector, [part, part[:, ::-1].copy()], recipe, name="part", augmentation="both", **layout)
    inspector.use(recipe)
    bank = inspector.product.bank
    assert bank is not None
    assert bank.origins is not None
    record = load_recipe(recipe).memory_bank
    assert record is not None
    again = load_bank(record, tmp_path, inspector.bundle, inspector.product.layout)
    np.testing.assert_array_equal(again.origins, bank.origins)
    assert inspector.inspect(part).score is not None


def test_overlapping_patches_do_not_enlarge_the_bank(inspector: Inspector, part: np.ndarray) -> None:
    bank = inspector.make_bank([part, part[::-1].copy()])
    assert bank.features.shape[2] == 2 * 256
    assert bank.origins is not None
    assert bank.origins.max() >= 2 * 256  # of all 961 of each sample
    other = inspector.make_bank([part[::-1].copy()])
    assert distance_to(bank, inspector, part) < distance_to(other, inspector, part)


def test_a_bank_of_many_samples_holds_patches_without_overlap(
    inspector: Inspector, part: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bank_builder, "MAX_CANDIDATES", 961)
    bank = inspector.make_bank([part, part[::-1].copy()], "float32")
    taps = inspector.vision.encode_frame(part, inspector.product).patch_features[0]
    taps = taps.reshape(4, 31, 31, -1)[:, ::2, ::2].reshape(4, 256, -1)
    np.testing.assert_allclose(bank.features[0, :, :256], normalise(taps), atol=1e-6)
    assert bank.origins is not None
    rows, columns = np.divmod(bank.origins[0, 0] % 961, 31)
    assert (rows % 2 == 0).all()
    assert (columns % 2 == 0).all()
    assert bank.origins[0, 0, 256] == 961
    record = bank.save(tmp_path / "bank.npz")
    loaded = load_bank(record, tmp_path, inspector.bundle)
    np.testing.assert_array_equal(loaded.origins, bank.origins)


def test_an_unknown_augmentation_is_refused(inspector: Inspector, part: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="none, moved, turned, both"):
        inspector.make_bank([part], augmentation="mirrored")  # type: ignore[arg-type]


@pytest.mark.parametrize(("max_patches", "size"), [(None, 32), (20, 20), (100, 32)])
def test_an_augmented_bank_is_chosen_by_cover_and_a_plain_one_by_coreset(
    max_patches: int | None, size: int
) -> None:
    """The augmented bank is as large as without augmentation, or ``max_patches`` if that is less."""
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(1, 3, 4 * 16, 8)).astype(np.float32) for _ in range(2)]
    shown = np.tile(np.arange(16, dtype=np.int32), 4)
    rows = normalise(np.concatenate([sample[0] for sample in samples], axis=1))
    augmented = MemoryBank.from_features(samples, "", max_patches=max_patches, shown=shown, distinct=16)
    chosen = cover(rows, size)
    np.testing.assert_allclose(
        augmented.features[0], np.take_along_axis(rows, chosen[..., None], 1), atol=1e-6
    )
    np.testing.assert_array_equal(augmented.origins, [chosen // 64 * 16 + shown[chosen % 64]])
    plain = MemoryBank.from_features(samples, "", max_patches=size)
    np.testing.assert_array_equal(plain.origins, [np.sort(coreset(rows, size), axis=1)])

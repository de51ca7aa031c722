"""Recipes and memory banks: reading back what was written, and refusing altered files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels import normalise
from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError, RecipeError
from anomalygpt_edge.runtime.recipes.recipe import MemoryBankRecord, Recipe, load_recipe, save_recipe
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank, load_bank
from anomalygpt_edge.runtime.vision.variation import Variation, measure_variation

DIGEST = "0" * 64
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=60)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Recipe,
        name=TEXT.filter(bool),
        class_name=st.none() | TEXT.filter(bool),
        description=TEXT,
        question=TEXT,
        resize=st.sampled_from([None, "crop", "stretch"]),
        memory_bank=st.none()
        | st.just(MemoryBankRecord("bank.npz", DIGEST, 4, DIGEST))
        | st.just(MemoryBankRecord("bank.npz", DIGEST, 4, DIGEST, Variation(1.5, 0.2, 2.5, 4))),
        created=TEXT,
    )
)
def test_a_recipe_is_read_back_as_it_was_written(tmp_path: Path, recipe: Recipe) -> None:
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "name"),
        ("name = 3", "name"),
        ("name = 'a'\nthreshold = 0.5", "threshold"),
        ("name = 'a'\nschema_version = 2", "schema version 2"),
        ("name = 'a'\nresize = 'zoom'", "zoom"),
        ("name = 'a'\ndescription = '" + "x" * 501 + "'", "500"),
        ("name = ", "not TOML"),
        ("name = 'a'\n[memory_bank]\nfile = '../x.npz'", "memory_bank"),
        ("name = 'a'\n[memory_bank]\nfile = '..'", "memory_bank"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint) as error:
        load_recipe(path)
    assert not any(word in str(error.value) for word in ("`", "$", "Expected"))


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    save_recipe(Recipe(name="a"), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path) == Recipe(name="a")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path)
    with pytest.raises(AgptError, match="cannot write"):
        save_recipe(Recipe(name="a"), tmp_path / "no" / "folder.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(tmp_path / "binary.toml")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture
def bank(bundle: Bundle) -> MemoryBank:
    raw = np.random.default_rng(0).normal(size=(2, 4, 256, 32)).astype(np.float32)[:, None]
    measured = measure_variation(raw, [], (), 224)
    return MemoryBank.from_features(raw, bundle.encoder_sha256, measured=measured)


def test_a_bank_holds_the_normalised_patches_of_every_sample(bundle: Bundle) -> None:
    raw = np.random.default_rng(0).normal(size=(3, 4, 256, 32)).astype(np.float32)
    bank = MemoryBank.from_features(raw[:, None], bundle.encoder_sha256)
    assert bank.features.shape == (1, 4, 768, 32)
    np.testing.assert_allclose(bank.features[0, 2, 256:512], normalise(raw[1, 2]), rtol=1e-6)


def test_a_bank_is_read_back(bank: MemoryBank, bundle: Bundle, tmp_path: Path) -> None:
    record = bank.save(tmp_path / "bank.npz")
    assert (record.num_samples, record.encoder_sha256) == (2, bundle.encoder_sha256)
    loaded = load_bank(record, tmp_path, bundle)
    np.testing.assert_array_equal(loaded.features, bank.features)
    np.testing.assert_array_equal(loaded.gains, bank.gains)
    assert loaded.variation == bank.variation


def test_a_bank_without_variation_is_refused(bank: MemoryBank, bundle: Bundle, tmp_path: Path) -> None:
    record = replace(bank, units=None, variation=None).save(tmp_path / "bank.npz")
    with pytest.raises(RecipeError, match="normal variation: run agpt enroll again"):
        load_bank(record, tmp_path, bundle)
    record = replace(bank, units=bank.units * 0).save(tmp_path / "bank.npz")
    with pytest.raises(RecipeError, match="units that do not fit"):
        load_bank(record, tmp_path, bundle)


def test_an_altered_bank_is_refused(bank: MemoryBank, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    record = bank.save(path)
    with pytest.raises(RecipeError, match="another encoder"):
        load_bank(msgspec.structs.replace(record, encoder_sha256=DIGEST), tmp_path, bundle)
    with pytest.raises(RecipeError, match="missing"):
        load_bank(msgspec.structs.replace(record, file="other.npz"), tmp_path, bundle)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RecipeError, match="altered"):
        load_bank(record, tmp_path, bundle)


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((4, 256, 31), np.float32),
        np.zeros((4, 256, 32), np.float64),
        np.full((4, 256, 32), np.nan, np.float32),
        np.array([{}], dtype=object),
    ],
    ids=["shape", "dtype", "nan", "pickle"],
)
def test_a_bank_of_other_features_is_refused(features: np.ndarray, bundle: Bundle, tmp_path: Path) -> None:
    record = MemoryBank(features, 1, bundle.encoder_sha256).save(tmp_path / "bank.npz")
    with pytest.raises(RecipeError, match="enroll again"):
        load_bank(record, tmp_path, bundle)


def test_features_that_cannot_form_a_bank_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least one"):
        MemoryBank.from_features([], DIGEST)
    with pytest.raises(RecipeError, match="not finite"):
        MemoryBank.from_features([np.full((1, 4, 9, 8), np.inf, np.float32)], DIGEST)

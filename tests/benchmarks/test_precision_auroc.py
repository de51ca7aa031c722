"""AUROC of nano's fp16 and int8 encoders: the comparison of figures, and (slow) the limit for the shipped weights."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from anomalygpt_edge.runtime.synthetic.data import validation_families

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NUM_FAMILIES, NUM_CHOICES = 35, 3  # of the gate: every kind of product once


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``precision_auroc.py`` as a module: scripts import each other by their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return import_module("precision_auroc")
    finally:
        sys.path.remove(str(BENCHMARKS))


class Noisy:
    """An engine whose features are hidden in noise as large as they are."""

    def __init__(self, engine: object) -> None:
        self._engine, self._rng = engine, np.random.default_rng(0)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self._engine.run(**inputs)  # type: ignore[attr-defined]
        features = outputs["patch_features"]
        noise = self._rng.normal(size=features.shape) * features.std()
        return outputs | {"patch_features": (features + noise).astype(np.float32)}


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_an_encoder_equals_itself_and_a_spoilt_one_is_beyond_the_limit(script: ModuleType) -> None:
    encoder = script.Encoder.open(Path(__file__).parents[2] / "models" / "nano" / "bundle", 1)
    spoilt = replace(encoder, engine=Noisy(encoder.engine))
    products = [script.family_product(validation_families(3)[2], 2, 2)]
    found = script.measure(products, {"fp32": encoder, "fp16": encoder, "int8": spoilt})
    encoder.close()
    figures = script.compare(found)
    assert all(
        figure["difference"] == figure["single"] == 0
        for by_measure in figures["fp16"].values()
        for figure in by_measure.values()
    )
    lines = script.beyond(figures)
    assert lines
    assert all(line.startswith("int8") for line in lines)
    assert any("pixel_auroc" in line for line in lines)
    assert figures["int8"]["4"]["pixel_auroc"]["difference"] < -5 * script.LIMIT


def test_the_difference_is_the_mean_over_products_and_choices(script: ModuleType) -> None:
    base = np.full((2, 2, 2), 0.8)  # [shots, choices, measures]
    up, down = base.copy(), base.copy()
    up[1, :, 0] += (0.03, 0.01)
    down[1, :, 0] -= (0.01, 0.00)
    down[0, :, 1] = np.nan
    found = {"a": {"fp32": base, "int8": up}, "b": {"fp32": base, "int8": down}}
    figures = script.compare(found)
    image = figures["int8"]["4"]["image_auroc"]
    assert image["fp32"] == 0.8
    assert image["difference"] == pytest.approx(0.0075)
    assert image["single"] == pytest.approx(np.std([0.03, 0.01, -0.01, 0.0]), abs=1e-5)
    assert image["farthest"] == pytest.approx({"a": 0.02, "b": -0.005})
    assert list(image["farthest"]) == ["a", "b"]
    lines = script.beyond(figures)
    assert len(lines) == 2, "NaN is not within a limit"
    assert "int8, 4 normal samples, image_auroc: +0.0075" in lines


def test_folders_are_seen_as_eval_sees_them_and_small_ones_left_out(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:20] = 255
    for name, number in (("large", 10), ("small", 3)):
        for index in range(number):
            part = np.full((40, 40), index, np.uint8)
            write(tmp_path / name / "train" / "good" / f"{index}.png", part)
            write(tmp_path / name / "test" / "good" / f"{index}.png", part)
            write(tmp_path / name / "test" / "spot" / f"{index}.png", part)
            write(tmp_path / name / "ground_truth" / "spot" / f"{index}_mask.png", mask)
    options = Namespace(validation=True, families=0, data=[tmp_path], choices=3)
    ((name, products),) = script.find_products(options, 224)
    (product,) = products
    assert name == "folders"
    assert product.name == "large"
    assert "small is left out" in capsys.readouterr().out
    assert product.defective.tolist() == [False] * 10 + [True] * 10
    assert [mask.sum() for mask in product.masks] == [0] * 10 + [224 * 112] * 10
    for seed, choice in enumerate(product.choices):
        shown = [int(product.normals[index][0, 0, 0]) for index in choice]
        assert shown == np.random.default_rng(seed).permutation(10)[:4].tolist()


@pytest.mark.slow
def test_fp16_and_int8_cost_nano_under_a_third_of_a_point_of_auroc(
    script: ModuleType, tmp_path: Path
) -> None:
    """On validation families: the held-out ones are reported, not tuned on."""
    bundles = script.export_all(script.CHECKPOINT, tmp_path)
    encoders = {name: script.Encoder.open(folder, 2) for name, folder in bundles.items()}
    families = enumerate(validation_families(NUM_FAMILIES))
    products = (script.family_product(family, number, NUM_CHOICES) for number, family in families)
    figures = script.compare(script.measure(products, encoders))
    for encoder in encoders.values():
        encoder.close()
    assert set(figures) == {"fp16", "int8"}
    assert script.beyond(figures) == []

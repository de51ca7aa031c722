"""Figures of merit against scikit-learn's on images with known maps, and the geometry of masks."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from anomalygpt_edge.kernels import preprocess
from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.evaluation.datasets import Sample, find_categories
from anomalygpt_edge.runtime.evaluation.evaluate import (
    Evaluation,
    class_of,
    evaluate_category,
    frame_map_size,
    mask_as_seen,
    parse_shots,
    print_table,
    write_json,
)
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
from anomalygpt_edge.runtime.vision.views import Layout, Tiles

SIZE = 32


@dataclass(frozen=True)
class FakeProduct:
    class_name: str
    bank: MemoryBank | None = None
    resize: str = "stretch"


@dataclass
class FakeInspector:
    """Its map is the frame's red channel, halved without a bank; a peak above 100 is FAIL."""

    product: FakeProduct | None = None
    seen: list = field(default_factory=list)
    bundle = SimpleNamespace(
        manifest=SimpleNamespace(
            classes=["object", "metal nut"],
            default_class="object",
            preprocess=SimpleNamespace(size=SIZE),
            vision=SimpleNamespace(map_size=SIZE),
        )
    )

    def prepare(self, class_name):
        return FakeProduct(class_name)

    def use(self, product):
        self.product = product

    def make_bank(self, frames):
        values = np.array([float(frame[0, 0, 2]) for frame in frames], np.float32)
        features = np.repeat(values, 4).reshape(1, 1, -1, 1)
        return MemoryBank(features, len(frames), "encoder")

    def inspect(self, frame):
        self.seen.append((self.product.class_name, self.product.bank))
        strength = 1.0 if self.product.bank else 0.5
        anomaly_map = cv2.resize(frame[:, :, 2], (SIZE, SIZE), interpolation=cv2.INTER_AREA) * np.float32(
            strength
        )
        peak = float(anomaly_map.max())
        status = Status.NO_RESULT if frame[0, 0, 0] == 77 else Status.FAIL if peak > 100 else Status.PASS
        return Verdict(
            status=status, reason="", resize="stretch", maps=anomaly_map[None], score=peak / 2, peak=peak
        )


@pytest.fixture
def category(tmp_path: Path):
    """Eight normal images, four good ones, and five anomalous ones, of which one has no mask and one is unreadable."""
    rng = np.random.default_rng(3)

    def write(path: Path, image: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    root = tmp_path / "metal_nut"
    for index in range(8):
        write(root / "train" / "good" / f"{index}.png", np.full((SIZE, SIZE, 3), index, np.uint8))
    for index in range(4):
        image = rng.integers(0, 120, (SIZE, SIZE, 3), np.uint8)
        image[0, 0, 0] = 0
        write(root / "test" / "good" / f"{index}.png", image)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[4:12, 8:20] = 255
        bad = image.copy()
        bad[mask > 0, 2] = np.minimum(255, bad[mask > 0, 2].astype(int) + 60)
        bad[0, 0, 0] = 77 if index == 3 else 0
        write(root / "test" / "dent" / f"{index}.png", bad)
        if index:
            write(root / "ground_truth" / "dent" / f"{index}_mask.png", mask)
    (root / "test" / "dent" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return find_categories(root)[0]


def test_figures_equal_scikit_learns(category):
    figures = evaluate_category(FakeInspector(), category, [0, 2], None, seed=0)
    readable = [sample for sample in category.tests if sample.image.stem != "torn"]
    labels = [sample.anomalous for sample in readable]
    maps = [cv2.imread(str(sample.image))[:, :, 2] for sample in readable]
    masked = [index for index, sample in enumerate(readable) if sample.mask or not sample.anomalous]
    masks = [
        cv2.imread(str(readable[i].mask), 0) > 0 if readable[i].mask else np.zeros((SIZE, SIZE), bool)
        for i in masked
    ]
    few = figures["2"]
    assert few.image_auroc_max == pytest.approx(roc_auc_score(labels, [m.max() for m in maps]))
    assert few.pixel_auroc == pytest.approx(
        roc_auc_score(np.concatenate(masks).ravel(), np.concatenate([maps[i] for i in masked]).ravel())
    )
    assert (few.num_good, few.num_anomalous, few.num_without_mask, few.num_no_result) == (4, 5, 1, 2)
    # All maps exceed 100: each good part is a false alarm; of the dents one has no verdict and one cannot be read.
    assert few.accuracy == pytest.approx(3 / 9)
    # Zero-shot maps are half as strong: all pass.
    assert figures["0"].accuracy == pytest.approx(4 / 9)
    assert figures["0"].pixel_auroc == pytest.approx(few.pixel_auroc)


def test_tiles_are_scored_over_the_whole_frame(category, tiny_bundle):
    tiles = Tiles(rows=2, columns=2, overlap=0.2)
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        found = evaluate_category(inspector, category, [0, 1], None, seed=0, layout=Layout(tiles=tiles))
        labels, scores, maps, masks = [], [], [], []
        for sample in (each for each in category.tests if each.image.stem != "torn"):
            verdict = inspector.inspect(cv2.imread(str(sample.image)))  # still with the bank of one shot
            assert len(verdict.views) == 4
            labels.append(sample.anomalous)
            scores.append(max(view.score for view in verdict.views))
            if sample.mask or not sample.anomalous:
                maps.append(verdict.map_in_frame().ravel())
                truth = cv2.imread(str(sample.mask), 0) if sample.mask else np.zeros((SIZE, SIZE))
                masks.append(truth.ravel() > 0)
    assert found["1"].image_auroc_top1 == pytest.approx(roc_auc_score(labels, scores))
    pixels = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    assert found["1"].pixel_auroc == pytest.approx(pixels, abs=1e-6)
    assert found["0"].num_no_result == 1  # the unreadable image
    assert frame_map_size((1080, 1920)) == (288, 512)


def test_banks_are_nested_and_seeded_and_too_many_shots_are_left_out(category):
    def banks(seed):
        inspector = FakeInspector()
        figures = evaluate_category(inspector, category, [0, 1, 2, 99], None, seed)
        assert list(figures) == ["0", "1", "2"]
        assert {name for name, _ in inspector.seen} == {"metal nut"}
        return {bank.num_samples: bank.features.ravel() for _, bank in inspector.seen if bank}

    first, again = banks(0), banks(0)
    assert first[1].size == 4
    np.testing.assert_array_equal(first[2][:4], first[1])
    np.testing.assert_array_equal(first[2], again[2])
    assert any(not np.array_equal(banks(seed)[1], first[1]) for seed in range(1, 5))


@pytest.mark.parametrize("shape", [(300, 500), (500, 301), (224, 224), (97, 131)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_masks_are_resized_like_the_pixels(tmp_path, shape, resize):
    mask = np.zeros(shape, np.uint8)
    cv2.ellipse(
        mask, (shape[1] // 2 + 9, shape[0] // 2 - 7), (shape[1] // 5, shape[0] // 7), 30, 0, 360, 255, -1
    )
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    sample = Sample(tmp_path / "image.png", "dent", tmp_path / "mask.png")
    seen = mask_as_seen(sample, shape, (224, 224), resize)
    pixels = preprocess(cv2.cvtColor(mask, cv2.COLOR_GRAY2BGR), 224, resize, (0, 0, 0), (1, 1, 1))[0, 0]
    differing = (seen != (pixels > 0.5)).sum()
    outline = ((pixels > 0.02) & (pixels < 0.98)).sum()
    assert 0 < seen.sum() < 224 * 224
    assert differing <= 0.5 * outline


def test_a_mask_of_another_size_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((8, 9), np.uint8))
    with pytest.raises(ConfigError, match="give masks of the images' size"):
        mask_as_seen(Sample(tmp_path / "i.png", "dent", tmp_path / "mask.png"), (9, 8), (224, 224), "crop")


@pytest.mark.parametrize(
    ("category_name", "expected"),
    [("metal_nut", "metal nut"), ("pcb3", "pcb"), ("Bottle", "bottle"), ("magnetic_tile", None), ("7", None)],
)
def test_class_names_come_from_category_names(category_name, expected):
    assert class_of(category_name, ["bottle", "metal nut", "pcb", "tile"]) == expected


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1.5", "100000"])
def test_invalid_shots_are_refused(text):
    with pytest.raises(ConfigError, match="--shots"):
        parse_shots(text)


def test_shots_are_sorted_and_unique():
    assert parse_shots("4, 0,1,4") == [0, 1, 4]


def test_table_and_json_contain_the_figures(category, tmp_path):
    found = dict.fromkeys(("metal_nut", "other"), evaluate_category(FakeInspector(), category, [1], None, 0))
    means = {"1": {"image_auroc_max": 0.5, "image_auroc_top1": None, "pixel_auroc": 0.25, "accuracy": 1.0}}
    results = Evaluation(
        bundle="nano",
        bundle_sha256="",
        folder="set",
        shots=[1, 99],
        seed=0,
        seconds=1,
        categories=found,
        mean=means,
    )
    console = Console(file=io.StringIO(), width=120)
    print_table(results, console)
    shown = console.file.getvalue()
    assert f"{found['metal_nut']['1'].pixel_auroc:.3f}" in shown
    assert "0.250" in shown
    assert "–" in shown
    assert "4 + 5" in shown
    assert "too few normal images for 99 shots" in shown
    assert "1 anomalous images have no mask" in shown
    write_json(results, tmp_path / "new" / "figures.json")
    stored = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert stored["categories"]["metal_nut"]["1"]["num_anomalous"] == 5
    assert stored["mean"]["1"]["image_auroc_top1"] is None

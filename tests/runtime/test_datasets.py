"""Both layouts, written to disk and found again."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.evaluation.datasets import find_categories


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8), value, np.uint8))
    return path


def make_mvtec(root: Path, name: str) -> Path:
    category = root / name
    for index in range(2):
        put(category / "train" / "good" / f"{index:03d}.png")
        put(category / "test" / "good" / f"{index:03d}.png")
    put(category / "test" / "crack" / "000.png")
    put(category / "test" / "crack" / "001.png")
    put(category / "ground_truth" / "crack" / "000_mask.png", 255)
    (category / "license.txt").write_text("not an image")
    return category


def make_visa(root: Path, rows: list[str]) -> None:
    (root / "split_csv").mkdir(parents=True)
    (root / "split_csv" / "1cls.csv").write_text("object,split,label,image,mask\n" + "\n".join(rows) + "\n")


def test_mvtec_root_and_one_category(tmp_path):
    make_mvtec(tmp_path, "bottle")
    make_mvtec(tmp_path, "screw")
    (tmp_path / "unrelated").mkdir()
    categories = find_categories(tmp_path)
    assert [category.name for category in categories] == ["bottle", "screw"]
    assert find_categories(tmp_path / "screw") == [categories[1]]
    assert len(categories[0].normals) == 2


def test_mvtec_samples_know_kind_and_mask(tmp_path):
    category = find_categories(make_mvtec(tmp_path, "bottle"))[0]
    by_name = {(sample.kind, sample.image.stem): sample for sample in category.tests}
    assert len(by_name) == 4
    assert not by_name["good", "000"].anomalous
    assert by_name["good", "000"].mask is None
    assert by_name["crack", "000"].mask == tmp_path / "bottle" / "ground_truth" / "crack" / "000_mask.png"
    assert by_name["crack", "001"].anomalous
    assert by_name["crack", "001"].mask is None


def test_visa_root_and_one_category(tmp_path):
    make_visa(
        tmp_path,
        [
            "candle,train,normal,candle/Data/Images/Normal/0.JPG,",
            "candle,test,normal,candle/Data/Images/Normal/1.JPG,",
            "candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png",
            "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/0.JPG,pcb1/Data/Masks/Anomaly/0.png",
        ],
    )
    candle, pcb = find_categories(tmp_path)
    assert (candle.name, pcb.name) == ("candle", "pcb1")
    assert candle.normals == (tmp_path / "candle/Data/Images/Normal/0.JPG",)
    assert [sample.anomalous for sample in candle.tests] == [False, True]
    assert candle.tests[1].mask == tmp_path / "candle/Data/Masks/Anomaly/0.png"
    (tmp_path / "pcb1").mkdir()
    assert find_categories(tmp_path / "pcb1") == [pcb]


@pytest.mark.parametrize("image", ["../../etc/passwd", "/etc/passwd"])
def test_a_table_cannot_lead_outside(tmp_path, image):
    make_visa(tmp_path, [f"candle,test,normal,{image},"])
    with pytest.raises(ConfigError, match="outside"):
        find_categories(tmp_path)


def test_what_is_no_dataset_is_said(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        find_categories(tmp_path / "absent")
    with pytest.raises(ConfigError, match="neither layout"):
        find_categories(tmp_path)
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_bytes(b"object,split,label,image,mask\n\xff\xfe,,,,\n")
    with pytest.raises(ConfigError, match="not a readable CSV"):
        find_categories(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,image\na,b\n")
    with pytest.raises(ConfigError, match="label, mask, split"):
        find_categories(tmp_path)


def test_masks_of_any_format_and_no_hidden_files(tmp_path):
    category = make_mvtec(tmp_path, "bottle")
    (category / "ground_truth" / "crack" / "000_mask.png").rename(
        category / "ground_truth" / "crack" / "000_mask.PNG"
    )
    put(category / "ground_truth" / "crack" / "001_mask.bmp", 255)
    put(category / "ground_truth" / "crack" / "._001_mask.png")
    put(category / "test" / ".ipynb_checkpoints" / "000.png")
    put(category / "test" / "crack" / "._000.png")
    put(category / "train" / "good" / "._000.png")
    (found,) = find_categories(tmp_path)
    assert len(found.normals) == 2
    masks = [sample.mask.name for sample in found.tests if sample.mask]
    assert masks == ["000_mask.PNG", "001_mask.bmp"]
    assert {sample.kind for sample in found.tests} == {"good", "crack"}


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_visa_tables_as_spreadsheets_save_them(tmp_path, delimiter, end, mark):
    rows = [
        "object,split,label,image,mask",
        "pcb1,test,anomaly,pcb1/0.JPG,pcb1/0.png",
        "pcb1,train,normal,pcb1/1.JPG,",
    ]
    (tmp_path / "split_csv").mkdir()
    text = mark + "".join(row.replace(",", delimiter) + end for row in rows)
    (tmp_path / "split_csv" / "1cls.csv").write_bytes(text.encode())
    (found,) = find_categories(tmp_path)
    assert (found.name, len(found.normals), len(found.tests)) == ("pcb1", 1, 1)
    assert found.tests[0].mask == tmp_path / "pcb1/0.png"

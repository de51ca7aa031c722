"""Which files of a folder are inspected and enrolled, in which order, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalygpt_edge.runtime.cameras import open_camera
from anomalygpt_edge.runtime.cameras.folder import name_parts
from anomalygpt_edge.runtime.common.errors import CameraError, ImageError
from anomalygpt_edge.runtime.vision.image_files import find_images, image_paths, natural_order


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    return path


def names(folder: Path, **options) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder, **options).paths]


def test_what_is_no_part_is_left_out_and_said(tmp_path):
    put(tmp_path / "a.PNG")
    put(tmp_path / "deep" / "er" / "b.jpeg")
    put(tmp_path / "._a.png")
    put(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    put(tmp_path / "deep" / "ground_truth" / "dent" / "a_mask.png")
    put(tmp_path / "old" / "overlays" / "00001_a.png")
    (tmp_path / "old" / "records.jsonl").touch()
    for name in ("a.gif", "b.gif", "c.GIF", "notes.txt", "LICENSE"):
        (tmp_path / name).touch()
    os.symlink(tmp_path / "gone", tmp_path / "gone.png")
    found = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.paths] == ["a.PNG", "deep/er/b.jpeg"]
    assert found.remark() == (
        "11 files left out: 3 GIF, 2 hidden, 1 JSONL, 1 TXT, 1 masks, 1 not regular files, 1 without suffix, "
        "1 written by a run"
    )
    assert find_images(tmp_path / "deep" / "er").remark() == ""


def test_the_runs_own_output_is_never_inspected(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "out" / "overlays" / "00001_a.png")
    put(tmp_path / "out" / "anything" / "x.png")
    assert names(tmp_path, out=tmp_path / "out") == ["a.png"]
    assert names(tmp_path / "out", out=tmp_path / "out") == ["anything/x.png"]
    assert names(tmp_path, out=tmp_path.parent) == ["a.png", "out/anything/x.png", "out/overlays/00001_a.png"]
    put(tmp_path / "overlays" / "00001_a.png")  # beside the source's own images
    assert "overlays/00001_a.png" not in names(tmp_path, out=tmp_path)


def test_numbers_are_in_the_order_of_their_values(tmp_path):
    for name in ("10.png", "2.png", "1.png", "b10/1.png", "b9/1.png", "a.png", "a1.png", "B2.png"):
        put(tmp_path / name)
    assert names(tmp_path) == [
        "1.png",
        "2.png",
        "10.png",
        "a.png",
        "a1.png",
        "B2.png",
        "b9/1.png",
        "b10/1.png",
    ]


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)))
def test_any_names_can_be_ordered(texts):
    paths = [Path("/r", text) for text in texts if text not in (".", "..")]
    shuffled = paths[::-1]
    assert sorted(paths, key=natural_order) == sorted(shuffled, key=natural_order)


def test_equal_stems_stay_apart():
    paths = [Path("/r", name) for name in ("a.png", "a.jpg", "a.png.jpg", "b.png", "c/a.png")]
    assert list(name_parts(paths, Path("/r"))) == ["a.png", "a.jpg", "a.png.jpg", "b", "c/a"]


NAMES = ["a", "a.png", "a.jpg", "a.png.jpg", "a.png.jpg.png", "b/a.png", "b/a.bmp"]


@given(st.lists(st.sampled_from(NAMES), unique=True))
def test_every_file_has_a_part_id_of_its_own(texts):
    parts = name_parts([Path("/r", text) for text in texts], Path("/r"))
    assert len(parts) == len(texts)


def test_good_parts_follow_the_same_rule(tmp_path):
    for name in ("10.png", "2.png", "deep/1.png", ".hidden.png"):
        put(tmp_path / name)
    said: list[str] = []
    found = image_paths([tmp_path, tmp_path / "10.png"], said.append)
    assert [path.name for path in found] == ["2.png", "10.png", "1.png", "10.png"]
    assert said == [f"{tmp_path}: 1 file left out: 1 hidden"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="contains no image"):
        image_paths([tmp_path / "empty"])


def test_a_folder_camera_counts_and_remarks(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.jpg")
    (tmp_path / "x.gif").touch()
    camera = open_camera(str(tmp_path))
    assert (camera.num_frames, camera.remark) == (2, "1 file left out: 1 GIF")
    assert [frame.part_id for frame in camera.frames()] == ["a.jpg", "a.png"]
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(CameraError, match=r"contains no image \(1 file left out: 1 GIF\)"):
        open_camera(str(tmp_path))


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_said(source):
    with pytest.raises(CameraError, match="the source is empty"):
        open_camera(source)

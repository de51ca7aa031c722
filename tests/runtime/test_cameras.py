"""Sources on disk and absent ones."""

from __future__ import annotations

import os
import sys
import time

import cv2
import numpy as np
import pytest

from anomalygpt_edge.runtime.cameras import device, folder, open_camera
from anomalygpt_edge.runtime.cameras.demo import PRODUCTS, normal_samples
from anomalygpt_edge.runtime.cameras.device import DeviceCamera
from anomalygpt_edge.runtime.cameras.video import VideoCamera
from anomalygpt_edge.runtime.common.errors import CameraError


def picture(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_video(path, num_frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for index in range(num_frames):
        noise = np.random.default_rng(index).integers(-5, 6, (48, 64, 3))
        writer.write((noise + 10 * index + 5).astype(np.uint8))
    writer.release()


def test_folder_gives_images_by_name_and_marks_the_broken_one(tmp_path):
    (tmp_path / "late").mkdir()
    cv2.imwrite(str(tmp_path / "b.png"), picture(1))
    cv2.imwrite(str(tmp_path / "late" / "c.png"), picture(2))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "notes.txt").write_text("no image")
    frames = list(open_camera(str(tmp_path)).frames())
    assert [frame.part_id for frame in frames] == ["a", "b", "late/c"]
    assert frames[0].pixels is None
    assert "a.png" in frames[0].problem
    np.testing.assert_array_equal(frames[1].pixels, picture(1))
    assert frames[0].captured_ns < frames[1].captured_ns < frames[2].captured_ns
    assert frames[2].captured_utc.endswith("Z")


def test_file_names_that_are_not_utf8_stay_apart(tmp_path):
    for byte in (b"\xe4", b"\xe5"):
        (tmp_path / os.fsdecode(b"teil_" + byte + b".png")).write_bytes(cv2.imencode(".png", picture(1))[1])
    frames = list(open_camera(str(tmp_path)).frames())
    names = [frame.part_id for frame in frames]
    assert len(set(names)) == 2
    assert all(frame.pixels is not None for frame in frames)
    for text in (*names, *(frame.source for frame in frames)):
        assert text.encode().decode() == text


def test_one_image_is_a_source(tmp_path):
    cv2.imwrite(str(tmp_path / "part.png"), picture(0))
    (frame,) = open_camera(str(tmp_path / "part.png")).frames()
    assert frame.part_id == "part"
    assert frame.pixels.shape == (24, 32, 3)


def test_video_gives_every_frame(tmp_path):
    path = tmp_path / "line.avi"
    write_video(path, 5)
    camera = open_camera(str(path))
    frames = list(camera.frames())
    camera.close()
    camera.close()
    assert [frame.part_id for frame in frames] == [f"line-{index:06d}" for index in range(5)]
    assert [int(frame.pixels.mean() // 10) for frame in frames] == [0, 1, 2, 3, 4]


def test_cut_video_is_an_error_after_its_frames(tmp_path):
    path = tmp_path / "line.avi"
    write_video(path, 20)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    camera = open_camera(str(path))
    read = []
    with pytest.raises(CameraError, match=r"ends after \d+ of 20 frames"):
        read.extend(frame.part_id for frame in camera.frames())
    assert 0 < len(read) < 20


def test_a_number_that_is_a_file_is_the_file(tmp_path, monkeypatch):
    (tmp_path / "7").mkdir()
    cv2.imwrite(str(tmp_path / "7" / "a.png"), picture(0))
    monkeypatch.chdir(tmp_path)
    assert len(list(open_camera("7").frames())) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("absent-source", "no source 'absent-source'"),
        pytest.param(
            "87", "camera 87 was not found", marks=pytest.mark.skipif(sys.platform != "linux", reason="V4L2")
        ),
    ],
)
def test_absent_sources_are_named(source, said):
    with pytest.raises(CameraError, match=said):
        open_camera(source)


def test_empty_folder_and_unreadable_video_are_named(tmp_path):
    with pytest.raises(CameraError, match="contains no image"):
        open_camera(str(tmp_path))
    (tmp_path / "x.mp4").write_bytes(b"this is not a video")
    with pytest.raises(CameraError, match="neither an image nor a video"):
        open_camera(str(tmp_path / "x.mp4"))


def test_the_demo_line_is_repeatable_and_knows_the_truth():
    first, again = (list(open_camera("demo", num_parts=4, seed=5).frames()) for _ in range(2))
    assert [frame.part_id for frame in first] == ["0001", "0002", "0003", "0004"]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.product == other.product in PRODUCTS
        assert one.defects == other.defects
    assert first[0].pixels.shape == (480, 640, 3)


def test_the_good_parts_to_enroll_are_not_on_the_line():
    sample, other = normal_samples(PRODUCTS[0], 2)
    assert not np.array_equal(sample, other)
    assert sample.dtype == np.uint8


def test_a_frames_time_is_before_it_is_read(tmp_path, monkeypatch):
    """A slow disk or decoder must not make a part look younger than it is."""
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    read_at = []

    def slowly(path):
        time.sleep(0.02)
        read_at.append(time.monotonic_ns())
        return picture(0)

    monkeypatch.setattr(folder, "read_image", slowly)
    (frame,) = open_camera(str(tmp_path)).frames()
    assert frame.captured_ns <= read_at[0] - 20_000_000


@pytest.mark.parametrize("kind", [VideoCamera, DeviceCamera])
def test_a_captured_frames_time_is_between_grabbing_and_decoding(tmp_path, monkeypatch, kind):
    class Capture:
        def __init__(self):
            self.times, self.num_left = [], 1

        def get(self, _property):
            return 1

        def grab(self):
            self.times.append(time.monotonic_ns())
            self.num_left -= 1
            return self.num_left >= 0

        def retrieve(self):
            self.times.append(time.monotonic_ns())
            return True, picture(0)

    capture = Capture()
    monkeypatch.setattr(sys.modules[kind.__module__], "open_capture", lambda source: capture)
    monkeypatch.setattr(device, "present_cameras", lambda: [3])
    camera = kind(3 if kind is DeviceCamera else tmp_path / "x.avi")
    frame = next(iter(camera.frames()))
    assert capture.times[0] <= frame.captured_ns <= capture.times[1]

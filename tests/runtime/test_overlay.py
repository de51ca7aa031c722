"""The overlay: the frame, heat for high map values, region boxes, and the status' colour."""

from __future__ import annotations

import resource

import cv2
import numpy as np
import pytest

from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.inspection.verdict import Region, Status, Verdict
from anomalygpt_edge.runtime.outputs.overlay import (
    MARGIN,
    PANE_SIDE,
    STATUS_COLORS,
    OverlayFolder,
    draw_overlay,
    overlay_name,
)
from anomalygpt_edge.runtime.vision.views import FrameSize

LEVEL = 0.2


def make_verdict(height: int, width: int, status: Status = Status.FAIL, **changes) -> Verdict:
    anomaly_map = np.zeros((224, 224), np.float32)
    anomaly_map[:60, :60] = 0.5
    values = {
        "reason": "answered",
        "frame": FrameSize(width=width, height=height),
        "resize": "stretch",
        "p_anomaly": 0.75,
        "sentence": "Yes, there is an anomaly in the image, at the top left of the image.",
        "maps": anomaly_map[None],
        "score": 0.5,
        "peak": 0.5,
        "regions": (),
    }
    return Verdict(status=status, **{**values, **changes})


def panes(canvas: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    second = 2 * MARGIN + width
    rows = slice(MARGIN, MARGIN + height)
    return canvas[rows, MARGIN : MARGIN + width], canvas[rows, second : second + width]


def test_heat_shows_where_the_map_is_high_and_nowhere_else():
    frame = np.full((480, 480, 3), 100, np.uint8)
    plain, heated = panes(draw_overlay(frame, make_verdict(480, 480), level=LEVEL), 480, 480)
    np.testing.assert_array_equal(plain, frame)
    blue, _, red = heated[20, 20].astype(int)
    assert red > blue + 60
    np.testing.assert_array_equal(heated[300:, 300:], frame[300:, 300:])


def test_the_area_outside_the_crop_is_dimmed():
    frame = np.full((240, 480, 3), 200, np.uint8)
    canvas = draw_overlay(frame, make_verdict(240, 480, resize="crop"), level=LEVEL)
    _, heated = panes(canvas, 240, 480)
    assert heated[120, 20].mean() < 120
    assert heated[200, 300].mean() == 200


def test_boxes_are_drawn_where_the_region_is():
    frame = np.full((960, 960, 3), 100, np.uint8)
    region = Region((400, 500, 200, 300), "center", 60000.0, 0.9)
    flat = np.zeros((224, 224), np.float32)
    verdict = make_verdict(960, 960, regions=(region,), maps=flat[None])
    _, heated = panes(draw_overlay(frame, verdict, level=LEVEL), 480, 480)
    changed = np.argwhere((heated != 100).any(axis=2))
    assert abs(changed[:, 1].min() - 200) <= 3
    assert abs(changed[:, 0].max() - 400) <= 3


@pytest.mark.parametrize("status", list(Status))
def test_the_caption_has_the_status_colour(status):
    canvas = draw_overlay(np.zeros((480, 640, 3), np.uint8), make_verdict(480, 640, status), level=LEVEL)
    below = canvas[360 + MARGIN :]
    assert (below == STATUS_COLORS[status]).all(axis=2).sum() > 800


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (37, 53), (1500, 1100)])
@pytest.mark.parametrize("level", [None, LEVEL])
def test_any_frame_size_can_be_drawn(shape, level):
    canvas = draw_overlay(np.zeros((*shape, 3), np.uint8), make_verdict(*shape), "part 1", level)
    assert canvas.dtype == np.uint8
    assert canvas.shape[1] >= PANE_SIDE / max(shape)


@pytest.mark.parametrize("sentence", ["", "word " * 200, "x" * 900, "日本語 \N{PILE OF POO} \x00 %s {}"])
def test_any_sentence_can_be_drawn(sentence):
    frame = np.zeros((480, 640, 3), np.uint8)
    draw_overlay(frame, make_verdict(480, 640, sentence=sentence, reason="why"), sentence, LEVEL)


def test_a_part_without_a_frame_has_an_overlay():
    verdict = make_verdict(0, 0, Status.NO_RESULT, maps=None, frame=None, sentence="", p_anomaly=None)
    assert draw_overlay(None, verdict).shape[1] > PANE_SIDE


@pytest.mark.parametrize(
    ("part_id", "name"),
    [
        ("crack/004", "00007_crack_004.png"),
        ("../../etc/passwd", "00007_etc_passwd.png"),
        ("", "00007_part.png"),
        ("…", "00007_part.png"),
    ],
)
def test_an_id_never_becomes_a_path(part_id, name):
    assert overlay_name(7, part_id) == name


def test_files_are_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    OverlayFolder(tmp_path / "overlays").put("00001_a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "overlays" / "00001_a.png")), image)


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AgptError, match="another --out folder"):
        OverlayFolder(tmp_path / "file")


def test_a_picture_is_whole_or_absent(tmp_path):
    """The system takes the first 100 bytes of a file and refuses the rest, as a full disk does."""
    folder = OverlayFolder(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    folder.put("00001_a.png", image)
    before = (tmp_path / "00001_a.png").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for name in ("00001_a.png", "00002_b.png"):
            with pytest.raises(AgptError, match=f"cannot write .*{name} .File too large.: free some space"):
                folder.put(name, 255 - image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["00001_a.png"]
    assert (tmp_path / "00001_a.png").read_bytes() == before


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    (tmp_path / ".00007_a.png.partial").write_bytes(b"half")
    OverlayFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []

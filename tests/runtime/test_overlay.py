"""The overlay: the frame with its regions, the map in fixed colours with a scale, and the status' colour."""

from __future__ import annotations

import resource

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels import Box, summarise
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.inspection.verdict import Region, Status, Verdict, ViewResult
from anomalygpt_edge.runtime.outputs.overlay import (
    MARGIN,
    MIN_WIDTH,
    STATUS_COLORS,
    STEPS,
    OverlayFolder,
    color_steps,
    draw_overlay,
    headline,
    is_below_limit,
    map_score,
    overlay_name,
    scale_colors,
)
from anomalygpt_edge.runtime.vision.views import FrameSize

LIMIT = 2.0
ALARMING = {tuple(color) for color in scale_colors()[STEPS:].tolist()}


def make_verdict(height: int, width: int, status: Status = Status.FAIL, **changes) -> Verdict:
    anomaly_map = np.zeros((224, 224), np.float32)
    anomaly_map[:60, :60] = 3.0
    values = {
        "reason": "answered",
        "frame": FrameSize(width=width, height=height),
        "resize": "stretch",
        "p_anomaly": 0.75,
        "sentence": "Yes, there is an anomaly in the image, at the top left of the image.",
        "maps": anomaly_map[None],
        "score": 3.0,
        "peak": 3.0,
        "limit": LIMIT,
        "regions": (),
    }
    return Verdict(status=status, **{**values, **changes})


def panes(canvas: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    second = 2 * MARGIN + width
    rows = slice(MARGIN, MARGIN + height)
    return canvas[rows, MARGIN : MARGIN + width], canvas[rows, second : second + width]


def alarming(image: np.ndarray) -> np.ndarray:
    """Which pixels have an alarm colour, bool [h, w]."""
    return np.array([[tuple(pixel) in ALARMING for pixel in row] for row in image.tolist()])


def test_the_map_has_a_pane_of_its_own_beside_the_frame() -> None:
    frame = np.full((480, 480, 3), 100, np.uint8)
    shown, map_pane = panes(draw_overlay(frame, make_verdict(480, 480)), 480, 480)
    np.testing.assert_array_equal(shown, frame)
    alarm = alarming(map_pane)
    assert alarm[:120, :120].all()
    assert not alarm[140:, 140:].any()
    np.testing.assert_array_equal(map_pane[300:, 300:], np.broadcast_to(scale_colors()[0], (180, 180, 3)))


@given(st.floats(0.1, 50), st.lists(st.floats(0, 100, width=32), min_size=1, max_size=50))
def test_alarm_colours_begin_at_the_limit(limit: float, values: list[float]) -> None:
    found = np.array(values, np.float32)
    steps = color_steps(found, limit)
    np.testing.assert_array_equal(steps >= STEPS, found >= limit)
    assert (np.diff(steps[np.argsort(found)]) >= 0).all(), "higher values have later colours"
    assert steps.max() < 2 * STEPS
    assert (color_steps(found, None) < STEPS).all(), "raw maps have no alarm colours"


def test_calm_and_alarm_colours_differ_at_a_glance() -> None:
    calm, alarm = scale_colors()[:STEPS].astype(int), scale_colors()[STEPS:].astype(int)
    assert len(np.unique(scale_colors(), axis=0)) == 2 * STEPS
    assert np.abs(calm[:, None] - alarm[None]).sum(axis=2).min() > 80
    assert (calm[:, 0] > calm[:, 2]).all(), "calm colours are bluish"
    assert (alarm[:, 2] > alarm[:, 0]).all(), "alarm colours are reddish"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0, 2, 4]), st.sampled_from(list(Status)))
def test_a_score_that_is_not_over_the_limit_has_no_alarm_colour(
    seed: int, num_views: int, status: Status
) -> None:
    """Not even where single pixels exceed the limit, nor where maps of several views are blended."""
    rng = np.random.default_rng(seed)
    maps = rng.random((max(1, num_views), 56, 56)).astype(np.float32)
    maps[rng.random(maps.shape) < 0.004] = 9
    scores = [summarise(each).top_mean for each in maps]
    limit = max(scores)
    assert maps.max() > limit
    boxes = [Box(40.0 * (index % 2), 40.0 * (index // 2), 60, 60) for index in range(num_views)]
    views = tuple(
        ViewResult(name=f"view {index}", box=box, score=score, peak=9.0, status=Status.PASS)
        for index, (box, score) in enumerate(zip(boxes, scores, strict=False))
    )
    values = {"maps": maps, "views": views, "score": max(scores), "limit": limit}
    _, map_pane = panes(
        draw_overlay(np.zeros((100, 100, 3), np.uint8), make_verdict(100, 100, status, **values)), 480, 480
    )
    assert not alarming(map_pane).any()
    over = {**values, "limit": limit * 0.9}
    _, map_pane = panes(
        draw_overlay(np.zeros((100, 100, 3), np.uint8), make_verdict(100, 100, status, **over)), 480, 480
    )
    assert alarming(map_pane).any()


def test_the_same_value_has_the_same_colour_in_every_part() -> None:
    frame = np.zeros((480, 480, 3), np.uint8)
    colours = []
    for rest in (0.5, 2.5):
        values = np.full((1, 224, 224), rest, np.float32)
        values[0, :60, :60] = 3.0
        colours.append(panes(draw_overlay(frame, make_verdict(480, 480, maps=values)), 480, 480)[1][20, 20])
    np.testing.assert_array_equal(*colours)


def test_the_legend_shows_the_whole_scale() -> None:
    frame = np.zeros((480, 480, 3), np.uint8)
    canvas = draw_overlay(frame, make_verdict(480, 480))
    legend = canvas[MARGIN + 480 + 14, 2 * MARGIN + 480 : 2 * MARGIN + 960]
    present = {tuple(color) for color in legend.tolist()}
    assert len(present & {tuple(color) for color in scale_colors().tolist()}) > 2 * STEPS - 8
    raw = draw_overlay(frame, make_verdict(480, 480, limit=None))
    assert not alarming(raw[MARGIN + 480 :]).any()
    assert map_score(make_verdict(480, 480, limit=None)) == "raw map score 3.000"
    assert map_score(make_verdict(480, 480)) == "map score 3.00, limit 2.00"


@pytest.mark.parametrize("size", [(240, 480), (480, 240)])
def test_what_lies_outside_the_crop_is_dimmed_and_has_no_map(size) -> None:
    height, width = size
    frame = np.full((height, width, 3), 200, np.uint8)
    canvas = draw_overlay(frame, make_verdict(height, width, resize="crop", unseen=0.5))
    shown, map_pane = panes(canvas, height, width)
    edge = (height // 2, 20) if width > height else (20, width // 2)
    assert shown[edge].mean() < 120
    assert shown[height // 2, width // 2].mean() == 200
    colours = {tuple(color) for color in scale_colors().tolist()}
    assert tuple(map_pane[edge].tolist()) not in colours
    assert tuple(map_pane[height // 2, width // 2].tolist()) in colours
    said = draw_overlay(frame, make_verdict(height, width, resize="crop"))
    assert (said != canvas).any(), "the share is written beside the legend"


def test_boxes_are_drawn_where_the_region_is() -> None:
    frame = np.full((960, 960, 3), 100, np.uint8)
    region = Region((400, 500, 200, 300), "center", 60000.0, 3.0)
    shown, map_pane = panes(draw_overlay(frame, make_verdict(960, 960, regions=(region,))), 480, 480)
    changed = np.argwhere((shown != 100).any(axis=2))
    assert abs(changed[:, 1].min() - 200) <= 3
    assert abs(changed[:, 0].max() - 400) <= 3
    assert (map_pane[300, 200] == 245).all()


def test_of_a_part_rejected_below_the_limit_the_highest_region_is_outlined() -> None:
    frame = np.full((960, 960, 3), 100, np.uint8)
    regions = tuple(Region((x, 500, 60, 60), "center", 3600.0, 1.0) for x in (100, 700))
    verdict = make_verdict(960, 960, regions=regions, score=1.5, maps=np.ones((1, 224, 224), np.float32))
    assert is_below_limit(verdict)
    shown, map_pane = panes(draw_overlay(frame, verdict), 480, 480)
    assert (shown[265, 50] == 245).all()
    assert (shown[265, 350] == 100).all()
    assert not alarming(map_pane).any()
    assert not is_below_limit(make_verdict(960, 960))
    assert not is_below_limit(make_verdict(960, 960, Status.PASS, score=1.5))
    assert not is_below_limit(make_verdict(960, 960, limit=None, score=1.5))


def test_labels_stand_beside_each_other() -> None:
    frame = np.full((960, 960, 3), 100, np.uint8)
    regions = tuple(Region((300, y, 40, 30), "center", 1200.0, 3.0) for y in (400, 440, 480))
    shown, _ = panes(draw_overlay(frame, make_verdict(960, 960, regions=regions)), 480, 480)
    plates = cv2.connectedComponents((shown == 245).all(axis=2).astype(np.uint8))[0] - 1
    assert plates >= 4, "three boxes and at least one plate apart from them"
    for region in regions:
        x, y, width, height = (side // 2 for side in region.box)
        assert (shown[y + 5 : y + height - 5, x + 5 : x + width - 5] == 100).all(), "no label hides a region"


def test_a_contradiction_shows_the_reason_which_quotes_the_answer() -> None:
    reason = "rejected by the map at top left (score 3, good parts at most 2); the model answered 'No.'"
    assert headline(make_verdict(9, 9, contradiction=True, reason=reason, sentence="No.")) == reason


@pytest.mark.parametrize("status", list(Status))
def test_the_caption_has_the_status_colour(status):
    canvas = draw_overlay(np.zeros((480, 640, 3), np.uint8), make_verdict(480, 640, status))
    below = canvas[360 + MARGIN + 40 :]
    assert (below == STATUS_COLORS[status]).all(axis=2).sum() > 800


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (37, 53), (1500, 1100)])
@pytest.mark.parametrize("limit", [None, 0.01, LIMIT, 1e9])
def test_any_frame_size_can_be_drawn(shape, limit):
    region = Region((0, 0, *shape[::-1]), "top left", 1.0, 3.0, "view")
    verdict = make_verdict(*shape, limit=limit, regions=(region,), unseen=0.5)
    canvas = draw_overlay(np.zeros((*shape, 3), np.uint8), verdict, "part 1")
    assert canvas.dtype == np.uint8
    assert canvas.shape[1] >= MIN_WIDTH


@pytest.mark.parametrize("sentence", ["", "word " * 200, "x" * 900, "日本語 \N{PILE OF POO} \x00 %s {}"])
def test_any_sentence_can_be_drawn(sentence):
    frame = np.zeros((480, 640, 3), np.uint8)
    draw_overlay(frame, make_verdict(480, 640, sentence=sentence, reason="why"), sentence)


def test_a_part_without_a_frame_has_an_overlay():
    verdict = make_verdict(0, 0, Status.NO_RESULT, maps=None, frame=None, sentence="", p_anomaly=None)
    assert draw_overlay(None, verdict).shape[1] > MIN_WIDTH


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

"""Scores, regions and places of anomaly maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels import summarise
from anomalygpt_edge.models import prompts
from anomalygpt_edge.runtime.common.places import PLACES, named_places, place_name
from anomalygpt_edge.runtime.inspection.assemble import places_agree
from anomalygpt_edge.runtime.inspection.verdict import Region, Status, Verdict
from anomalygpt_edge.runtime.vision.regions import (
    MAX_REGIONS,
    find_regions,
    half_way_level,
    top_mean,
)
from anomalygpt_edge.runtime.vision.views import FrameSize

UNIT = st.floats(0, 1)


def test_places_are_those_of_the_training_answers() -> None:
    assert PLACES == prompts.PLACES


@given(UNIT, UNIT)
def test_place_names_follow_the_training_rule(row: float, column: float) -> None:
    assert place_name(row, column) == prompts.place_name(row, column)


@given(st.lists(st.sampled_from(prompts.PLACES), min_size=1, max_size=9))
def test_places_are_read_back_from_the_training_answers(places: list[str]) -> None:
    assert named_places(prompts.answer(places)) == list(dict.fromkeys(places))


def test_the_negative_answer_names_no_place() -> None:
    assert named_places(prompts.answer([])) == []


def test_top_mean_is_the_mean_of_one_percent() -> None:
    values = np.random.default_rng(0).permutation(10_000).astype(np.float32).reshape(100, 100)
    assert top_mean(values) == pytest.approx(np.arange(9900, 10_000).mean())


def test_half_way_level() -> None:
    values = np.zeros((10, 10), np.float32)
    values[0, 0] = 0.8
    assert half_way_level(summarise(values)) == pytest.approx(0.4)
    assert half_way_level(summarise(values), 0.5) == 0.5
    assert half_way_level(summarise(values), 0.9) == pytest.approx(0.4)  # above the peak


def test_a_square_is_found_where_it_is() -> None:
    values = np.zeros((224, 224), np.float32)
    values[10:30, 150:180] = 0.9
    values[15, 160] = 0.95
    (region,) = find_regions(values, 0.5, (448, 896), "crop")  # resized to 224 × 448: scale 2, 112 cut left
    assert region.box == (2 * (150 + 112), 20, 60, 40)
    assert region.place == "top right"
    assert region.area_px == 20 * 30 * 4
    assert region.peak == pytest.approx(0.95)


def test_stretched_frames_scale_each_side() -> None:
    values = np.zeros((224, 224), np.float32)
    values[112:, :56] = 1
    (region,) = find_regions(values, 0.5, (224, 448), "stretch")
    assert region.box == (0, 112, 112, 112)
    assert region.place == "bottom left"


def test_small_components_are_left_out_and_the_strongest_comes_first() -> None:
    values = np.zeros((224, 224), np.float32)
    values[5, 5] = 1
    values[100:110, 100:110] = 0.6
    values[200:210, 200:210] = 0.8
    regions = find_regions(values, 0.5, (224, 224), "crop")
    assert [region.place for region in regions] == ["bottom right", "center"]


def test_the_highest_of_several_specks_is_kept_where_there_is_nothing_else() -> None:
    values = np.zeros((224, 224), np.float32)
    values[5, 5] = 0.8
    values[200, 200] = 0.9
    (region,) = find_regions(values, 0.5, (224, 224), "crop")
    assert (region.place, region.box) == ("bottom right", (200, 200, 1, 1))


def test_a_flat_map_has_no_region_above_it() -> None:
    assert find_regions(np.full((224, 224), 0.2, np.float32), 0.3, (224, 224), "crop") == ()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 1200), st.integers(1, 1200), st.sampled_from(["crop", "stretch"]), st.integers(0, 99), UNIT
)
def test_boxes_lie_in_the_frame(height: int, width: int, resize: str, seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.kron(rng.random((7, 7)), np.ones((32, 32))).astype(np.float32)
    regions = find_regions(values, level, (height, width), resize)  # type: ignore[arg-type]
    assert len(regions) <= MAX_REGIONS
    for region in regions:
        x, y, w, h = region.box
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        assert region.place in PLACES
        assert level <= region.peak <= values.max()


@pytest.mark.parametrize(
    ("sentence", "places", "agree"),
    [
        ("Yes, there is an anomaly in the image, at the top left of the image.", ["top left"], True),
        ("Yes, there is an anomaly in the image, at the top left of the image.", ["top left"] * 2, True),
        (
            "Yes, there is an anomaly in the image, at the top left of the image.",
            ["top left", "center"],
            False,
        ),
        ("Yes, there are 2 anomalies in the image, they are at the top and left.", ["left", "top"], True),
        ("Yes, there are 2 anomalies in the image, they are at the top and left.", ["left"], False),
        ("Yes, there is an anomaly in the image, at the top left of the image.", ["top"], False),
        ("Yes, there is an anomaly in the image, at the top left of the image.", [], False),
        ("Yes, there is an anomaly.", ["center"], None),
    ],
)
def test_agreement(sentence: str, places: list[str], agree: bool | None) -> None:
    regions = tuple(Region((0, 0, 1, 1), place, 1.0, 1.0) for place in places)
    assert places_agree(sentence, regions) is agree


def test_map_in_frame_undoes_the_crop() -> None:
    values = np.zeros((224, 224), np.float32)
    values[10:30, 150:180] = 1
    verdict = Verdict(
        status=Status.FAIL, reason="", frame=FrameSize(width=896, height=448), maps=values[None]
    )
    framed = verdict.map_in_frame(outside=-1)
    assert framed.shape == (448, 896)
    assert framed.dtype == np.float32
    assert (framed[:, :224] == -1).all()
    assert (framed[:, 672:] == -1).all()
    assert (framed[:, 224:672] >= 0).all()
    assert framed[22:58, 526:582].min() == 1
    assert framed[:, 224:522].max() == 0
    assert framed[64:, 224:672].max() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["crop", "stretch"]))
def test_map_in_frame_keeps_a_constant_value(height: int, width: int, resize: str) -> None:
    verdict = Verdict(
        status=Status.PASS,
        reason="",
        frame=FrameSize(width=width, height=height),
        resize=resize,
        maps=np.full((1, 224, 224), 0.25, np.float32),
    )
    framed = verdict.map_in_frame()
    assert framed.shape == (height, width)
    assert set(np.unique(framed)) <= {0, np.float32(0.25)}
    assert (framed > 0).sum() >= 0.9 * min(height, width) ** 2 - 1


def test_records_contain_no_nan() -> None:
    record = Verdict(
        status=Status.NO_RESULT, reason="x", p_anomaly=float("nan"), score=float("inf")
    ).to_record()
    assert record["p_anomaly"] is None
    assert record["score"] is None
    assert "maps" not in record

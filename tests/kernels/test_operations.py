"""Every implementation against Pillow, OpenCV, torch and plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalygpt_edge.kernels import (
    INJECTED,
    Box,
    cell_peaks,
    components,
    coreset,
    localise,
    match,
    match_places,
    match_scaled,
    nearest_row,
    normalise,
    pack_prompt,
    prepare_bank,
    preprocess,
    project,
    resize_window,
    summarise,
    tile_grid,
    upsample,
)
from anomalygpt_edge.kernels.dequantise import BLOCKS, ROW_TYPES, dequantise
from anomalygpt_edge.models.anomalygpt import few_shot_distance, upsample_map

pytestmark = pytest.mark.usefixtures("implementation")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDES = st.integers(1, 300)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """Undo the normalisation: [3, S, S] → integers [S, S, 3], RGB."""
    return np.rint((pixels.transpose(1, 2, 0) * np.float32(STD) + np.float32(MEAN)) * 255).astype(int)


def pillow(frame: np.ndarray, size: int, resize: str) -> np.ndarray:
    """The original's transform: torchvision's Resize(bicubic) and CenterCrop, written with Pillow."""
    image = Image.fromarray(frame[:, :, ::-1])
    if resize == "stretch":
        return np.asarray(columns_first(image, (size, size)), int)
    width, height = image.size
    if width <= height:
        target = size, int(size * height / width)
    else:
        target = int(size * width / height), size
    image = columns_first(image, target)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)), int)


def columns_first(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Pillow before 13 resizes columns, then rows; newer ones choose, so the passes are asked for one by one."""
    for size in ((target[0], image.height), target):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return image


@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize(
    "shape", [(480, 640), (640, 480), (224, 224), (97, 131), (301, 224), (60, 1000), (1, 1), (225, 449)]
)
def test_preprocess_equals_pillow(shape: tuple[int, int], resize: str) -> None:
    frame = noise(*shape)
    pixels = preprocess(frame, 224, resize, MEAN, STD)[0]  # type: ignore[arg-type]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(grey_levels(pixels), pillow(frame, 224, resize), err_msg=PIL.__version__)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from([7, 32, 56]), st.sampled_from(["crop", "stretch"]), st.integers(0, 9))
def test_preprocess_equals_pillow_at_any_size(h: int, w: int, size: int, resize: str, seed: int) -> None:
    frame = noise(h, w, seed)
    pixels = preprocess(frame, size, resize, MEAN, STD)[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(grey_levels(pixels), pillow(frame, size, resize))


def test_preprocess_normalises_as_torch_does() -> None:
    frame = noise(32, 32)
    expected = torch.tensor(frame[:, :, ::-1].copy()).permute(2, 0, 1).float().div(255)
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    np.testing.assert_array_equal(preprocess(frame, 32, "crop", MEAN, STD)[0], expected.numpy())


def test_preprocess_takes_views() -> None:
    frame = noise(90, 120)
    flipped = frame[::-1, ::-1]
    np.testing.assert_array_equal(
        preprocess(flipped, 56, "crop", MEAN, STD), preprocess(flipped.copy(), 56, "crop", MEAN, STD)
    )


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3)),
    ],
    ids=lambda frame: f"{frame.dtype}{frame.shape}",
)
def test_preprocess_refuses_what_is_no_frame(frame: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        preprocess(frame, 224, "crop", MEAN, STD)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from(["crop", "stretch"]))
def test_the_window_lies_in_the_resized_frame(h: int, w: int, resize: str) -> None:
    window = resize_window(h, w, 224, resize)  # type: ignore[arg-type]
    assert 0 <= window.top <= window.height - 224
    assert 0 <= window.left <= window.width - 224
    if resize == "crop":
        assert min(window.height, window.width) == 224
        assert abs(2 * window.left + 224 - window.width) <= 1


def test_window_rounds_half_to_even_and_truncates() -> None:
    assert resize_window(224, 225, 224, "crop").left == 0  # 0.5 → 0
    assert resize_window(224, 227, 224, "crop").left == 2  # 1.5 → 2
    assert resize_window(427, 611, 224, "crop").width == 320  # 320.53


def test_normalise_gives_unit_length_and_keeps_zero() -> None:
    features = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    features[1, 2] = 0
    lengths = np.linalg.norm(normalise(features), axis=-1)
    assert lengths[1, 2] == 0
    np.testing.assert_allclose(np.delete(lengths.ravel(), 7), 1, rtol=1e-6)


def test_match_equals_torch() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 4, 49, 24)).astype(np.float32)
    bank = rng.normal(size=(4, 130, 24)).astype(np.float32)
    distance = match(query, normalise(bank))
    expected = few_shot_distance(torch.tensor(query), torch.tensor(bank).expand(2, -1, -1, -1))
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, expected.numpy(), atol=1e-5)


def test_match_finds_itself_whatever_the_length() -> None:
    query = np.random.default_rng(0).normal(size=(1, 4, 9, 16)).astype(np.float32)
    np.testing.assert_allclose(match(7 * query, normalise(query[0])), 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 0, 16), (3, 9, 16), (4, 9, 8)])
def test_match_refuses_a_bank_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bank"):
        match(np.ones((1, 4, 9, 16), np.float32), np.ones(shape, np.float32))


@pytest.mark.parametrize(("grid", "size"), [(16, 224), (3, 10), (2, 2), (16, 16)])
def test_upsample_equals_torch(grid: int, size: int) -> None:
    values = np.random.default_rng(0).random((2, grid * grid)).astype(np.float32)
    expected = upsample_map(torch.tensor(values), size).numpy()
    np.testing.assert_allclose(upsample(values, size), expected, atol=1e-5)


# -- pixel formats and boxes -----------------------------------------------------------------------


def identity(frame: np.ndarray, format: str, size: int, boxes: list[Box] | None = None) -> np.ndarray:
    """Levels [B, S, S, 3] in BGR order of squares that are not resized."""
    pixels = preprocess(frame, size, "crop", (0, 0, 0), (1, 1, 1), format=format, boxes=boxes)  # type: ignore[arg-type]
    return np.rint(pixels.transpose(0, 2, 3, 1)[..., ::-1] * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("format", "shape", "code"),
    [
        ("RGB8", (32, 32, 3), cv2.COLOR_RGB2BGR),
        ("Mono8", (32, 32), cv2.COLOR_GRAY2BGR),
        ("NV12", (48, 32), cv2.COLOR_YUV2BGR_NV12),
        ("YUYV", (32, 32, 2), cv2.COLOR_YUV2BGR_YUYV),
        ("BayerRG8", (32, 32), cv2.COLOR_BayerRGGB2BGR),
    ],
)
def test_colours_are_opencvs(format: str, shape: tuple[int, ...], code: int) -> None:
    for seed in range(20):
        frame = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(identity(frame, format, 32)[0], cv2.cvtColor(frame, code))


def test_a_box_is_what_a_cut_frame_gives() -> None:
    frame = noise(90, 120)
    boxes = [Box(10, 20, 60, 50), Box(0, 0, 120, 90), Box(119, 89, 1, 1)]
    together = preprocess(frame, 56, "crop", MEAN, STD, boxes=boxes)
    for square, box in zip(together, boxes, strict=True):
        x, y, width, height = map(int, box[:4])
        alone = preprocess(frame[y : y + height, x : x + width], 56, "crop", MEAN, STD)
        np.testing.assert_array_equal(square, alone[0])


def test_a_right_angle_turns_pixels_without_touching_them() -> None:
    frame = noise(80, 80)
    turned = identity(frame, "BGR8", 40, [Box(20, 20, 40, 40, angle) for angle in (0, 90, 180, 270, 360)])
    cut = frame[20:60, 20:60]
    for square, quarter in zip(turned, (0, 1, 2, 3, 0), strict=True):
        np.testing.assert_array_equal(square, np.rot90(cut, quarter))  # clockwise box: the part turns back


def test_a_rotated_box_is_opencvs_warp_to_a_level() -> None:
    frame = cv2.GaussianBlur(noise(200, 300), (0, 0), 2)
    angle, center = 25.0, (140.0, 95.0)
    box = Box(center[0] - 45, center[1] - 45, 90, 90, angle)
    matrix = cv2.getRotationMatrix2D((center[0] - 0.5, center[1] - 0.5), angle, 1)
    matrix[:, 2] += 45 - np.array(center)
    expected = cv2.warpAffine(
        frame, matrix, (90, 90), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    difference = np.abs(identity(frame, "BGR8", 90, [box])[0].astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.05


def test_half_precision_is_the_rounded_result() -> None:
    frame = noise(90, 120)
    half = preprocess(frame, 56, "crop", MEAN, STD, dtype=np.float16)
    np.testing.assert_array_equal(half, preprocess(frame, 56, "crop", MEAN, STD).astype(np.float16))


def test_preprocess_writes_where_it_is_told() -> None:
    frame = noise(30, 40)
    out = np.full((3, 3, 28, 28), np.nan, np.float32)
    assert preprocess(frame, 28, "crop", MEAN, STD, boxes=[Box(0, 0, 30, 30)] * 3, out=out) is out
    np.testing.assert_array_equal(out[2], preprocess(frame[:, :30], 28, "crop", MEAN, STD)[0])
    for wrong in (out[:2], out.astype(np.float64), out[..., ::-1], np.asfortranarray(out)):
        with pytest.raises(ValueError, match="out must be"):
            preprocess(frame, 28, "crop", MEAN, STD, boxes=[Box(0, 0, 30, 30)] * 3, out=wrong)


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        ("NV12", (47, 32)), ("NV12", (48, 31)), ("NV12", (4, 2)), ("YUYV", (8, 7, 2)), ("YUYV", (8, 8)),
        ("BayerRG8", (2, 8)), ("Mono8", (8, 8, 1)), ("Mono8", (0, 8)), ("RGB8", (8, 8, 4)), ("P010", (8, 8)),
        ("BGR8", (1, 70_000, 3)),
    ],
)  # fmt: skip
def test_a_frame_that_is_not_its_format_is_refused(format: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"frame|format"):
        preprocess(np.zeros(shape, np.uint8), 8, "crop", MEAN, STD, format=format)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "box",
    [
        Box(-1, 0, 4, 4), Box(0, 0, 9, 4), Box(0, 0, 4, 9), Box(0, 0, 0, 4), Box(7.6, 0, 1, 1),
        Box(100, 0, 4, 4, 30), Box(0, 0, float("nan"), 4), Box(0, 0, 4, float("inf"), 5), Box(2, 2, 0.2, 3, 5),
    ],
)  # fmt: skip
def test_a_box_outside_the_frame_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="correct"):
        preprocess(noise(8, 8), 8, "crop", MEAN, STD, boxes=[box])


# -- banks -----------------------------------------------------------------------------------------


def true_distance(query: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """float64: [B, T, P, V] against [T, N, V]."""
    query, bank = query.astype(np.float64), bank.astype(np.float64)
    query = query / np.linalg.norm(query, axis=-1, keepdims=True)
    bank = bank / np.linalg.norm(bank, axis=-1, keepdims=True)
    return 1 - np.einsum("btpv,tnv->btpn", query, bank).max(axis=-1).mean(axis=1)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (np.float16, 1e-3), (np.int8, 2e-2)])
def test_match_is_near_float64_in_every_storage(dtype: type, limit: float) -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(4, 300, 192)).astype(np.float32)
    noise = rng.normal(size=(4, 256, 192)) * np.linspace(0.1, 2, 256)[:, None]  # from normal to defective
    query = (bank[:, rng.integers(0, 300, 256)] + noise)[None].astype(np.float32)
    expected = true_distance(query, bank)
    distance = match(query, prepare_bank(bank, dtype), threads=2)
    assert np.abs(distance - expected).max() < limit
    assert np.corrcoef(distance.ravel(), expected.ravel())[0, 1] > 0.9995


def test_match_names_the_nearest_row() -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(2, 77, 40)).astype(np.float32)
    rows = rng.integers(0, 77, (1, 2, 31))
    query = np.stack([bank[tap, rows[0, tap]] * 3 for tap in range(2)])[None]
    distance, nearest = match(query, prepare_bank(bank), indices=True)
    np.testing.assert_array_equal(nearest, rows)
    np.testing.assert_allclose(distance, 0, atol=1e-6)
    twice = np.concatenate([bank, bank], axis=1)
    np.testing.assert_array_equal(
        match(query, prepare_bank(twice), indices=True)[1], rows
    )  # the lowest of equals


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-5), (np.float16, 4e-3), (np.int8, 8e-2)])
def test_match_scaled_multiplies_by_the_gain_of_the_nearest_row(dtype: type, limit: float) -> None:
    rng = np.random.default_rng(0)
    bank = normalise(rng.normal(size=(3, 50, 24)).astype(np.float32))
    rows = rng.integers(0, 50, (2, 3, 16))
    query = np.take_along_axis(bank[None], rows[..., None], axis=2) * 3
    query = (query + rng.normal(size=query.shape) * 0.2).astype(np.float32)
    gains = (rng.random((3, 50)) * 2).astype(np.float32)
    prepared = prepare_bank(bank, dtype)
    distance, scaled, nearest = match_scaled(query, prepared, gains, threads=2)
    plain, plain_nearest = match(query, prepared, indices=True)
    np.testing.assert_array_equal(distance, plain)
    np.testing.assert_array_equal(nearest, plain_nearest)
    np.testing.assert_array_equal(nearest, rows)
    expected = sum(gains[tap, rows[:, tap]] * true_distance(query[:, [tap]], bank[[tap]]) for tap in range(3))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, expected, atol=limit)
    _, equal, _ = match_scaled(query, prepared, np.full((3, 50), 1 / 3, np.float32))
    np.testing.assert_allclose(equal, distance, atol=1e-6)


def test_match_scaled_is_never_negative() -> None:
    """The similarity of a row with itself is rounded, sometimes to more than 1."""
    bank = np.random.default_rng(0).normal(size=(2, 300, 64)).astype(np.float32)
    distance, scaled, _ = match_scaled(bank[None], bank, np.full((2, 300), 1e6, np.float32))
    assert distance.min() < 0
    assert scaled.min() == 0
    assert scaled.max() < 1


def test_match_scaled_refuses_gains_that_do_not_fit_the_bank() -> None:
    query, bank = np.ones((1, 2, 4, 8), np.float32), prepare_bank(np.ones((2, 3, 8), np.float32))
    for gains in (np.ones((2, 4), np.float32), np.ones(3, np.float32), np.ones((2, 3))):
        with pytest.raises(ValueError, match=r"gains \[2, 3\]"):
            match_scaled(query, bank, gains)
    with pytest.raises(ValueError, match="match_scaled takes features"):
        match_scaled(query[:, :1], bank, np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="match_scaled takes float32 features"):
        match_scaled(query.astype(np.float64), bank, np.ones((2, 3), np.float32))


@pytest.mark.parametrize(("side", "radius"), [(1, 0), (2, 5), (6, 0), (6, 1), (9, 2), (11, 3), (28, 2)])
def test_match_places_is_the_nearest_patch_of_the_window(side: int, radius: int) -> None:
    rng = np.random.default_rng(side)
    features = rng.normal(size=(2, 2, side**2, 12)).astype(np.float32)
    reference = normalise(rng.normal(size=(3, 2, side**2, 12)).astype(np.float32))
    found = match_places(features * 7, reference, radius, threads=2)
    similarity = np.einsum("btqv,ktpv->bktpq", normalise(features), reference, dtype=np.float64)
    row, column = np.divmod(np.arange(side**2), side)
    near = np.maximum(abs(row[:, None] - row), abs(column[:, None] - column)) <= radius
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 - np.where(near, similarity, -np.inf).max(axis=-1), atol=1e-6)


def test_match_places_finds_what_has_moved_and_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(1, 2, 8, 8, 16)).astype(np.float32)
    part = np.roll(normal, (1, 2), axis=(2, 3))
    part[:, :, 4, 4] = rng.normal(size=16)  # where the patch of row 3, column 2 has moved to
    features, reference = part.reshape(1, 2, 64, 16), normalise(normal.reshape(1, 2, 64, 16))
    inside = np.s_[0, 0, :, :7, :6]  # beyond, patches have left the image
    moved = match_places(features, reference, 2).reshape(1, 1, 2, 8, 8)[inside]
    assert np.argwhere((moved > 1e-5).any(axis=0)).tolist() == [[3, 2]]
    assert (match_places(features, reference, 1).reshape(1, 1, 2, 8, 8)[inside] > 0.01).all()


def test_match_places_shows_what_is_not_finite_in_the_window_only() -> None:
    features = np.random.default_rng(0).normal(size=(2, 2, 49, 9)).astype(np.float32)
    features[0, 1, 0, 3], features[0, 1, 3 * 7 + 5, 0], features[1, 0, 48, 8] = np.nan, np.inf, -np.inf
    features[1, 1] = 0
    reference = normalise(np.ones((2, 2, 49, 9), np.float32))
    found = match_places(features, reference, 1, threads=3).reshape(2, 2, 2, 7, 7)
    expected = np.zeros(found.shape, bool)
    expected[0, :, 1, :2, :2] = expected[0, :, 1, 2:5, 4:7] = expected[1, :, 0, 5:, 5:] = True
    np.testing.assert_array_equal(np.isnan(found), expected)
    assert (found[1, :, 1] == 1).all()


def test_match_places_refuses_what_does_not_fit() -> None:
    features, reference = np.ones((1, 2, 9, 8), np.float32), np.ones((3, 2, 9, 8), np.float32)
    for other in (reference[:, :1], reference[:, :, :4], reference[..., :7], reference[0]):
        with pytest.raises(ValueError, match="same T, P and V"):
            match_places(features, other, 1)
    for one, other in (
        (features.astype(np.float64), reference),
        (features, reference.astype(np.float16)),
        (features, reference[:0]),
    ):
        with pytest.raises(ValueError, match="float32 features and at least one"):
            match_places(one, other, 1)
    with pytest.raises(ValueError, match="square grid"):
        match_places(features[:, :, :8], reference[:, :, :8], 1)
    with pytest.raises(ValueError, match="radius of at least 0"):
        match_places(features, reference, -1)


def test_nearest_row_is_the_row_that_most_taps_name() -> None:
    assert nearest_row(np.array([3, 5, 5, 9])) == 5
    assert nearest_row(np.array([3, 5, 7, 9])) == 9
    assert nearest_row(np.array([3, 5, 5, 3])) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_what_is_not_finite_stays_visible(dtype: type) -> None:
    query = np.random.default_rng(0).normal(size=(1, 2, 9, 16)).astype(np.float32)
    query[0, 0, 1, 3], query[0, 1, 2, 4], query[0, 0, 3, 5] = np.nan, np.inf, -np.inf
    query[0, :, 4] = 0
    query[0, :, 5] = 3e38  # its square overflows float32
    bank, gains = prepare_bank(np.ones((2, 5, 16), np.float32), dtype), np.ones((2, 5), np.float32)
    distance, scaled, nearest = match_scaled(query, bank, gains)
    assert np.isnan(distance[0, 1:4]).all()
    np.testing.assert_array_equal(np.isnan(scaled), np.isnan(distance))
    assert scaled[0, 4] == 2
    assert (nearest[0, 0, [1, 3]] == -1).all()
    assert nearest[0, 1, 2] == -1
    assert distance[0, 4] == 1
    assert distance[0, 5] == pytest.approx(0, abs=1e-3)
    assert np.isfinite(np.delete(distance[0], [1, 2, 3])).all()


@pytest.mark.parametrize(
    ("features", "word"),
    [
        (np.zeros((1, 0, 4), np.float32), "N >= 1"),
        (np.zeros((1, 4), np.float32), "T, N, V"),
        (np.full((1, 2, 4), np.nan, np.float32), "finite"),
        (np.zeros((1, 2, 4), np.int8), "float"),
    ],
)
def test_a_bank_that_is_none_is_refused(features: np.ndarray, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        prepare_bank(features)
    with pytest.raises(ValueError, match="stored as"):
        prepare_bank(np.ones((1, 2, 4), np.float32), np.float64)


def test_coreset_covers_what_it_leaves_out() -> None:
    rng = np.random.default_rng(0)
    centers = normalise(rng.normal(size=(6, 24)).astype(np.float32))
    rows = normalise(np.repeat(centers, 20, axis=0) + rng.normal(size=(120, 24)).astype(np.float32) * 0.02)
    chosen = coreset(np.stack([rows, rows[::-1]]), 6)
    assert sorted(chosen[0] // 20) == list(range(6))  # one of every cluster
    assert sorted((119 - chosen[1]) // 20) == list(range(6))
    np.testing.assert_array_equal(coreset(rows[None], 3)[0], chosen[0, :3])  # a prefix is a smaller coreset
    assert sorted(coreset(rows[None], 500)[0]) == list(range(120))
    assert sorted(coreset(np.ones((1, 4, 3), np.float32), 4)[0]) == [0, 1, 2, 3]


# -- maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [(16, 224), (3, 10), (1, 5), (4, 1)])
def test_localise_equals_torch(grid: int, size: int) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 4, grid * grid, 2)).astype(np.float32) * 5
    planes = torch.tensor(logits).permute(0, 1, 3, 2).reshape(8, 2, grid, grid)
    upsampled = F.interpolate(planes, size=(size, size), mode="bilinear", align_corners=True)
    expected = upsampled.softmax(dim=1)[:, 1].reshape(2, 4, size, size).mean(dim=1)
    np.testing.assert_allclose(localise(logits, size), expected.numpy(), atol=3e-5)


def test_a_logit_that_is_not_finite_spoils_its_image_only() -> None:
    logits = np.zeros((3, 2, 16, 2), np.float32)
    logits[1, 1, 3, 0] = np.inf
    found = localise(logits, 20)
    assert np.isnan(found[1]).all()
    assert (found[[0, 2]] == 0.5).all()
    found = upsample(np.array([[1, 1, 1, 1], [1, np.nan, 1, 1]], np.float32), 5)
    assert np.isnan(found[1]).all()
    assert (found[0] == 1).all()


@pytest.mark.parametrize("size", [(30, 45), (120, 180), (7, 200)])
def test_project_at_another_size_is_the_frame_in_other_pixels(size: tuple[int, int]) -> None:
    box = Box(9, 6, 36, 30)
    ramp = np.tile(
        box.x + (np.arange(24, dtype=np.float32) + 0.5) * box.width / 24, (24, 1)
    )  # its own frame x
    found = project(ramp[None], [box], "stretch", (60, 90), size=size, outside=-1)
    assert found.shape == size
    x, y = ((np.arange(count) + 0.5) * side / count for count, side in ((size[1], 90), (size[0], 60)))
    inside = ((y >= 6) & (y <= 36))[:, None] & ((x >= 9) & (x <= 45))
    np.testing.assert_array_equal(found == -1, ~inside)
    expected = np.broadcast_to(np.clip(x, ramp.min(), ramp.max()), size)
    np.testing.assert_allclose(found[inside], expected[inside], rtol=1e-5)


def test_project_puts_a_map_where_its_pixels_came_from() -> None:
    bright = np.zeros((60, 90, 3), np.uint8)
    bright[20:32, 50:70] = 255
    boxes = [Box(30, 10, 50, 40), Box(35, 8, 44, 44, 20.0)]
    squares = preprocess(bright, 44, "stretch", (0, 0, 0), (1, 1, 1), boxes=boxes)
    for square, box in zip(squares, boxes, strict=True):
        back = project(square[:1], [box], "stretch", (60, 90), outside=-1)
        inside = back >= 0
        assert 0.9 < inside.sum() / (box.width * box.height) < 1.1
        truth = bright[..., 0] > 0
        assert ((back > 0.5) == truth)[inside].mean() > 0.98
        assert truth[inside].any()


def test_overlapping_tiles_blend_without_a_seam() -> None:
    boxes = tile_grid(100, 160, 64, 0.3)
    ramp = np.linspace(0, 1, 160, dtype=np.float32)[None].repeat(100, axis=0)
    maps = np.stack([ramp[int(b.y) : int(b.y) + 64, int(b.x) : int(b.x) + 64] for b in boxes])
    found = project(np.ascontiguousarray(maps), boxes, "stretch", (100, 160), outside=np.nan)
    np.testing.assert_allclose(found, ramp, atol=1e-5)  # every pixel is covered, and all tiles agree


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(20, 150), st.floats(0, 0.9))
def test_tiles_cover_the_frame(height: int, width: int, tile: int, overlap: float) -> None:
    covered = np.zeros((height, width), bool)
    for box in tile_grid(height, width, tile, overlap):
        x, y, w, h = map(int, box[:4])
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        covered[y : y + h, x : x + w] = True
    assert covered.all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.integers(1, 5))
def test_components_are_opencvs(height: int, width: int, seed: int, coarse: int) -> None:
    values = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    values = np.floor(values * 10 * coarse) / (10 * coarse)
    values[values < 0.1] = np.nan
    found = components(values.astype(np.float32), 0.6)
    above = (np.nan_to_num(values) >= np.float32(0.6)).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    expected = [
        (*row, float(np.nanmax(values[labels == label])))
        for label, row in enumerate(stats[1:].tolist(), start=1)
    ]
    assert sorted(map(tuple, found)) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), st.integers(1, 5), st.booleans())
def test_cell_peaks_are_the_highest_of_their_cells(
    height: int, width: int, seed: int, cells: int, spoilt: bool
) -> None:
    values = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    if spoilt:
        values[seed % height, seed % width] = np.nan
    rows, columns = (np.maximum(-(-np.arange(side) * cells // side) - 1, 0) for side in (height, width))
    found = cell_peaks(values, cells)
    for i, j in np.ndindex(cells, cells):
        cell = values[rows == i][:, columns == j]
        np.testing.assert_equal(found[i, j], cell.max() if cell.size else -np.inf)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), st.sampled_from([1, 1e30, 1e-40, -3]))
def test_a_summary_is_numpys(height: int, width: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(height, width)) * scale).astype(np.float32)
    values[rng.random((height, width)) < 0.3] = values[0, 0]
    count = max(1, round(values.size / 100))
    expected = (
        values.max(),
        values.min(),
        np.median(values),
        np.sort(values.ravel())[-count:].mean(dtype=float),
    )
    assert summarise(values) == pytest.approx(expected, rel=1e-6)
    values[-1, -1] = np.inf
    assert np.isnan(summarise(values)).all()


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ROW_TYPES)
def test_a_prompt_is_the_tables_rows_and_the_injected(type: str) -> None:
    rng = np.random.default_rng(0)
    values, size = BLOCKS[type]
    table = rng.integers(0, 256, (50, 512 // values * size), dtype=np.uint8)
    if type in ("F32", "F16", "BF16"):
        table[:, 1::2] &= 0x3F  # finite
    for block in range(0, table.shape[1], size):
        if type.startswith("Q"):
            for at in (0, 2, size - 2):
                table[:, block + at + 1] &= 0x3B  # float16 scales that are finite
    ids = rng.integers(0, 50, 70).astype(np.int64)
    ids[[0, 20, 21, 69]] = INJECTED
    injected = rng.normal(size=(4, 512)).astype(np.float32)
    batch = pack_prompt(table, type, ids, injected, threads=2)
    np.testing.assert_array_equal(batch[ids == INJECTED], injected)
    np.testing.assert_array_equal(batch[ids >= 0], dequantise(table[ids[ids >= 0]], type))


def test_a_prompt_that_does_not_fit_its_table_is_refused() -> None:
    table = np.zeros((10, 34), np.uint8)
    ids = np.array([1, 2, -1], np.int32)
    row = np.zeros((1, 32), np.float32)
    assert pack_prompt(table, "Q8_0", ids, row).shape == (3, 32)
    assert pack_prompt(table, "Q8_0", ids[:0]).shape == (0, 32)
    for wrong, word in (
        ((table, "Q8_1", ids, row), "type Q8_1"),
        ((table[:, :33], "Q8_0", ids, row), "34"),
        ((np.zeros((10, 68), np.uint8)[:, ::2], "Q8_0", ids, row), "contiguous"),
        ((table, "Q8_0", ids + 8, row), "outside"),
        ((table, "Q8_0", ids - 1, row), "outside"),
        ((table, "Q8_0", ids), "injected"),
        ((table, "Q8_0", ids, row.astype(np.float64)), "injected"),
        ((table, "Q8_0", ids.astype(float), row), "integers"),
    ):
        with pytest.raises(ValueError, match=word):
            pack_prompt(*wrong)  # type: ignore[arg-type]


# -- arrays ----------------------------------------------------------------------------------------


class OnDevice:
    """What pycuda, cupy and torch give: the attributes of an array, its memory elsewhere."""

    def __init__(self, *shape: int, dtype: type = np.float32) -> None:
        self.shape, self.ndim, self.size, self.dtype = shape, len(shape), math.prod(shape), np.dtype(dtype)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": self.dtype.str, "data": (4096, False), "version": 2
        }  # fmt: skip


BANK = prepare_bank(np.ones((2, 3, 8), np.float32))


@pytest.mark.parametrize(
    "call",
    [
        lambda: preprocess(OnDevice(8, 8, 3, dtype=np.uint8), 8, "crop", MEAN, STD),
        lambda: preprocess(noise(8, 8), 8, "crop", MEAN, STD, out=OnDevice(1, 3, 8, 8)),
        lambda: match(OnDevice(1, 2, 4, 8), BANK),
        lambda: match(np.ones((1, 2, 4, 8), np.float32), OnDevice(2, 3, 8)),
        lambda: match_scaled(OnDevice(1, 2, 4, 8), BANK, np.ones((2, 3), np.float32)),
        lambda: match_scaled(np.ones((1, 2, 4, 8), np.float32), BANK, OnDevice(2, 3)),
        lambda: match_places(OnDevice(1, 2, 4, 8), np.ones((1, 2, 4, 8), np.float32), 1),
        lambda: prepare_bank(OnDevice(2, 3, 8)),
        lambda: coreset(OnDevice(2, 3, 8), 2),
        lambda: localise(OnDevice(1, 2, 4, 2), 8),
        lambda: upsample(OnDevice(1, 4), 8),
        lambda: project(OnDevice(1, 4, 4), None, "crop", (8, 8)),
        lambda: summarise(OnDevice(4, 4)),
        lambda: cell_peaks(OnDevice(4, 4), 3),
        lambda: components(OnDevice(4, 4), 0.5),
        lambda: pack_prompt(OnDevice(4, 34, dtype=np.uint8), "Q8_0", np.zeros(1, int)),
        lambda: pack_prompt(np.zeros((4, 34), np.uint8), "Q8_0", np.full(1, -1), OnDevice(1, 32)),
    ],
)
def test_an_array_on_a_device_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"takes NumPy arrays, not OnDevice: kernels\.cuda\.stages"):
        call()


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(ValueError, match=r"summarise takes NumPy arrays, not list: np\.asarray"):
        summarise([[1.0]])  # type: ignore[arg-type]

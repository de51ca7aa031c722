"""The .cu files on the CPU (``tools/cuda_shim``) against the NumPy reference, under sanitizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge import kernels
from anomalygpt_edge.kernels import Box, choice, cuda, prepare_bank
from anomalygpt_edge.kernels.cuda import stages
from anomalygpt_edge.kernels.cuda.driver import put
from anomalygpt_edge.kernels.dequantise import BLOCKS
from tools.cuda_shim import DeviceError, ShimDriver

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the shim is compiled with g++: install it"
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROPERTY = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["address", "thread"])
def device(request: pytest.FixtureRequest, devices: Callable[[str], ShimDriver]) -> Iterator[ShimDriver]:
    yield from in_use(devices(request.param))


@pytest.fixture
def address_device(devices: Callable[[str], ShimDriver]) -> Iterator[ShimDriver]:
    yield from in_use(devices("address"))


@pytest.fixture(scope="module")
def devices() -> Iterator[Callable[[str], ShimDriver]]:
    """One process for each sanitizer; a new one when a report has ended it."""
    running: dict[str, ShimDriver] = {}

    def device(sanitizer: str) -> ShimDriver:
        if sanitizer not in running or not running[sanitizer].alive:
            running[sanitizer] = ShimDriver(sanitizer)
        return running[sanitizer]

    yield device
    for driver in running.values():
        driver.close()


def in_use(driver: ShimDriver) -> Iterator[ShimDriver]:
    """The functions of ``kernels.cuda`` work on this device meanwhile."""
    try:
        driver.free(driver.allocate(1))
    except DeviceError as error:
        if "unexpected memory mapping" in str(error):
            pytest.skip("ThreadSanitizer does not start here: lower vm.mmap_rnd_bits to 28")
        raise
    cuda.use_driver(driver)
    yield driver
    cuda.use_driver(None)


@contextmanager
def on_shim(seed: int = 0) -> Iterator[ShimDriver]:
    """Without a sanitizer."""
    driver = ShimDriver(seed=seed)
    yield from in_use(driver)
    driver.close()


def on_both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """(what the CUDA kernels give, what the reference gives)."""
    with kernels.using("reference"):
        expected = call()
    before, choice._forced = choice._forced, cuda
    try:
        return call(), expected
    finally:
        choice._forced = before


@lru_cache
def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def frame_of(format: str, height: int, width: int) -> np.ndarray:
    channels = {"BGR8": (3,), "RGB8": (3,), "YUYV": (2,)}.get(format, ())
    return noise(height * 3 // 2 if format == "NV12" else height, width, *channels)


@pytest.mark.parametrize("format", kernels.FORMATS)
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_preprocess_equals_pillow_through_the_reference(device: ShimDriver, format: str, resize: Any) -> None:
    frame = frame_of(format, 90, 140)
    boxes = [Box(0, 0, 140, 90), Box(11, 7, 53, 41), Box(20, 10, 60, 44, 33.0), Box(70, 50, 90, 70, -120.0)]
    for dtype in (np.float32, np.float16):
        found, expected = on_both(
            lambda dtype=dtype: kernels.preprocess(
                frame, 20, resize, MEAN, STD, format=format, boxes=boxes, dtype=dtype
            )
        )
        np.testing.assert_array_equal(found, expected)


@settings(PROPERTY, max_examples=40)
@given(
    format=st.sampled_from(kernels.FORMATS),
    height=st.integers(2, 150),
    width=st.integers(2, 400),
    size=st.integers(1, 40),
    resize=st.sampled_from(["crop", "stretch"]),
)
def test_preprocess_of_any_size(
    address_device: ShimDriver, format: str, height: int, width: int, size: int, resize: Any
) -> None:
    if format in ("NV12", "YUYV"):
        height, width = height & -2, width & -2
    if format == "BayerRG8":
        height, width = max(height, 3), max(width, 3)
    frame = frame_of(format, height, width)
    found, expected = on_both(lambda: kernels.preprocess(frame, size, resize, MEAN, STD, format=format))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 2)])
def test_preprocess_enlarges(device: ShimDriver, height: int, width: int) -> None:
    found, expected = on_both(lambda: kernels.preprocess(noise(height, width, 3), 17, "stretch", MEAN, STD))
    np.testing.assert_array_equal(found, expected)


def test_preprocess_shrinks_more_than_a_strip_at_a_time(address_device: ShimDriver) -> None:
    """37 times: filters of 149 taps, wider than the 128 columns and taller than the 32 rows that a block holds."""
    found, expected = on_both(lambda: kernels.preprocess(noise(600, 1100, 3), 16, "stretch", MEAN, STD))
    np.testing.assert_array_equal(found, expected)


TOLERANCES = {np.float32: 1e-3, np.float16: 1e-3, np.int8: 1e-6}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    ("shape", "num_rows"), [((1, 1, 1, 8), 1), ((2, 3, 49, 72), 300), ((1, 2, 150, 40), 128)]
)
def test_match(device: ShimDriver, dtype: Any, shape: tuple[int, ...], num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    features = rng.normal(size=shape).astype(np.float32)
    bank = prepare_bank(rng.normal(size=(shape[1], num_rows, shape[3])).astype(np.float32), dtype)
    (distance, nearest), (expected, where) = on_both(lambda: kernels.match(features, bank, indices=True))
    np.testing.assert_allclose(distance, expected, atol=TOLERANCES[dtype])
    same = nearest == where
    assert same.all() if dtype == np.int8 else same.mean() > 0.99


def test_match_at_the_width_of_vit_h(address_device: ShimDriver) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 1, 128, 1280)).astype(np.float32)
    raw = np.concatenate([rng.normal(size=(1, 200, 1280)), features[:, 0, 60:61] * 3], axis=1).astype(
        np.float32
    )
    for dtype, tolerance in TOLERANCES.items():
        bank = prepare_bank(raw, dtype)
        (distance, nearest), (expected, where) = on_both(
            lambda bank=bank: kernels.match(features, bank, indices=True)
        )
        np.testing.assert_allclose(distance, expected, atol=tolerance)
        assert nearest[0, 0, 60] == 200
        assert abs(distance[0, 60]) < 1e-3
        assert (nearest == where).mean() > 0.95


def test_match_of_features_that_are_not_finite_zero_huge_or_tiny(device: ShimDriver) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 2, 9, 24)).astype(np.float32)
    features[0, 0, 1, 3], features[0, 1, 2, 4], features[0, 1, 3, 23] = np.nan, np.inf, -np.inf
    features[0, :, 4] = 0
    features[0, :, 5] *= 1e30
    features[0, :, 6] *= 1e-6
    for dtype, tolerance in TOLERANCES.items():
        bank = prepare_bank(rng.normal(size=(2, 40, 24)).astype(np.float32), dtype)
        (distance, nearest), (expected, where) = on_both(
            lambda bank=bank: kernels.match(features, bank, indices=True)
        )
        np.testing.assert_allclose(distance, expected, atol=tolerance)  # NaN where NaN is due
        np.testing.assert_array_equal(nearest < 0, where < 0)
        assert distance[0, 4] == 1
        assert np.isnan(distance[0, 1:4]).all()


def test_match_names_the_lowest_of_equal_rows(device: ShimDriver) -> None:
    """Equal rows in one thread's columns, in others of the warp, in other warps, in other blocks."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 700, 16)).astype(np.float32)
    queries = rows[:, [5, 5, 5]] * 2
    rows[0, [6, 13, 40, 150, 690]] = rows[0, 5]
    for dtype in TOLERANCES:
        bank = prepare_bank(rows, dtype)
        (_, nearest), _ = on_both(lambda bank=bank: kernels.match(queries[None], bank, indices=True))
        assert nearest.ravel().tolist() == [5, 5, 5]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_match_scaled(device: ShimDriver, dtype: Any) -> None:
    """Also with other gains, and with a feature that is not finite, on a stage that is there already."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 49, 24)).astype(np.float32)
    bank = prepare_bank(rng.normal(size=(3, 150, 24)).astype(np.float32), dtype)
    for spoil, largest in ((False, 1), (True, 20)):
        if spoil:
            features[1, 2, 7, 5] = np.nan
        gains = (rng.random((3, 150)) * largest).astype(np.float32)
        found, expected = on_both(lambda gains=gains: kernels.match_scaled(features, bank, gains))
        plain, _ = on_both(lambda: kernels.match(features, bank, indices=True))
        (distance, scaled, nearest), (_, values, where) = found, expected
        np.testing.assert_array_equal(distance, plain[0])
        np.testing.assert_array_equal(nearest, plain[1])
        same = (nearest == where).all(axis=1)
        assert same.mean() > 0.95
        np.testing.assert_allclose(scaled[same], values[same], atol=3 * largest * TOLERANCES[dtype])
        assert np.isnan(scaled).sum() == spoil


@pytest.mark.parametrize(
    ("batch", "count", "taps", "side", "width", "radius"),
    [(1, 1, 1, 1, 1, 0), (2, 3, 2, 5, 40, 1), (1, 2, 1, 7, 64, 3), (1, 1, 2, 3, 9, 8)],
)
def test_match_places(
    device: ShimDriver, batch: int, count: int, taps: int, side: int, width: int, radius: int
) -> None:
    rng = np.random.default_rng(0)
    reference = kernels.normalise(rng.normal(size=(count, taps, side**2, width)).astype(np.float32))
    # The second call gives another reference to the stage that is there already.
    for spoil, normals in ((False, reference), (True, reference[:, :, ::-1])):
        features = rng.normal(size=(batch, taps, side**2, width)).astype(np.float32) * 1e20
        features[0, 0, 0] = 0
        if spoil:
            features[-1, -1, -1, 0], features[-1, 0, side // 2, -1] = np.inf, np.nan
        found, expected = on_both(
            lambda features=features, normals=normals: kernels.match_places(features, normals, radius)
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.isnan(found).any() == spoil


def test_match_places_takes_float16_features(device: ShimDriver) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 2, 9, 24)).astype(np.float16)
    reference = kernels.normalise(rng.normal(size=(3, 2, 9, 24)).astype(np.float32))
    stage = stages.MatchPlaces(device, reference, features.shape, 1)
    found = stages.get(device, stage(put(device, features)))
    expected = kernels.match_places(features.astype(np.float32), reference, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_match_takes_float16_features(device: ShimDriver) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 2, 20, 24)).astype(np.float16)
    bank = prepare_bank(rng.normal(size=(2, 40, 24)).astype(np.float32), np.float16)
    stage = stages.Match(device, stages.DeviceBank.of(device, bank), features.shape)
    found = stages.get(device, stage(put(device, features)))
    np.testing.assert_allclose(found, kernels.match(features.astype(np.float32), bank), atol=1e-3)


@pytest.mark.parametrize(("shape", "size"), [((2, 4, 256, 2), 60), ((1, 1, 1, 2), 5), ((3, 2, 9, 2), 1)])
def test_localise(device: ShimDriver, shape: tuple[int, ...], size: int) -> None:
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 20
    logits[-1, -1, -1, 1] = 3e38  # the largest that is finite
    found, expected = on_both(lambda: kernels.localise(logits, size))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_map_of_a_logit_that_is_not_finite_is_nan(device: ShimDriver, value: float) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 2, 16, 2)).astype(np.float32)
    logits[1, 0, 7, 0] = value
    found, expected = on_both(lambda: kernels.localise(logits, 12))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found[1]).all()
    found, expected = on_both(lambda: kernels.upsample(logits[..., 0].reshape(4, 16), 12))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("patches", "size"), [(256, 50), (1, 3), (9, 3), (4, 1)])
def test_upsample(device: ShimDriver, patches: int, size: int) -> None:
    patch_map = np.random.default_rng(0).random((2, patches)).astype(np.float32)
    found, expected = on_both(lambda: kernels.upsample(patch_map, size))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_localise_in_half_precision(device: ShimDriver) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 4, 16, 2)).astype(np.float16)
    expected = kernels.localise(logits.astype(np.float32), 20)
    for out_dtype, tolerance in ((np.float32, 1e-5), (np.float16, 5e-4)):
        stage = stages.Localise(device, logits.shape, 20, out_dtype=out_dtype)
        found = stages.get(device, stage(put(device, logits)))
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_project(device: ShimDriver, resize: Any) -> None:
    maps = np.random.default_rng(0).random((4, 14, 14)).astype(np.float32)
    boxes = [Box(0, 0, 40, 50), Box(25, 20, 40, 30), Box(60, 10, 30, 44, 30.0), Box(90, 60, 10, 10)]
    found, expected = on_both(lambda: kernels.project(maps, boxes, resize, (70, 101), outside=-1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found == -1).any()


def test_project_of_more_tiles_than_a_block_has_threads(address_device: ShimDriver) -> None:
    boxes = kernels.tile_grid(90, 90, 10, 0.5)
    assert len(boxes) > 256
    maps = np.random.default_rng(0).random((len(boxes), 5, 5)).astype(np.float32)
    found, expected = on_both(lambda: kernels.project(maps, boxes, "stretch", (90, 90)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 9), (60, 60)])
def test_summarise(device: ShimDriver, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for values in (
        rng.normal(size=shape),
        np.round(rng.normal(size=shape)),
        np.zeros(shape),
        -rng.random(shape),
    ):
        found, expected = on_both(lambda values=values: kernels.summarise(values.astype(np.float32)))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_summary_of_values_that_are_not_finite_is_nan(device: ShimDriver, value: float) -> None:
    anomaly_map = np.random.default_rng(0).random((30, 30)).astype(np.float32)
    anomaly_map[11, 12] = value
    found, _ = on_both(lambda: kernels.summarise(anomaly_map))
    assert np.isnan(found).all()


@pytest.mark.parametrize(("shape", "cells"), [((1, 1), 3), ((2, 5), 3), ((50, 61), 3), ((40, 30), 7)])
def test_cell_peaks(device: ShimDriver, shape: tuple[int, int], cells: int) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(*on_both(lambda: kernels.cell_peaks(values, cells)))
    values[-1, -1] = np.nan
    np.testing.assert_array_equal(*on_both(lambda: kernels.cell_peaks(values, cells)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (33, 47), (64, 80)])
def test_components(device: ShimDriver, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.45, 0.6, 1.0):  # near 0.41 regions begin to span the map
        values = rng.random(shape).astype(np.float32)
        values.ravel()[:: 1 + values.size // 3] = np.nan
        found, expected = on_both(lambda: kernels.components(values, 1 - share))  # noqa: B023
        assert found == expected


def test_components_of_a_spiral_and_a_comb(device: ShimDriver) -> None:
    """Long ways to the root, and many roots that the last row joins."""
    spiral = np.zeros((41, 41), np.float32)
    row, column, step, length = 0, 0, (0, 1), 40
    spiral[0, 0] = 1
    while length > 0:
        for _ in range(2 if length < 40 else 3):
            for _ in range(length):
                row, column = row + step[0], column + step[1]
                spiral[row, column] = 1
            step = step[1], -step[0]
        length -= 2
    comb = np.zeros((30, 61), np.float32)
    comb[:, ::2] = 1
    comb[-1] = 1
    for values in (spiral, comb, spiral[::-1].copy(), comb[::-1].copy(), comb.T.copy()):
        found, expected = on_both(lambda values=values: kernels.components(values, 0.5))
        assert found == expected
        assert len(found) == 1


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 40, 24), 12), ((1, 1, 5), 1), ((1, 300, 70), 4), ((1, 6, 3), 6)]
)
def test_coreset(device: ShimDriver, shape: tuple[int, ...], size: int) -> None:
    rows = kernels.normalise(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    np.testing.assert_array_equal(*on_both(lambda: kernels.coreset(rows, size)))


def test_a_coreset_of_equal_rows_takes_each_once(device: ShimDriver) -> None:
    found, expected = on_both(lambda: kernels.coreset(np.ones((1, 5, 4), np.float32), 5))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("type", list(BLOCKS))
def test_pack_prompt(device: ShimDriver, type: str) -> None:
    rng = np.random.default_rng(0)
    values, block_bytes = BLOCKS[type]
    table = rng.integers(0, 256, (20, 3 * block_bytes if values > 1 else 100 * block_bytes), dtype=np.uint8)
    width = table.shape[1] // block_bytes * values
    injected = rng.normal(size=(2, width)).astype(np.float32)
    with np.errstate(all="ignore"):
        found, expected = on_both(
            lambda: kernels.pack_prompt(table, type, np.array([3, -1, 7, 7, -1, 19]), injected)
        )
    np.testing.assert_array_equal(found, expected)  # bit for bit but for NaN's payload


@settings(PROPERTY)
@given(
    batch=st.integers(1, 2), taps=st.integers(1, 2), patches=st.integers(1, 40), width=st.integers(1, 80),
    num_rows=st.integers(1, 260), dtype=st.sampled_from(list(TOLERANCES)),
)  # fmt: skip
def test_match_of_any_shape(
    address_device: ShimDriver, batch: int, taps: int, patches: int, width: int, num_rows: int, dtype: Any
) -> None:
    rng = np.random.default_rng(patches)
    features = rng.normal(size=(batch, taps, patches, width)).astype(np.float32)
    bank = prepare_bank(rng.normal(size=(taps, num_rows, width)).astype(np.float32), dtype)
    found, expected = on_both(lambda: kernels.match(features, bank))
    np.testing.assert_allclose(found, expected, atol=TOLERANCES[dtype])


def test_results_do_not_depend_on_the_order_of_threads_and_blocks() -> None:
    rng = np.random.default_rng(0)
    frame, anomaly_map = noise(60, 80, 3), rng.random((60, 70)).astype(np.float32)
    features = rng.normal(size=(1, 2, 130, 40)).astype(np.float32)
    bank = prepare_bank(rng.normal(size=(2, 600, 40)).astype(np.float32), np.float16)
    results = []
    for seed in (0, 1, 2):
        with on_shim(seed):
            calls: list[Callable[[], Any]] = [
                lambda: kernels.preprocess(frame, 30, "crop", MEAN, STD),
                lambda: kernels.match(features, bank, indices=True),
                lambda: kernels.summarise(anomaly_map),
            ]
            bank._packed.pop(cuda.name, None)
            results.append([on_both(call)[0] for call in calls])
    (pixels, (distance, nearest), figures), *others = results
    for other_pixels, (other_distance, other_nearest), other_figures in others:
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(distance, other_distance)
        np.testing.assert_array_equal(nearest, other_nearest)
        assert figures == other_figures


@pytest.mark.slow
def test_a_frame_of_8k_with_regions() -> None:
    boxes = [Box(0, 0, 7680, 4320), Box(5000, 2000, 1024, 1024), Box(3000, 1000, 900, 700, 17.0)]
    with on_shim():
        found, expected = on_both(
            lambda: kernels.preprocess(noise(4320, 7680, 3), 224, "stretch", MEAN, STD, boxes=boxes)
        )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_whole_camera_frame_and_bank() -> None:
    with on_shim():
        found, expected = on_both(lambda: kernels.preprocess(noise(1080, 1920, 3), 224, "crop", MEAN, STD))
        np.testing.assert_array_equal(found, expected)
        rng = np.random.default_rng(0)
        features = rng.normal(size=(1, 4, 256, 1280)).astype(np.float32)
        raw = rng.normal(size=(4, 1024, 1280)).astype(np.float32)
        for dtype, tolerance in TOLERANCES.items():
            bank = prepare_bank(raw, dtype)
            found, expected = on_both(lambda bank=bank: kernels.match(features, bank))
            np.testing.assert_allclose(found, expected, atol=tolerance)

"""Every compiled level against the reference, on whatever hypothesis thinks of; and how one is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge import kernels
from anomalygpt_edge.kernels import Box, choice, cuda
from anomalygpt_edge.kernels.implementation import Implementation

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 700))


def pairs(compiled: str, operation: Any) -> tuple[Any, Any]:
    """What a compiled level and the reference give."""
    with kernels.using(compiled):
        actual = operation()
    with kernels.using("reference"):
        return actual, operation()


def random_frame(format: str, height: int, width: int, seed: int, odd: int) -> np.ndarray:
    """A frame of any bytes with strides that are odd in one of several ways."""
    rng = np.random.default_rng(seed)
    if format in ("NV12", "YUYV"):
        width += width % 2
    if format == "NV12":
        height = (height + height % 2) * 3 // 2
    if format == "BayerRG8":
        height, width = max(height, 3), max(width, 3)
    channels = {"BGR8": (3,), "RGB8": (3,), "YUYV": (2,)}.get(format, ())
    if odd == 1:  # rows with something between them, starting at an odd address
        return rng.integers(0, 256, (height, width + 5, *channels), dtype=np.uint8)[:, 1 : 1 + width]
    if odd == 2:  # every second row and column, from the end
        return rng.integers(0, 256, (2 * height, 2 * width, *channels), dtype=np.uint8)[::-2, ::-2]
    if odd == 3:  # planes
        return (
            np.moveaxis(
                rng.integers(0, 256, (*channels, height, width), dtype=np.uint8), range(len(channels)), -1
            )
            if len(channels) == 1
            else rng.integers(0, 256, (width, height), dtype=np.uint8).T
        )
    return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)


@settings(max_examples=120, deadline=None)
@given(
    format=st.sampled_from(kernels.FORMATS),
    height=SIDES,
    width=SIDES,
    size=st.sampled_from([1, 5, 28, 56, 224]),
    resize=st.sampled_from(["crop", "stretch"]),
    odd=st.integers(0, 3),
    threads=st.integers(1, 3),
    seed=SEEDS,
)
def test_preprocess(
    compiled: str,
    format: Any,
    height: int,
    width: int,
    size: int,
    resize: Any,
    odd: int,
    threads: int,
    seed: int,
) -> None:
    frame = random_frame(format, height, width, seed, odd)
    height, width = kernels.frame_size(frame, format)
    rng = np.random.default_rng(seed)
    boxes = [Box(0, 0, width, height)]
    for _ in range(rng.integers(0, 4)):
        w, h = rng.integers(1, width + 1), rng.integers(1, height + 1)
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        boxes.append(
            Box(int(x), int(y), int(w), int(h), float(rng.choice([0, 0, 90, rng.uniform(-360, 360)])))
        )
    actual, expected = pairs(
        compiled,
        lambda: kernels.preprocess(
            frame, size, resize, MEAN, STD, format=format, boxes=boxes, threads=threads
        ),
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("height", "width", "resize"),
    [(4320, 7680, "crop"), (1, 8192, "stretch"), (8192, 1, "stretch"), (3000, 17, "crop")],
)
def test_preprocess_of_large_frames(height: int, width: int, resize: Any) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with kernels.using("reference"):
        expected = kernels.preprocess(frame, 224, resize, MEAN, STD)
    for name in kernels.available():
        with kernels.using(name):
            actual = kernels.preprocess(frame, 224, resize, MEAN, STD, threads=2)
        np.testing.assert_array_equal(actual, expected, err_msg=name)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    taps=st.integers(1, 4),
    patches=st.integers(1, 70),
    rows=st.one_of(st.integers(1, 70), st.integers(1, 400)),
    width=st.integers(1, 140),
    dtype=st.sampled_from([np.float32, np.float16, np.int8]),
    threads=st.integers(1, 3),
    spoilt=st.floats(0, 0.2),
    seed=SEEDS,
)
def test_match(
    compiled: str, batch: int, taps: int, patches: int, rows: int, width: int, dtype: Any, threads: int,
    spoilt: float, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    memory = np.empty(batch * taps * patches * width * 4 + 1, np.uint8)[1:]  # not where a float may start
    features = memory.view(np.float32).reshape(batch, taps, patches, width)
    features[...] = rng.normal(size=features.shape) * 10.0 ** rng.integers(-6, 6, (batch, taps, patches, 1))
    bad = rng.random(features.shape[:3]) < spoilt
    features[..., rng.integers(width)][bad] = rng.choice([np.nan, np.inf, -np.inf, 0], bad.sum())
    bank = kernels.prepare_bank(rng.normal(size=(taps, rows, width)).astype(np.float32), dtype)
    (distance, nearest), (expected, expected_nearest) = pairs(
        compiled, lambda: kernels.match(features, bank, indices=True, threads=threads)
    )
    np.testing.assert_allclose(distance, expected, atol=4e-6)
    np.testing.assert_array_equal(nearest == -1, expected_nearest == -1)
    differ = nearest != expected_nearest  # only among equals
    if differ.any():
        image, tap, patch = (places[0] for places in np.nonzero(differ))
        query = features[image, tap, patch] / np.linalg.norm(features[image, tap, patch].astype(np.float64))
        two = bank.to_float()[tap, [nearest[image, tap, patch], expected_nearest[image, tap, patch]]] @ query
        assert abs(two[0] - two[1]) < (0.05 if dtype == np.int8 else 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    taps=st.integers(1, 4),
    patches=st.integers(1, 60),
    rows=st.integers(1, 90),
    width=st.integers(1, 70),
    dtype=st.sampled_from([np.float32, np.float16, np.int8]),
    threads=st.integers(1, 3),
    spoilt=st.floats(0, 0.2),
    seed=SEEDS,
)
def test_match_scaled(
    compiled: str, batch: int, taps: int, patches: int, rows: int, width: int, dtype: Any, threads: int,
    spoilt: float, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(batch, taps, patches, width)).astype(np.float32)
    bad = rng.random(features.shape[:3]) < spoilt
    features[..., rng.integers(width)][bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
    bank = kernels.prepare_bank(rng.normal(size=(taps, rows, width)).astype(np.float32), dtype)
    gains = (rng.random((rows, taps), np.float32) * 30).T  # with strides
    (distance, scaled, nearest), (_, expected, expected_nearest) = pairs(
        compiled, lambda: kernels.match_scaled(features, bank, gains, threads=threads)
    )
    with kernels.using(compiled):
        plain, plain_nearest = kernels.match(features, bank, indices=True)
        again = kernels.match_scaled(features, bank, gains, threads=1)
    np.testing.assert_array_equal(distance, plain)
    np.testing.assert_array_equal(nearest, plain_nearest)
    for one, other in zip((distance, scaled, nearest), again, strict=True):
        np.testing.assert_array_equal(one, other)
    same = (nearest == expected_nearest).all(axis=1)  # others have several nearest rows, with other gains
    np.testing.assert_allclose(scaled[same], expected[same], atol=30 * taps * 4e-6)
    np.testing.assert_array_equal(np.isnan(scaled), (nearest < 0).any(axis=1))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 4),
    taps=st.integers(1, 3),
    side=st.integers(1, 20),
    width=st.integers(1, 70),
    radius=st.integers(0, 12),
    threads=st.integers(1, 3),
    spoilt=st.sampled_from([0, 0, 0.03]),
    seed=SEEDS,
)
def test_match_places(
    compiled: str, batch: int, count: int, taps: int, side: int, width: int, radius: int, threads: int,
    spoilt: float, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(batch, taps, side**2, width)).astype(np.float32)
    features *= (10.0 ** rng.integers(-6, 6, (batch, taps, side**2, 1))).astype(np.float32)
    bad = rng.random(features.shape[:3]) < spoilt
    features[..., rng.integers(width)][bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
    reference = kernels.normalise(rng.normal(size=(count, taps, side**2, width)).astype(np.float32))
    actual, expected = pairs(
        compiled, lambda: kernels.match_places(features, reference, radius, threads=threads)
    )
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    with kernels.using(compiled):
        np.testing.assert_array_equal(actual, kernels.match_places(features, reference, radius))


def test_match_with_a_huge_bank(compiled: str) -> None:
    rng = np.random.default_rng(0)
    bank = kernels.prepare_bank(rng.normal(size=(1, 100_000, 16)).astype(np.float32), np.int8)
    features = rng.normal(size=(1, 1, 20, 16)).astype(np.float32)
    actual, expected = pairs(compiled, lambda: kernels.match(features, bank, threads=2))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    taps=st.integers(1, 4),
    grid=st.integers(1, 17),
    size=st.one_of(st.integers(1, 40), st.just(224), st.just(500)),
    scale=st.sampled_from([1e-3, 1.0, 100.0, 1e6]),
    threads=st.integers(1, 3),
    spoilt=st.booleans(),
    seed=SEEDS,
)
def test_maps(
    compiled: str,
    batch: int,
    taps: int,
    grid: int,
    size: int,
    scale: float,
    threads: int,
    spoilt: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(batch, taps, grid * grid, 2)) * scale).astype(np.float32)
    if spoilt:
        logits.ravel()[rng.integers(logits.size)] = rng.choice([np.nan, np.inf, -np.inf])
    actual, expected = pairs(compiled, lambda: kernels.localise(logits, size, threads=threads))
    # Where both weights round differently, a steep logit moves the map: in proportion to float32's steps of it.
    np.testing.assert_allclose(actual, expected, atol=3e-6 + 1e-6 * min(scale, 1e3) if scale < 1e5 else 1)
    patch_map = np.ascontiguousarray(logits[:, 0, :, 0])
    actual, expected = pairs(compiled, lambda: kernels.upsample(patch_map, size, threads=threads))
    np.testing.assert_allclose(actual, expected, atol=2e-6 * scale)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    side=st.sampled_from([1, 2, 7, 56]),
    count=st.integers(1, 5),
    resize=st.sampled_from(["crop", "stretch"]),
    threads=st.integers(1, 3),
    seed=SEEDS,
)
def test_project(
    compiled: str, height: int, width: int, side: int, count: int, resize: Any, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        w, h = rng.integers(1, width + 1), rng.integers(1, height + 1)
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        boxes.append(Box(int(x), int(y), int(w), int(h), float(rng.choice([0, 90, rng.uniform(-360, 360)]))))
    maps = rng.random((count, side, side)).astype(np.float32)
    actual, expected = pairs(
        compiled,
        lambda: kernels.project(maps, boxes, resize, (height, width), outside=-1, threads=threads),
    )
    np.testing.assert_allclose(actual, expected, atol=1e-4)


# -- choice ----------------------------------------------------------------------------------------


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


SHOW = "from anomalygpt_edge import kernels; print(kernels.active())"


def test_the_environment_forces_one() -> None:
    for name in kernels.available():
        assert run(SHOW, AGPT_KERNELS=name).stdout.strip() == name


def test_every_implementation_offers_every_operation() -> None:
    operations = {name for name in vars(Implementation) if not name.startswith("_")}
    assert operations >= {
        "preprocess",
        "match",
        "coreset",
        "localise",
        "components",
        "cell_peaks",
        "pack_prompt",
    }
    for each in (*choice._found().values(), cuda):
        assert not operations - set(dir(each)), each.name


def test_an_unknown_one_is_ignored_and_said_once() -> None:
    ran = run(f"{SHOW}; kernels.active()", AGPT_KERNELS="sse9")
    assert ran.stdout.strip() == kernels.available()[0]
    assert ran.stderr.count("'sse9' do not run here") == 1


def test_without_the_extension_numpy_does_the_work_and_it_is_said_once() -> None:
    ran = run(
        f"import sys; sys.modules['anomalygpt_edge.kernels.cpu._native'] = None; {SHOW}; kernels.available()"
    )
    assert ran.stdout.strip() == "reference", ran.stderr
    assert ran.stderr.count("the compiled kernels are not installed") == 1


def test_using_puts_back_what_was_before() -> None:
    before = kernels.active()
    with kernels.using("reference"):
        assert kernels.active() == "reference"
    assert kernels.active() == before
    with pytest.raises(ValueError, match="do not run here"), kernels.using("cpu-none"):
        pass


def test_several_threads_may_call_at_once(compiled: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    results: list[np.ndarray] = []

    def work() -> None:
        for _ in range(20):
            results.append(kernels.preprocess(frame, 56, "crop", MEAN, STD, threads=3))

    with kernels.using(compiled):
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(results) == 80
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_forked_child_can_work() -> None:
    code = """
import os, numpy as np
from anomalygpt_edge import kernels
frame = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
work = lambda: kernels.preprocess(frame, 56, "crop", (0, 0, 0), (1, 1, 1), threads=2)
expected = work()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(work(), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    ran = run(code)
    assert ran.stdout.strip() == "same", ran.stderr


def test_it_is_the_sanitized_extension_that_is_tested() -> None:
    """``make test-sanitize`` would pass all the same if it tested the ordinary build."""
    from anomalygpt_edge.kernels import cpu

    folder = os.environ.get("AGPT_SANITIZED")
    assert folder is None or str(Path(folder).resolve()) in str(Path(cpu._native.__file__).resolve())

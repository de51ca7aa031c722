"""The shim itself: correct kernels pass, and each planted mistake is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tools.cuda_shim import DeviceError, ShimDriver

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the shim is compiled with g++: install it"
)
FAULTY = (Path(__file__).parent / "faulty.cu",)
THREADS = 64


@contextmanager
def device(sanitizer: str, seed: int = 0) -> Iterator[ShimDriver]:
    driver = ShimDriver(sanitizer, seed, FAULTY)
    yield driver
    driver.close()


def run(driver: ShimDriver, kernel: str, blocks: int = 1) -> np.ndarray:
    """The kernel's output for inputs 0, 1, 2, …; buffers are just as long as there are threads."""
    values = np.arange(THREADS, dtype=np.int32)
    source, target = driver.allocate(values.nbytes), driver.allocate(values.nbytes)
    driver.upload(source, values)
    driver.upload(target, np.zeros_like(values))
    driver.launch((kernel, "PP"), (blocks, 1, 1), (THREADS, 1, 1), source, target)
    result = np.empty_like(values)
    driver.download(result, target)
    return result


@pytest.mark.parametrize("sanitizer", ["none", "ucontext", "address", "thread"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_correct_kernel_passes_in_every_order(sanitizer: str, seed: int) -> None:
    with device(sanitizer, seed) as driver:
        assert run(driver, "reverse", blocks=3).tolist() == list(range(THREADS))[::-1]


@pytest.mark.parametrize(
    ("sanitizer", "kernel", "report"),
    [
        ("address", "write_past_the_end", "heap-buffer-overflow"),
        ("address", "read_before_the_start", "heap-buffer-overflow"),
        ("address", "shared_past_the_end", "index 64 out of bounds"),
        ("address", "shared_past_the_end_by_pointer", "insufficient space|global-buffer-overflow"),
        ("address", "shift_too_far", "shift exponent"),
        ("thread", "missing_barrier", "data race"),
        ("thread", "shuffle_is_no_barrier", "data race"),
        ("thread", "blocks_share_a_sum", "data race"),
        ("none", "copy_not_aligned", "is not aligned to 16 bytes"),
        (
            "none",
            "barrier_for_some",
            "40 threads wait at a barrier, 0 for other lanes of their warp, 24 have returned",
        ),
        ("none", "shuffle_for_some", "32 for other lanes of their warp"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mistake_is_named(sanitizer: str, kernel: str, report: str, seed: int) -> None:
    with device(sanitizer, seed) as driver, pytest.raises(DeviceError, match=report) as error:
        run(driver, kernel)
    if sanitizer == "address" or sanitizer == "thread":
        assert f"{FAULTY[0].name}:" in str(error.value), "the report names the line"


def test_a_missing_barrier_shows_in_the_order_of_threads() -> None:
    results = []
    for seed in (0, 1):
        with device("none", seed) as driver:
            results.append(run(driver, "missing_barrier").tolist())
    assert results[0] != results[1]


@pytest.mark.parametrize("kernel", ["copy_not_waited_for", "shared_never_written"])
def test_shared_memory_holds_nothing_by_chance(kernel: str) -> None:
    with device("none") as driver:
        run(driver, "reverse")
        result = run(driver, kernel)
    assert set(result.tolist()) == ({-1} if kernel == "copy_not_waited_for" else {0})


def test_a_launch_with_wrong_arguments_is_refused() -> None:
    with device("none") as driver:
        with pytest.raises(DeviceError, match="takes 2 arguments"):
            driver.launch(("reverse", "P"), (1, 1, 1), (1, 1, 1), 0)
        with pytest.raises(DeviceError, match="argument 1 has another size"):
            driver.launch(("reverse", "Pi"), (1, 1, 1), (1, 1, 1), 0, 0)
        with pytest.raises(DeviceError, match="no kernel"):
            driver.launch(("forward", "PP"), (1, 1, 1), (1, 1, 1), 0, 0)
        assert run(driver, "reverse")[0] == THREADS - 1, "the device goes on after a refusal"


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 5.9e-8, 2e-8, 6.1e-5, -2.7, np.inf, np.nan]
)
def test_half_precision_is_numpys(value: float) -> None:
    """Through a real kernel: unit_rows' storing of float16."""
    with np.errstate(over="ignore"):
        expected = np.float32(value).astype(np.float16)
    driver = ShimDriver()
    logits = np.array([[value]], np.float32)
    source, target = driver.allocate(4), driver.allocate(2)
    driver.upload(source, logits)
    driver.launch(("upsample_f32_f16", "PPiii"), (1, 1, 1), (256, 1, 1), source, target, 1, 1, 1)
    result = np.empty(1, np.float16)
    driver.download(result, target)
    driver.close()
    if np.isfinite(value):
        assert result[0] == expected
        assert np.signbit(result[0]) == np.signbit(expected) or value == 0
    else:
        assert np.isnan(result[0]), "a map of values that are not finite is NaN"

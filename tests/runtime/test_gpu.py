"""Calls of the NVIDIA driver and the use of their results; the driver is a fake."""

from __future__ import annotations

import ctypes

import pytest

from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.vision.engines import gpu
from anomalygpt_edge.runtime.vision.engines.gpu import Gpu, Graph, find_gpu, query_gpu


@pytest.fixture(autouse=True)
def forget():
    find_gpu.cache_clear()
    yield
    find_gpu.cache_clear()


@pytest.fixture
def machine(fakes):
    """Driver and pycuda of one device whose context is current."""
    driver, cuda = fakes.FakeDriver(), fakes.FakeCuda()
    driver.cuda, cuda.depth = cuda, 1
    return driver, cuda


def test_the_first_gpu_is_described(fakes) -> None:
    assert query_gpu(fakes.FakeDriver()) == Gpu("Orin", "8.7", integrated=True)
    assert query_gpu(fakes.FakeDriver(num_devices=0)) is None


@pytest.mark.parametrize(
    "function", ["cuInit", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetAttribute"]
)
def test_with_a_failing_driver_there_is_no_gpu(fakes, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    driver = fakes.FakeDriver()
    driver.fail = function
    with pytest.raises(ConfigError, match=f"error 800 in {function}: run nvidia-smi"):
        query_gpu(driver)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu() is None


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIBRARY", "libno-such-driver.so")
    assert find_gpu() is None


def test_a_graph_repeats_the_captured_work(machine) -> None:
    driver, cuda = machine
    stream, done = cuda.Stream(), []
    graph = Graph(driver)
    with graph.capture(stream.handle):
        stream.enqueue(lambda: done.append("a"))
        stream.enqueue(lambda: done.append("b"))
    stream.synchronize()
    assert done == []  # captured, not run
    for _ in range(2):
        graph.launch(stream.handle)
    stream.synchronize()
    assert done == ["a", "b", "a", "b"]
    graph.close()
    graph.close()
    assert driver.calls.count("cuGraphExecDestroy") == 1
    assert driver.calls.count("cuGraphDestroy") == 1


def test_a_failed_capture_leaves_the_stream_usable(machine) -> None:
    driver, cuda = machine
    stream = cuda.Stream()
    with pytest.raises(RuntimeError, match="inside"), Graph(driver).capture(stream.handle):
        raise RuntimeError("inside")
    stream.synchronize()
    driver.fail = "cuGraphInstantiateWithFlags"
    with (
        pytest.raises(ConfigError, match="cuGraphInstantiateWithFlags"),
        Graph(driver).capture(stream.handle),
    ):
        stream.enqueue(lambda: None)
    assert driver.calls[-1] == "cuGraphDestroy"

"""Direct calls of the NVIDIA driver: finding the GPU without pycuda, and CUDA graphs, which pycuda does not wrap.

Source: CUDA driver API (cuInit, cuDeviceGet*, cuStreamBeginCapture, cuGraphInstantiateWithFlags, cuGraphLaunch).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from ...common.errors import ConfigError

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR, INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_…
CAPTURE_THREAD_LOCAL = 1  # other threads (llama.cpp's) may allocate memory during a capture
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """Properties of the first GPU."""

    name: str  # "Orin", "NVIDIA GeForce RTX 4090"
    compute_capability: str  # "8.7"
    integrated: bool  # whether it shares the CPU's memory, as on Jetson


@functools.cache
def find_gpu() -> Gpu | None:
    """The first GPU that the NVIDIA driver offers to this process; None if there is none."""
    try:
        return query_gpu(ctypes.CDLL(LIBRARY))
    except (OSError, ConfigError):
        return None  # no driver, or no GPU that this process may use


def missing_driver() -> str:
    """The message of every engine that needs a GPU."""
    return "there is no NVIDIA GPU that this process can use: install its driver (nvidia-smi must show it)"


def query_gpu(driver: Any) -> Gpu | None:
    """Properties of the first device of a loaded driver library; None if it has no device.

    Raises:
        ConfigError: the driver reports an error.
    """
    count, device = c_int(), c_int()
    call(driver, "cuInit", c_uint(0))
    call(driver, "cuDeviceGetCount", byref(count))
    if count.value == 0:
        return None
    call(driver, "cuDeviceGet", byref(device), c_int(0))
    name = (c_char * NAME_BYTES)()
    call(driver, "cuDeviceGetName", name, c_int(NAME_BYTES), device)

    def attribute(number: int) -> int:
        value = c_int()
        call(driver, "cuDeviceGetAttribute", byref(value), c_int(number), device)
        return value.value

    capability = f"{attribute(CAPABILITY_MAJOR)}.{attribute(CAPABILITY_MINOR)}"
    return Gpu(name.value.decode(errors="replace"), capability, bool(attribute(INTEGRATED)))


class Graph:
    """A CUDA graph: work that is captured from a stream once and then launched as a whole."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver or ctypes.CDLL(LIBRARY)
        self._executable = c_void_p()

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Within this context, capture work that is enqueued on ``stream`` (a handle) instead of running it.

        Raises:
            ConfigError: something cannot be captured; the stream remains usable.
        """
        graph = c_void_p()
        call(self._driver, "cuStreamBeginCapture_v2", c_void_p(stream), c_int(CAPTURE_THREAD_LOCAL))
        try:
            yield
        finally:
            call(self._driver, "cuStreamEndCapture", c_void_p(stream), byref(graph))
        try:
            call(self._driver, "cuGraphInstantiateWithFlags", byref(self._executable), graph, c_ulonglong(0))
        finally:
            call(self._driver, "cuGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Enqueue the captured work."""
        call(self._driver, "cuGraphLaunch", self._executable, c_void_p(stream))

    def close(self) -> None:
        if self._executable:
            call(self._driver, "cuGraphExecDestroy", self._executable)
            self._executable = c_void_p()


def call(driver: Any, function: str, *arguments: object) -> None:
    """Call a driver function.

    Raises:
        ConfigError: the function reports an error.
    """
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise ConfigError(
            f"the NVIDIA driver reports error {status} in {function}: run nvidia-smi, then try again"
        )

"""The device for the stages: memory, kernels, one stream. Everything that needs pycuda is in this file."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from . import compiler

Dims = tuple[int, int, int]


class Driver(Protocol):
    """One device and one stream; everything is done in the order of the calls.

    ``launch`` neither allocates nor waits, so that a captured stream takes it; the rest is for setting up and for
    host arrays.
    """

    @property
    def num_multiprocessors(self) -> int: ...

    def kernel(self, file: str, name: str, arguments: str) -> Any:
        """``name`` of ``file``.cu; ``arguments``: a ``struct`` format character for each parameter.

        Raises:
            RuntimeError: the file's kernels do not load here.
        """

    def launch(self, kernel: Any, grid: Dims, block: Dims, *arguments: Any) -> None: ...

    def allocate(self, nbytes: int) -> int:
        """Address of device memory, aligned to 256 bytes."""

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """From a C-contiguous host array, which may change as soon as this returns."""

    def download(self, array: np.ndarray, address: int) -> None:
        """To a C-contiguous host array; waits for it."""


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Where an array lies in memory that the device reaches: its own, or the host's mapped or managed memory.

    Attributes:
        strides: in bytes; None = C-contiguous.
        owner: whatever must live as long as the memory is used.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None
    owner: Any = None

    @classmethod
    def of(cls, array: Any) -> DeviceArray:
        """A ``DeviceArray``, or any object with ``__cuda_array_interface__`` (pycuda, cupy, torch, …).

        Raises:
            ValueError: the object is neither: host arrays go to the functions of ``kernels``.
        """
        if isinstance(array, DeviceArray):
            return array
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise ValueError(
                f"{type(array).__name__} is no device array: copy it with put(), or call the function of "
                "kernels, which takes host arrays"
            )
        strides = interface.get("strides")
        dtype = np.dtype(interface["typestr"])
        return cls(interface["data"][0], tuple(interface["shape"]), dtype, strides and tuple(strides), array)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "strides": self.strides,
            "version": 2,
        }  # fmt: skip

    @property
    def c_contiguous(self) -> bool:
        if self.strides is None:
            return True
        expected = self.dtype.itemsize
        for side, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if side > 1 and stride != expected:
                return False
            expected *= side
        return True


def empty(driver: Driver, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """New device memory, freed with the array."""
    dtype = np.dtype(dtype)
    address = driver.allocate(max(1, math.prod(shape) * dtype.itemsize))
    array = DeviceArray(address, tuple(shape), dtype)
    weakref.finalize(array, driver.free, address)
    return array


def put(driver: Driver, array: np.ndarray) -> DeviceArray:
    """A copy of a host array on the device."""
    array = np.ascontiguousarray(array)
    copy = empty(driver, array.shape, array.dtype)
    driver.upload(copy.address, array)
    return copy


def get(driver: Driver, array: DeviceArray) -> np.ndarray:
    """A copy of a device array on the host, once everything before it is done."""
    copy = np.empty(array.shape, array.dtype)
    driver.download(copy, array.address)
    return copy


class PycudaDriver:
    """An NVIDIA GPU through pycuda, in its primary context, which TensorRT and onnxruntime use, too.

    Attributes:
        cuda: ``pycuda.driver``.
        stream: everything is enqueued on it.

    Args:
        index: which device.
        stream: a ``pycuda.driver.Stream``, such as the engines'; a new one when None.

    Raises:
        RuntimeError: pycuda is not installed, or there is no such device.
    """

    def __init__(self, index: int = 0, stream: Any = None) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise RuntimeError(
                f"pycuda does not load ({error}): pip install 'anomalygpt-edge[cuda]'"
            ) from error
        try:
            cuda.init()
            self._context = cuda.Device(index).retain_primary_context()
        except cuda.Error as error:
            raise RuntimeError(f"no CUDA device {index}: {error}") from error
        self.cuda = cuda
        self._modules: dict[str, Any] = {}
        with self.current():
            self.stream = stream or cuda.Stream()

    @cached_property
    def num_multiprocessors(self) -> int:
        return self.attribute("MULTIPROCESSOR_COUNT")

    @cached_property
    def compute_capability(self) -> tuple[int, int]:
        return self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")

    def kernel(self, file: str, name: str, arguments: str) -> Any:
        with self.current():
            if file not in self._modules:
                self._modules[file] = self._load(file)
            function = self._modules[file].get_function(name)
            function.prepare(arguments)
        return function

    def launch(self, kernel: Any, grid: Dims, block: Dims, *arguments: Any) -> None:
        with self.current():
            kernel.prepared_async_call(grid, block, self.stream, *arguments)

    def allocate(self, nbytes: int) -> int:
        with self.current():
            memory = self.cuda.mem_alloc(nbytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        with self.current():
            self._memory.pop(address).free()

    def upload(self, address: int, array: np.ndarray) -> None:
        with self.current():
            self.cuda.memcpy_htod_async(address, array, self.stream)
            self.stream.synchronize()  # pinned memory would be read later

    def download(self, array: np.ndarray, address: int) -> None:
        with self.current():
            self.cuda.memcpy_dtoh_async(array, address, self.stream)
            self.stream.synchronize()

    @cached_property
    def _memory(self) -> dict[int, Any]:
        return {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current in this thread, which every call of pycuda needs."""
        self._context.push()
        try:
            yield
        finally:
            self.cuda.Context.pop()

    def map_host(self, array: np.ndarray) -> DeviceArray:
        """Map a host array, such as a camera's buffer, into the device's addresses: it is read in place, not copied.

        The array's memory is page-locked as long as the result lives (on a Jetson the two share one memory).

        Raises:
            ValueError: the array has gaps: map all of it, and make a ``DeviceArray`` of the part.
            RuntimeError: the driver cannot map this memory.
        """
        if not array.flags.c_contiguous:
            raise ValueError("map the whole buffer: this array has gaps, so it is a part of one")
        try:
            with self.current():
                flags = self.cuda.mem_host_register_flags.DEVICEMAP
                mapped = self.cuda.register_host_memory(array, flags)
                address = int(mapped.base.get_device_pointer())
        except self.cuda.Error as error:
            raise RuntimeError(
                f"the device cannot map this host memory ({error}): copy it with put()"
            ) from error
        return DeviceArray(address, array.shape, array.dtype, None, mapped)

    def attribute(self, name: str) -> int:
        """A ``pycuda.driver.device_attribute`` by name."""
        with self.current():
            return self._context.get_device().get_attribute(getattr(self.cuda.device_attribute, name))

    def _load(self, file: str) -> Any:
        """Load the binary that came with the package or, if it does not fit driver or device, one compiled here."""
        shipped = compiler.shipped_binary(file)
        if shipped.is_file():
            try:
                return self.cuda.module_from_buffer(shipped.read_bytes())
            except self.cuda.Error:
                pass  # built by a newer CUDA than the driver's, or for other devices
        major, minor = self.compute_capability
        compiled = compiler.compile_for_device(file, f"{major}{minor}")
        try:
            return self.cuda.module_from_buffer(compiled)
        except self.cuda.Error as error:
            raise RuntimeError(
                f"{file}.cu, compiled here, does not load ({error}): install the CUDA toolkit of the driver's version"
            ) from error


@lru_cache(maxsize=1)
def open_device() -> PycudaDriver:
    """The first GPU, with a stream of its own, shared by all callers.

    Raises:
        RuntimeError: see ``PycudaDriver``.
    """
    return PycudaDriver()

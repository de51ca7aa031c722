"""Device memory, pinned host memory, streams and events of the first GPU, with pycuda."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from ...common.errors import ConfigError
from ...common.install import how_to_install


class Device:
    """The first GPU's primary context, which onnxruntime, TensorRT and llama.cpp also use."""

    def __init__(self, cuda: Any) -> None:
        """
        Args:
            cuda: ``pycuda.driver``.
        """
        self.cuda = cuda
        cuda.init()
        self._context = cuda.Device(0).retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread, as streams, events and buffers require."""
        self._context.push()
        try:
            yield
        finally:
            self.cuda.Context.pop()

    def stream(self) -> Any:
        return self.cuda.Stream()

    def event(self) -> Any:
        return self.cuda.Event()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(self.cuda, shape, dtype)


class Buffer:
    """Memory for a tensor on the device and in pinned host memory, allocated once.

    Attributes:
        host: the array in pinned host memory.
        address: the address on the device.
    """

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: str) -> None:
        self._cuda = cuda
        self.host: np.ndarray = cuda.pagelocked_empty(shape, np.dtype(dtype))
        self._memory: Any = cuda.mem_alloc(self.host.nbytes)
        self.address = int(self._memory)

    def upload(self, array: np.ndarray, stream: Any) -> None:
        """Enqueue a copy of an array, at most as large as the buffer, to the device."""
        pinned = self._part(array.shape)
        pinned[...] = array
        self._cuda.memcpy_htod_async(self.address, pinned, stream)

    def download(self, shape: tuple[int, ...], stream: Any) -> np.ndarray:
        """Enqueue a copy to the host. The array is valid after the stream was synchronised, until the next copy."""
        pinned = self._part(shape)
        self._cuda.memcpy_dtoh_async(pinned, self.address, stream)
        return pinned

    def free(self) -> None:
        """Free the device memory; may be called twice, because two engines may share a buffer."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _part(self, shape: tuple[int, ...]) -> np.ndarray:
        """The first elements of the pinned array as an array of ``shape``."""
        count = int(np.prod(shape, dtype=np.int64))
        return self.host.reshape(-1)[:count].reshape(shape)


@functools.cache
def open_device() -> Device:
    """The first GPU.

    Raises:
        ConfigError: pycuda is not installed, or the driver reports an error.
    """
    try:
        cuda = import_module("pycuda.driver")
        return Device(cuda)
    except ImportError as error:
        raise ConfigError(f"pycuda does not load ({error}): {how_to_install('cuda')}") from error
    except Exception as error:  # pycuda's errors are known only once it loads
        raise ConfigError(f"the GPU cannot be used ({error}): run nvidia-smi, then try again") from error

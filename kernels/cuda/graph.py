"""One launch for everything on a stream: what a call enqueues, captured as a CUDA graph.

pycuda 2026.1 has no graphs, so these six calls go to the driver's library directly (CUDA driver API, "Graph
Management" and "Stream Management").
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: other threads may allocate meanwhile


class Graph:
    """What ``enqueue`` puts on a stream, to be launched again and again.

    Arrays are captured by address: they must live as long as the graph, and new data goes into the same memory.

    Args:
        enqueue: calls stages and engines that work on ``stream``; it runs once here and nothing of it is executed.
        stream: ``PycudaDriver.stream``, not the default stream; its context is current.

    Raises:
        RuntimeError: the driver refuses, for example because ``enqueue`` allocated or waited.
    """

    def __init__(self, enqueue: Callable[[], Any], stream: Any, library: Any = None) -> None:
        self._library = library or ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream.handle)
        graph, self._graph = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, RELAXED)
        try:
            enqueue()
        except BaseException:
            self._library.cuStreamEndCapture(self._stream, ctypes.byref(graph))  # the stream works again
            self._library.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._graph), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cuGraphDestroy(graph)
        weakref.finalize(self, self._library.cuGraphExecDestroy, self._graph)

    def launch(self) -> None:
        """Everything once more, in the stream's order.

        Raises:
            RuntimeError: the driver refuses.
        """
        self._call("cuGraphLaunch", self._graph, self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

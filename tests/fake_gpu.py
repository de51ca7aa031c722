"""A GPU made of NumPy: the driver's, pycuda's and TensorRT's calls that the engines make, each checked and kept.

Memory is host arrays by address, a stream is a queue that is worked off when it is synchronised, and a plan runs as
the ONNX graph that it holds, by onnxruntime. What a real device would refuse, this refuses: work outside a current
context, unbound tensors, reading before synchronising, allocating during a capture, launching a graph whose
execution context was modified since.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, Bundle, Plan, open_bundle, read_manifest, seal
from anomalygpt_edge.runtime.vision.engines.plans import this_platform

OK, NOT_PERMITTED = 0, 800
MAX_BATCH = 2


def plan_of(bundle: Bundle, name: str, engine: str = "tensorrt", **changed) -> Plan:
    described = {
        "file": f"{name}.{engine}.plan",
        "engine": engine,
        "version": "10.3.0.30" if engine == "tensorrt" else "1.7.1.116",
        "compute_capabilities": ["8.7"] if engine == "tensorrt" else ["8.9"],
        "gpu": "Orin" if engine == "tensorrt" else "",
        "platform": this_platform(),
        "flags": [] if engine == "tensorrt" else ["ahead_of_time"],
        "max_batch": MAX_BATCH,
        "graph_sha256": bundle.graph_sha256(name),
    }
    return Plan(**described | changed)


def with_plans(source: Path, target: Path, engine: str = "tensorrt", **changed) -> Bundle:
    """A copy of a bundle with a fake plan of each network: the word PLAN and its graph."""
    shutil.copytree(source, target)
    bundle = open_bundle(source)
    plans = {}
    for name in NETWORKS:
        plan = plan_of(bundle, name, engine, **changed)
        (target / plan.file).write_bytes(b"PLAN" + bundle.component_file(name).read_bytes())
        plans[name] = [plan]
    seal(target, msgspec.structs.replace(read_manifest(target), plans=plans))
    return open_bundle(target)


class FakeDriver:
    """``libcuda``: what ctypes calls. One device."""

    def __init__(
        self, num_devices: int = 1, name: bytes = b"Orin", capability: tuple[int, int] = (8, 7)
    ) -> None:
        self.num_devices, self.name, self.capability = num_devices, name, capability
        self.calls: list[str] = []
        self.fail: str = ""  # a function that reports an error
        self.cuda: FakeCuda | None = None
        self.graphs: list[list[Callable[[], None]]] = []

    def __getattr__(self, function: str):
        def call(*arguments) -> int:
            self.calls.append(function)
            if function == self.fail:
                return NOT_PERMITTED
            return getattr(self, f"do_{function}")(*arguments) or OK

        if not function.startswith("cu"):
            raise AttributeError(function)
        return call

    def do_cuInit(self, flags) -> None: ...

    def do_cuDeviceGetCount(self, count) -> None:
        count._obj.value = self.num_devices

    def do_cuDeviceGet(self, device, ordinal) -> None:
        device._obj.value = ordinal.value

    def do_cuDeviceGetName(self, name, size, device) -> None:
        name.value = self.name

    def do_cuDeviceGetAttribute(self, value, number, device) -> None:
        value._obj.value = {75: self.capability[0], 76: self.capability[1], 18: 1}[number.value]

    def do_cuStreamBeginCapture_v2(self, stream, mode) -> None:
        self._stream(stream).captured = []

    def do_cuStreamEndCapture(self, stream, graph) -> None:
        captured = self._stream(stream).captured
        self._stream(stream).captured = None
        self.graphs.append(captured)
        graph._obj.value = len(self.graphs)

    def do_cuGraphInstantiateWithFlags(self, executable, graph, flags) -> None:
        executable._obj.value = graph.value

    def do_cuGraphDestroy(self, graph) -> None: ...

    def do_cuGraphExecDestroy(self, executable) -> None: ...

    def do_cuGraphLaunch(self, executable, stream) -> None:
        for work in self.graphs[executable.value - 1]:
            self._stream(stream).enqueue(work)

    def _stream(self, handle) -> FakeStream:
        assert self.cuda is not None
        return self.cuda.streams[handle.value]


class FakeStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        assert self.captured is None, "a stream cannot be waited for while it is captured"
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class FakeEvent:
    """Times are counted in pieces of work done on the stream."""

    clock = 0

    def record(self, stream: FakeStream) -> None:
        def stamp() -> None:
            FakeEvent.clock += 1
            self.time = FakeEvent.clock

        stream.enqueue(stamp)

    def synchronize(self) -> None: ...

    def time_since(self, other: FakeEvent) -> float:
        return float(self.time - other.time)


class FakeCuda:
    """``pycuda.driver``."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.streams: dict[int, FakeStream] = {}
        self.depth = 0  # contexts pushed
        self.allocations = 0
        self.copies: list[str] = []
        self.Context = SimpleNamespace(pop=self._pop)

    def init(self) -> None: ...

    def Device(self, number: int):
        return SimpleNamespace(retain_primary_context=lambda: SimpleNamespace(push=self._push))

    def Stream(self) -> FakeStream:
        self._need_context()
        stream = FakeStream(7000 + len(self.streams))
        self.streams[stream.handle] = stream
        return stream

    def Event(self) -> FakeEvent:
        self._need_context()
        return FakeEvent()

    def pagelocked_empty(self, shape, dtype) -> np.ndarray:
        self._need_context()
        return np.full(shape, np.nan, dtype)

    def mem_alloc(self, num_bytes: int):
        self._need_context()
        assert not any(stream.captured is not None for stream in self.streams.values()), (
            "allocated in a capture"
        )
        address = 4096 * (1 + self.allocations)
        self.allocations += 1
        self.memory[address] = np.full(num_bytes, 0xFF, np.uint8)
        return FakeAllocation(self, address)

    def memcpy_htod_async(self, address: int, array: np.ndarray, stream: FakeStream) -> None:
        self._need_context()
        self.copies.append("htod")
        stream.enqueue(lambda: self.write(address, array))

    def memcpy_dtoh_async(self, array: np.ndarray, address: int, stream: FakeStream) -> None:
        self._need_context()
        self.copies.append("dtoh")
        array_view = array

        def work() -> None:
            array_view[...] = self.read(address, array_view.shape, array_view.dtype)

        stream.enqueue(work)

    def write(self, address: int, array: np.ndarray) -> None:
        self.memory[address][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def read(self, address: int, shape, dtype) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address][:count].view(dtype).reshape(shape).copy()

    def _push(self) -> None:
        self.depth += 1

    def _pop(self) -> None:
        self.depth -= 1

    def _need_context(self) -> None:
        assert self.depth > 0, "no context is current"


class FakeAllocation:
    def __init__(self, cuda: FakeCuda, address: int) -> None:
        self._cuda, self._address = cuda, address

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        self._cuda._need_context()
        del self._cuda.memory[self._address]


class KernelsOnShim:
    """``kernels.cuda``'s driver on this GPU's memory and stream: a launch runs the .cu file in the shim
    (``tools.cuda_shim``), on a copy of each array that an argument points to."""

    num_multiprocessors = 4

    def __init__(self, cuda: FakeCuda, stream: FakeStream, shim: Any) -> None:
        self._cuda, self._stream, self._shim = cuda, stream, shim

    def kernel(self, file: str, name: str, arguments: str) -> tuple[str, str]:
        return self._shim.kernel(file, name, arguments)

    def launch(self, kernel: tuple[str, str], grid, block, *arguments) -> None:
        def work() -> None:
            pointers = {a for a, kind in zip(arguments, kernel[1], strict=True) if kind == "P" and a}
            there = {pointer: self._shim.allocate(self._cuda.memory[pointer].nbytes) for pointer in pointers}
            for pointer, address in there.items():
                self._shim.upload(address, self._cuda.memory[pointer])
            self._shim.launch(kernel, grid, block, *(there.get(argument, argument) for argument in arguments))
            for pointer, address in there.items():
                self._shim.download(self._cuda.memory[pointer], address)
                self._shim.free(address)

        self._stream.enqueue(work)

    def allocate(self, nbytes: int) -> int:
        self._cuda._push()
        try:
            return int(self._cuda.mem_alloc(nbytes))
        finally:
            self._cuda._pop()

    def free(self, address: int) -> None:
        del self._cuda.memory[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        self._cuda.copies.append("htod")
        self._stream.synchronize()
        self._cuda.write(address, array)

    def download(self, array: np.ndarray, address: int) -> None:
        self._cuda.copies.append("dtoh")
        self._stream.synchronize()
        array[...] = self._cuda.read(address, array.shape, array.dtype)


class FakeTensorRt:
    """``tensorrt`` or ``tensorrt_rtx``. A plan is ``b"PLAN"`` and the bytes of an ONNX graph."""

    def __init__(self, cuda: FakeCuda, version: str = "10.3.0.30", rtx: bool = False) -> None:
        self.__version__ = version
        self.cuda = cuda
        self.deserialised: list[bytes] = []
        self.host_code_allowed = False
        self.cache = FakeCache()
        self.contexts: list[FakeContext] = []
        self.configs: list[SimpleNamespace | None] = []
        self.ILogger = _ILogger
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, log):
        def deserialise(data: bytes):
            self.deserialised.append(data)
            self.host_code_allowed = getattr(runtime, "engine_host_code_allowed", False)
            if not data.startswith(b"PLAN"):
                log.log(_ILogger.ERROR, "Magic tag does not match\nand more")
                return None
            return FakeEngine(self, data[4:])

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialise)
        return runtime


class _ILogger:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class FakeCache:
    def __init__(self) -> None:
        self.content = b""
        self.read: list[bytes] = []

    def deserialize(self, blob: bytes) -> bool:
        self.read.append(blob)
        return True

    def serialize(self) -> bytes:
        return self.content


class FakeEngine:
    def __init__(self, api: FakeTensorRt, graph: bytes) -> None:
        self._api, self._graph = api, graph

    def create_runtime_config(self):
        return SimpleNamespace(
            create_runtime_cache=lambda: self._api.cache,
            set_runtime_cache=lambda cache: cache is self._api.cache,
        )

    def create_execution_context(self, config=None):
        self._api.configs.append(config)
        context = FakeContext(self._api, ort.InferenceSession(self._graph))
        self._api.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, api: FakeTensorRt, session: ort.InferenceSession) -> None:
        self._api, self._session = api, session
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names = {node.name for node in (*session.get_inputs(), *session.get_outputs())}
        self.executions = 0
        self._modified = 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._names

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        self._modified += 1
        return True

    def execute_async_v3(self, handle: int) -> bool:
        if self._addresses.keys() != self._names:
            return False
        shapes, addresses, modified = dict(self._shapes), dict(self._addresses), self._modified

        def work() -> None:
            assert modified == self._modified, "the context was modified since this was recorded"
            self.executions += 1
            inputs = {
                node.name: self._api.cuda.read(addresses[node.name], shapes[node.name], np.float32)
                for node in self._session.get_inputs()
            }
            names = [node.name for node in self._session.get_outputs()]
            for name, array in zip(names, self._session.run(names, inputs), strict=True):
                self._api.cuda.write(addresses[name], array)

        self._api.cuda.streams[handle].enqueue(work)
        return True

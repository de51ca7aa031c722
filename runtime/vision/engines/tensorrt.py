"""The TensorRT and TensorRT-RTX engines, with the API that both share and buffers that are allocated once.

Source: the Python APIs of TensorRT 10.3 to 11 (``IExecutionContext.set_tensor_address``, ``execute_async_v3``) and of
TensorRT-RTX from 1.4 on (the same, and ``IRuntimeCache`` for the kernels that it compiles on the device).
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...bundles.bundle import Bundle, Component, Plan, TensorSpec, read_plan, rebuild_hint
from ...common.cache import cache_folder
from ...common.errors import AgptError, BundleError
from ...common.files import write_whole
from ...common.install import how_to_install
from ...common.lifetime import Lifetime
from ...common.terminal import tell
from . import check_inputs, shape_of
from .device import Buffer, Device, open_device
from .gpu import Gpu, find_gpu, missing_driver
from .plans import (
    PRODUCTS,
    VERSION_COMPATIBLE,
    how_to_get,
    is_installed,
    make_log,
    misfit,
    missing_plans,
    open_api,
)


class TensorRtEngine:
    """One network on the GPU.

    Attributes:
        device: the GPU.
        max_batch: the largest batch that the plan was built for.
        buffers: of every input and output, for that batch.
        stream: everything is enqueued on it.
        num_reshapes: how often the context was set to another batch. CUDA graphs recorded before must not be launched
            any more (TensorRT developer guide: undefined once the context is modified).
        num_runs: how often ``run`` has overwritten the buffers.
    """

    def __init__(
        self,
        context: Any,
        component: Component,
        plan: Plan,
        device: Device,
        cache: RuntimeCache | None = None,
    ) -> None:
        """
        Args:
            context: TensorRT's execution context of the deserialised plan.
            component: the network in the manifest.
            plan: the plan in the manifest.
            device: the GPU.
            cache: TensorRT-RTX's cache of compiled kernels; None for TensorRT.
        """
        self._context = context
        self._component = component
        self._plan = plan
        self.device = device
        self._cache = cache
        self._lifetime = Lifetime(f"TensorRT's {plan.file}")
        self._seen: set[int] = set()  # batches that have run: their kernels are compiled
        self._batch = 0  # that the context is set to
        self.num_reshapes = self.num_runs = 0
        with device.current():
            self.stream = device.stream()
            self.buffers = {
                spec.name: device.buffer(shape_of(spec, plan.max_batch), spec.dtype)
                for spec in (*component.inputs, *component.outputs)
            }
        for name, buffer in self.buffers.items():
            self._bind(name, buffer)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Engine.run``. A batch larger than the plan's is split."""
        self._lifetime.check()
        batch = check_inputs(self._component.inputs, inputs)
        self.num_runs += 1
        largest = self._plan.max_batch
        parts = [self._run(inputs, start, min(largest, batch - start)) for start in range(0, batch, largest)]
        return {
            spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self._component.outputs
        }

    def enqueue(self, batch: int, stream: Any) -> None:
        """Enqueue a run on the contents of ``buffers``, without copying and without waiting.

        Raises:
            BundleError: TensorRT reports an error.
        """
        if batch != self._batch:
            # Setting shapes has work done at the next run, which a capture would not repeat.
            self.num_reshapes += 1
            self._batch = 0
            for spec in self._component.inputs:
                if not self._context.set_input_shape(spec.name, shape_of(spec, batch)):
                    raise BundleError(
                        f"{self._plan.file} takes no batch of {batch} for {spec.name}: build it again"
                    )
            self._batch = batch
        if not self._context.execute_async_v3(stream.handle):
            raise BundleError(f"{PRODUCTS[self._plan.engine]} cannot run {self._plan.file}: build it again")

    def keep_kernels(self, batch: int) -> None:
        """Write what TensorRT-RTX compiled for a batch into its cache; to be called when the batch has run."""
        if self._cache and batch not in self._seen:
            self._cache.save()
        self._seen.add(batch)

    def share(self, name: str, buffer: Buffer) -> None:
        """Use another engine's buffer for an input of this one, so that its output is read on the device.

        Raises:
            BundleError: they declare it differently, or the other's batch is smaller.
        """
        own, other = (
            f"{each.host.dtype} {list(each.host.shape[1:])}" for each in (self.buffers[name], buffer)
        )
        if own != other:
            raise BundleError(
                f"{self._plan.file} takes {name} as {own}, but it is given as {other}: re-run agpt export"
            )
        if len(buffer.host) < len(self.buffers[name].host):
            raise BundleError(
                f"{self._plan.file} is for a larger batch than the plan that gives it {name}: build all plans again"
            )
        with self.device.current():
            self.buffers[name].free()
        self.buffers[name] = buffer
        self._bind(name, buffer)

    def close(self) -> None:
        """See ``Engine.close``."""
        if self._lifetime.end():
            self._context = None
            with self.device.current():
                for buffer in self.buffers.values():
                    buffer.free()

    @property
    def max_batch(self) -> int:
        return self._plan.max_batch

    def _run(self, inputs: dict[str, np.ndarray], start: int, batch: int) -> dict[str, np.ndarray]:
        outputs = {}
        with self.device.current():
            for spec in self._component.inputs:
                self.buffers[spec.name].upload(part(spec, inputs[spec.name], start, batch), self.stream)
            self.enqueue(batch, self.stream)
            for spec in self._component.outputs:
                outputs[spec.name] = self.buffers[spec.name].download(shape_of(spec, batch), self.stream)
            self.stream.synchronize()
        self.keep_kernels(batch)
        return {name: array.copy() for name, array in outputs.items()}

    def _bind(self, name: str, buffer: Buffer) -> None:
        if not self._context.set_tensor_address(name, buffer.address):
            raise BundleError(f"{self._plan.file} has no tensor {name}: build it again")


class RuntimeCache:
    """Kernels that TensorRT-RTX compiled on this device, saved in the cache folder to speed up the next start."""

    def __init__(self, cache: Any, path: Path) -> None:
        """
        Args:
            cache: TensorRT-RTX's ``IRuntimeCache``, which checks that the data it reads fits this machine.
            path: the cache file; it is read if it exists.
        """
        self._cache = cache
        self._path = path
        self._writable = True
        if path.is_file() and not path.is_symlink():
            cache.deserialize(path.read_bytes())

    def save(self) -> None:
        """Keep what was compiled; a cache that cannot be written costs the next start time, not this one a verdict."""
        if not self._writable:
            return
        try:
            write_whole(self._path, bytes(memoryview(self._cache.serialize())))
        except AgptError as error:
            self._writable = False
            tell(f"compiled kernels are not kept, and the next start compiles them again: {error}")


def unavailable_reason(variant: str, bundle: Bundle | None) -> str:
    """See ``Backend.unavailable_reason``."""
    gpu = find_gpu()
    if gpu is None:
        return missing_driver()
    if not is_installed(variant):
        return f"{PRODUCTS[variant]} is not installed: {how_to_get(variant)}"
    if find_spec("pycuda") is None:
        return f"pycuda is not installed: {how_to_install(variant)}"
    if bundle is None:
        return ""
    return missing_plans(bundle, variant) or misfits(variant, bundle, gpu)


def misfits(variant: str, bundle: Bundle, gpu: Gpu) -> str:
    """Why the first plan that must not be loaded on this machine must not; "" if all may be loaded."""
    version = open_api(variant).__version__
    plans = {name: plan for name in bundle.manifest.plans if (plan := bundle.plan(name, variant))}
    reasons = (misfit(bundle, name, plan, gpu, version) for name, plan in plans.items())
    return next(filter(None, reasons), "")


def load(bundle: Bundle, name: str, variant: str, threads: int) -> TensorRtEngine:
    """See ``open_networks``; ``unavailable_reason`` must have returned "". ``threads`` is not used."""
    plan = bundle.plan(name, variant)
    assert plan is not None
    data = read_plan(bundle.folder, bundle.manifest, plan)
    api, device = open_api(variant), open_device()
    with device.current():
        engine = deserialise(api, data, plan, bundle.folder)
        context, cache = open_context(api, engine, plan, data)
    component = bundle.manifest.components[name]
    return TensorRtEngine(context, component, plan, device, cache)


def deserialise(api: Any, data: bytes, plan: Plan, folder: Path) -> Any:
    """Load a checked plan as an engine.

    Raises:
        BundleError: TensorRT cannot load it.
    """
    log = make_log(api)
    runtime = api.Runtime(log)
    if VERSION_COMPATIBLE in plan.flags:
        runtime.engine_host_code_allowed = True  # the plan contains its own runtime; its digest was checked
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        product, reason = PRODUCTS[plan.engine], log.first_error()
        raise BundleError(f"{product} cannot load {plan.file} ({reason}): {rebuild_hint(folder, plan)}")
    return engine


def open_context(api: Any, engine: Any, plan: Plan, data: bytes) -> tuple[Any, RuntimeCache | None]:
    """The execution context, with a runtime cache where the engine compiles on the device.

    Raises:
        BundleError: TensorRT cannot create the context, usually because the GPU lacks memory.
    """
    cache = None
    if plan.engine == "tensorrt-rtx":
        config = engine.create_runtime_config()
        # Compile the kernels for a shape at its first run, during the warm-up, instead of in the background.
        config.dynamic_shapes_kernel_specialization_strategy = (
            api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        native = config.create_runtime_cache()
        digest = hashlib.sha256(data).hexdigest()[:16]
        cache = RuntimeCache(native, cache_folder("tensorrt-rtx") / f"{digest}-{api.__version__}.cache")
        config.set_runtime_cache(native)
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise BundleError(
            f"{plan.file} does not fit into the GPU's memory: free some, or use --engine onnxruntime"
        )
    return context, cache


def part(spec: TensorSpec, array: np.ndarray, start: int, batch: int) -> np.ndarray:
    """Rows ``start`` to ``start + batch`` of a tensor with a batch axis; all of a tensor without one."""
    return array[start : start + batch] if isinstance(spec.shape[0], str) else array

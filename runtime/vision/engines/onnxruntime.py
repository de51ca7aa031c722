"""The onnxruntime engines: on the CPU of every machine, and on NVIDIA GPUs with the CUDA and TensorRT providers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...bundles.bundle import FIX, Bundle, Component
from ...common.cache import cache_folder
from ...common.errors import BundleError, ConfigError
from ...common.install import how_to_install
from ...common.lifetime import Lifetime
from . import Engine, check_inputs, shape_of
from .gpu import find_gpu, missing_driver

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
ERRORS_ONLY = 3


class CpuEngine:
    """A session whose inputs and outputs are NumPy arrays."""

    def __init__(self, session: ort.InferenceSession, component: Component) -> None:
        self._session: ort.InferenceSession | None = session
        self._component = component
        self._outputs = [spec.name for spec in component.outputs]
        self._lifetime = Lifetime(f"the {component.file} session")

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Engine.run``."""
        self._lifetime.check()
        assert self._session is not None
        check_inputs(self._component.inputs, inputs)
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def close(self) -> None:
        """See ``Engine.close``."""
        if self._lifetime.end():
            self._session = None


class DeviceEngine:
    """A session with tensors on a device, in buffers that are allocated once per batch size."""

    def __init__(self, session: ort.InferenceSession, component: Component, device: str = "cuda") -> None:
        self._session: ort.InferenceSession | None = session
        self._component = component
        self._device = device
        self._lifetime = Lifetime(f"the {component.file} session")
        self._buffers: dict[int, dict[str, ort.OrtValue]] = {}

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Engine.run``."""
        self._lifetime.check()
        assert self._session is not None
        batch = check_inputs(self._component.inputs, inputs)
        buffers = self._buffers.get(batch) or self._buffers.setdefault(batch, self._allocate(batch))
        binding = self._session.io_binding()
        for spec in self._component.inputs:
            buffers[spec.name].update_inplace(np.ascontiguousarray(inputs[spec.name]))
            binding.bind_ortvalue_input(spec.name, buffers[spec.name])
        for spec in self._component.outputs:
            binding.bind_ortvalue_output(spec.name, buffers[spec.name])
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {spec.name: np.array(buffers[spec.name].numpy()) for spec in self._component.outputs}

    def close(self) -> None:
        """See ``Engine.close``."""
        if self._lifetime.end():
            self._buffers.clear()
            self._session = None

    def _allocate(self, batch: int) -> dict[str, ort.OrtValue]:
        return {
            spec.name: ort.OrtValue.ortvalue_from_shape_and_type(
                shape_of(spec, batch), np.dtype(spec.dtype), self._device, 0
            )
            for spec in (*self._component.inputs, *self._component.outputs)
        }


def unavailable_reason(variant: str, bundle: Bundle | None) -> str:
    """See ``Backend.unavailable_reason``. It depends on the machine only, because every bundle contains the graphs."""
    if PROVIDERS[variant] not in ort.get_available_providers():
        return (
            f"this onnxruntime has no {PROVIDERS[variant]}: {how_to_install('cuda')} in place of onnxruntime"
        )
    return "" if variant == "cpu" or find_gpu() else missing_driver()


def load(bundle: Bundle, name: str, variant: str, threads: int) -> Engine:
    """See ``open_networks``."""
    return open_graph(bundle.component_file(name), bundle.manifest.components[name], variant, threads)


def open_graph(path: Path, component: Component, variant: str, threads: int) -> Engine:
    """Open a graph file with an execution provider ("cpu", "cuda", "tensorrt").

    Raises:
        BundleError: onnxruntime cannot load the file, or its inputs or outputs differ from the manifest.
        ConfigError: the provider does not start.
    """
    session = open_session(path, variant, threads)
    for kind, specs, nodes in (
        ("inputs", component.inputs, session.get_inputs()),
        ("outputs", component.outputs, session.get_outputs()),
    ):
        found = {node.name: (DTYPES.get(node.type, node.type), _fixed(node.shape)) for node in nodes}
        listed = {spec.name: (spec.dtype, _fixed(spec.shape)) for spec in specs}
        if found != listed:
            raise BundleError(f"{path} has {kind} {found}, but the manifest has {listed}: {FIX}")
    return CpuEngine(session, component) if variant == "cpu" else DeviceEngine(session, component)


def open_session(path: Path, variant: str, threads: int) -> ort.InferenceSession:
    """Open an onnxruntime session with the options that all engines of this module use.

    Raises:
        BundleError: onnxruntime cannot load the file.
        ConfigError: the provider does not start.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Threads that busy-wait between two networks would occupy the cores that the language model needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not has_vnni():
        # Without VNNI, x86 adds pairs of int8 products in 16 bits, which saturate. This option adds them exactly and
        # takes twice as long.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if variant != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from pip packages
    try:
        session = ort.InferenceSession(path, options, providers=provider_options(variant))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BundleError(f"onnxruntime cannot load {path} ({_first_line(error)}): {FIX}") from error
    if session.get_providers()[0] != PROVIDERS[variant]:
        # onnxruntime falls back to the CPU without an error.
        raise ConfigError(
            f"onnxruntime's {PROVIDERS[variant]} does not start here: install the CUDA and cuDNN versions it was built "
            "for (see agpt doctor), or choose --engine onnxruntime"
        )
    return session


def has_vnni(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this x86 processor adds int8 products in 32 bits (VNNI); False if it is unknown."""
    try:
        return "vnni" in cpu_info.read_text()
    except OSError:  # not Linux
        return False


def provider_options(variant: str) -> list[tuple[str, dict[str, str]]]:
    """Providers with options in order of preference; each runs the operators that those before it do not support."""
    cpu: list[tuple[str, dict[str, str]]] = [(PROVIDERS["cpu"], {})]
    # The graph determines the precision: its float32 operators must not run as TF32.
    cuda = [(PROVIDERS["cuda"], {"device_id": "0", "use_tf32": "0"}), *cpu]
    if variant == "tensorrt":
        cache = str(cache_folder("onnxruntime-tensorrt"))
        kept = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
        timings = {"trt_timing_cache_enable": "1", "trt_timing_cache_path": cache}
        return [(PROVIDERS["tensorrt"], {"device_id": "0", **kept, **timings}), *cuda]
    return cuda if variant == "cuda" else cpu


def _fixed(shape: list[int | str]) -> list[int]:
    """The shape with −1 for dynamic axes, whose names may differ."""
    return [axis if isinstance(axis, int) else -1 for axis in shape]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]

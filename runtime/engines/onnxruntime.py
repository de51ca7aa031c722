"""onnxruntime: the engine that runs everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..bundle import FIX, Component
from ..errors import BundleError, ConfigError
from . import check_inputs

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
ERRORS_ONLY = 3


class OnnxEngine:
    def __init__(self, session: ort.InferenceSession, component: Component) -> None:
        self._session = session
        self._component = component
        self._outputs = [spec.name for spec in component.outputs]

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Engine.run``."""
        check_inputs(self._component.inputs, inputs)
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


def load(path: Path, component: Component, provider: str, threads: int) -> OnnxEngine:
    """See ``open_engine``."""
    if PROVIDERS.get(provider) not in ort.get_available_providers():
        known = ", ".join(name for name, full in PROVIDERS.items() if full in ort.get_available_providers())
        raise ConfigError(f"onnxruntime has no provider {provider!r} here: choose one of {known}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Threads that spin between two networks would take the cores from the language model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(path, options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BundleError(f"onnxruntime cannot load {path} ({_first_line(error)}): {FIX}") from error
    for kind, specs, nodes in (
        ("inputs", component.inputs, session.get_inputs()),
        ("outputs", component.outputs, session.get_outputs()),
    ):
        found = {node.name: (DTYPES.get(node.type, node.type), _fixed(node.shape)) for node in nodes}
        promised = {spec.name: (spec.dtype, _fixed(spec.shape)) for spec in specs}
        if found != promised:
            raise BundleError(f"{path} has {kind} {found} and the manifest says {promised}: {FIX}")
    return OnnxEngine(session, component)


def _fixed(shape: list[int | str]) -> list[int]:
    """Sizes of a shape, −1 for a dynamic axis whatever its name."""
    return [axis if isinstance(axis, int) else -1 for axis in shape]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]

"""Engines run the networks: a small interface, one file per backend, imported when first asked for."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from ...bundles.bundle import NETWORKS, Bundle, Component, TensorSpec
from ...common.errors import BundleError, ConfigError

AUTO = "auto"


class Engine(Protocol):
    """One network, opened and checked."""

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs by name → outputs by name, shapes and dtypes as in the manifest.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds on the device."""
        ...


@dataclass(frozen=True)
class Backend:
    """How an engine is opened.

    Attributes:
        module: of this package, with ``unavailable_reason(variant, bundle)`` and ``load(bundle, name, variant, threads)``.
        variant: which execution provider, or which of TensorRT's packages.
        automatic: whether it may be chosen without being asked for.
    """

    module: str
    variant: str
    automatic: bool = True

    def unavailable_reason(self, bundle: Bundle | None) -> str:
        """Why this machine cannot run it (with this bundle's files), in one sentence; "" when it can."""
        return import_module(f".{self.module}", __name__).unavailable_reason(self.variant, bundle)

    def load(self, bundle: Bundle, name: str, threads: int) -> Engine:
        return import_module(f".{self.module}", __name__).load(bundle, name, self.variant, threads)


# Best first.
BACKENDS = {
    "tensorrt": Backend("tensorrt", "tensorrt"),
    "tensorrt-rtx": Backend("tensorrt", "tensorrt-rtx"),
    # Builds its engines for minutes when it is first opened: only when asked for.
    "onnxruntime-tensorrt": Backend("onnxruntime", "tensorrt", automatic=False),
    "onnxruntime-cuda": Backend("onnxruntime", "cuda"),
    "onnxruntime": Backend("onnxruntime", "cpu"),
}


def choose_engine(bundle: Bundle, wanted: str = AUTO) -> str:
    """The best engine that this machine can run with what the bundle contains, or the one that is wanted.

    Raises:
        ConfigError: the wanted engine is unknown or cannot run here, and why.
    """
    if wanted != AUTO:
        if wanted not in BACKENDS:
            raise ConfigError(
                f"--engine {wanted!r} is not known: choose one of {', '.join((AUTO, *BACKENDS))}"
            )
        if unavailable_reason := BACKENDS[wanted].unavailable_reason(bundle):
            raise ConfigError(f"--engine {wanted} cannot run here: {unavailable_reason}")
        return wanted
    candidates = [name for name, backend in BACKENDS.items() if backend.automatic]
    for name in candidates[:-1]:
        if not BACKENDS[name].unavailable_reason(bundle):
            return name
    return candidates[-1]


def open_networks(bundle: Bundle, engine: str, threads: int = 1) -> dict[str, Engine]:
    """Encoder, decoder and prompt learner, opened with one engine.

    Raises:
        BundleError: a file is not the network that the manifest describes.
        ConfigError: the engine does not start on this machine.
    """
    with ExitStack() as stack:  # a network that fails to open closes those before it
        networks = {}
        for name in NETWORKS:
            networks[name] = stack.enter_context(closing(BACKENDS[engine].load(bundle, name, threads)))
        stack.pop_all()
    return networks


def open_engine(path: Path, component: Component, threads: int = 1) -> Engine:
    """Open one graph file on the CPU, where every bundle runs.

    Raises:
        BundleError: the file is not the network that the manifest describes.
    """
    if path.suffix != ".onnx":
        raise BundleError(f"no engine runs {path.name}: re-run agpt export")
    module = import_module(".onnxruntime", __name__)
    return module.open_graph(path, component, "cpu", threads)


def check_inputs(specs: list[TensorSpec], inputs: dict[str, np.ndarray]) -> int:
    """Compare inputs with the manifest before native code sees them; equal axis names must agree in size.

    Returns:
        The batch: the size of the axis that has a name; 1 when none has.
    """
    if inputs.keys() != {spec.name for spec in specs}:
        raise ValueError(f"inputs are {sorted(inputs)}, not {sorted(spec.name for spec in specs)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        array = inputs[spec.name]
        fits = array.ndim == len(spec.shape) and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for size, axis in zip(array.shape, spec.shape, strict=True)
        )
        if not fits or array.dtype != spec.dtype:
            raise ValueError(
                f"{spec.name} is {array.dtype} {list(array.shape)}, not {spec.dtype} {spec.shape}"
            )
    return next(iter(sizes.values()), 1)


def learner_inputs(
    learner: Component, anomaly_map: np.ndarray, num_samples: int, pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """What a prompt learner is run on, by name: as it declares, the map alone or with more.

    Args:
        learner: the prompt learner as the manifest describes it.
        anomaly_map: float32 [B, S, S].
        num_samples: normal samples that the maps come from; 0: zero-shot.
        pixels: float32 [B, 3, S, S]: what the encoder was given of the same views.

    Returns:
        Those of ``anomaly_map``, ``num_samples``, float32 [B], and ``pixels`` that are declared.
    """
    counts = np.full(len(anomaly_map), num_samples, np.float32)
    given = {"anomaly_map": anomaly_map, "num_samples": counts, "pixels": pixels}
    return {spec.name: given[spec.name] for spec in learner.inputs if spec.name in given}


def shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """A tensor's shape at a batch size."""
    return tuple(axis if isinstance(axis, int) else batch for axis in spec.shape)

"""Engines, which run the networks: a small interface and one module per backend, imported on first use."""

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
        """Run the network on inputs by name; returns the outputs by name. Shapes and dtypes are those of the manifest.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory on the device."""
        ...


@dataclass(frozen=True)
class Backend:
    """How an engine is opened.

    Attributes:
        module: module of this package with ``unavailable_reason(variant, bundle)`` and
            ``load(bundle, name, variant, threads)``.
        variant: the execution provider, or the TensorRT package.
        automatic: whether "auto" may choose it.
    """

    module: str
    variant: str
    automatic: bool = True

    def unavailable_reason(self, bundle: Bundle | None) -> str:
        """Why this machine cannot run the engine (with this bundle's files), in one sentence; "" if it can."""
        return import_module(f".{self.module}", __name__).unavailable_reason(self.variant, bundle)

    def load(self, bundle: Bundle, name: str, threads: int) -> Engine:
        """Open one of the bundle's networks; errors as in ``open_networks``."""
        return import_module(f".{self.module}", __name__).load(bundle, name, self.variant, threads)


# Best first.
BACKENDS = {
    "tensorrt": Backend("tensorrt", "tensorrt"),
    "tensorrt-rtx": Backend("tensorrt", "tensorrt-rtx"),
    # Not automatic, because it builds engines for minutes when it is first opened.
    "onnxruntime-tensorrt": Backend("onnxruntime", "tensorrt", automatic=False),
    "onnxruntime-cuda": Backend("onnxruntime", "cuda"),
    "onnxruntime": Backend("onnxruntime", "cpu"),
}


def choose_engine(bundle: Bundle, wanted: str = AUTO) -> str:
    """The best engine that can run the bundle on this machine, or ``wanted``.

    Raises:
        ConfigError: the wanted engine is unknown or cannot run on this machine; the message says why.
    """
    if wanted != AUTO:
        if wanted not in BACKENDS:
            raise ConfigError(
                f"--engine {wanted!r} is not known: choose one of {', '.join((AUTO, *BACKENDS))}"
            )
        if reason := BACKENDS[wanted].unavailable_reason(bundle):
            raise ConfigError(f"--engine {wanted} cannot run here: {reason}")
        return wanted
    candidates = [name for name, backend in BACKENDS.items() if backend.automatic]
    for name in candidates[:-1]:
        if not BACKENDS[name].unavailable_reason(bundle):
            return name
    return candidates[-1]


def open_networks(bundle: Bundle, engine: str, threads: int = 1) -> dict[str, Engine]:
    """Open encoder, decoder and prompt learner with one engine.

    Raises:
        BundleError: a file's inputs or outputs differ from the manifest.
        ConfigError: the engine does not start on this machine.
    """
    with ExitStack() as stack:  # if a network fails to open, those before it are closed
        networks = {}
        for name in NETWORKS:
            networks[name] = stack.enter_context(closing(BACKENDS[engine].load(bundle, name, threads)))
        stack.pop_all()
    return networks


def open_engine(path: Path, component: Component, threads: int = 1) -> Engine:
    """Open one graph file with onnxruntime on the CPU, which runs every bundle.

    Raises:
        BundleError: the file is not an ONNX graph, or its inputs or outputs differ from the manifest.
    """
    if path.suffix != ".onnx":
        raise BundleError(f"no engine can run {path.name}: re-run agpt export")
    module = import_module(".onnxruntime", __name__)
    return module.open_graph(path, component, "cpu", threads)


def check_inputs(specs: list[TensorSpec], inputs: dict[str, np.ndarray]) -> int:
    """Compare inputs with the manifest before they are passed to native code; equal axis names must agree in size.

    Returns:
        The batch size: the size of the dynamic axis; 1 if there is none.

    Raises:
        ValueError: an input is missing, unknown, or of another dtype or shape.
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
    """The inputs that a prompt learner declares: the anomaly map alone, or also the number of samples and the pixels.

    Args:
        learner: the prompt learner in the manifest.
        anomaly_map: float32 [B, S, S].
        num_samples: number of normal samples that the maps were computed with; 0 for zero-shot maps.
        pixels: float32 [B, 3, S, S], the encoder's input for the same views.

    Returns:
        The declared inputs by name: ``anomaly_map``, ``num_samples`` (float32 [B]) and ``pixels``.
    """
    counts = np.full(len(anomaly_map), num_samples, np.float32)
    given = {"anomaly_map": anomaly_map, "num_samples": counts, "pixels": pixels}
    return {spec.name: given[spec.name] for spec in learner.inputs if spec.name in given}


def shape_of(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """A tensor's shape at a batch size."""
    return tuple(axis if isinstance(axis, int) else batch for axis in spec.shape)

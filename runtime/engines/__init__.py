"""Engines run the networks: a small interface, one file per backend, imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from ..bundle import Component, TensorSpec
from ..errors import BundleError, ConfigError

# File suffix → module of this package with a ``load(path, component, provider, threads)``.
BACKENDS = {".onnx": "onnxruntime"}


class Engine(Protocol):
    """One network, opened and checked."""

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs by name → outputs by name, shapes and dtypes as in the manifest.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
        """
        ...


def open_engine(path: Path, component: Component, provider: str = "cpu", threads: int = 1) -> Engine:
    """Open a component's file with the backend for its suffix.

    Raises:
        BundleError: no backend, or the file is not the network that the manifest describes.
        ConfigError: the backend's package or the provider is not installed.
    """
    backend = BACKENDS.get(path.suffix)
    if backend is None:
        raise BundleError(f"no engine runs {path.name}: re-run agpt export with one of {', '.join(BACKENDS)}")
    try:
        module = import_module(f".{backend}", __name__)
    except ImportError as error:
        raise ConfigError(f"{backend} is not installed ({error}): pip install {backend}") from error
    return module.load(path, component, provider, threads)


def check_inputs(specs: list[TensorSpec], inputs: dict[str, np.ndarray]) -> None:
    """Compare inputs with the manifest before native code sees them; equal axis names must agree in size."""
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

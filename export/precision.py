"""Networks of one precision from those of another, ONNX to ONNX, without torch.

One small function a precision (``export_float16``, ``to_int8``): it reads a float32 graph, writes another beside it,
and describes what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..runtime.bundle import NETWORKS, Component, Manifest
from .float16 import export_float16
from .quantize import to_int8

# Which networks a precision changes; the others stay float32. Only the encoder's operations are worth int8: at full
# size it takes 325 GFLOP an image, the decoder (4 × 256 × 1280 × 1024 products) and the prompt learner 3 each.
CONVERTED = {"fp16": NETWORKS, "int8": ("encoder",)}


def convert(
    folder: Path,
    manifest: Manifest,
    precision: str,
    pixels: Iterable[np.ndarray],
) -> dict[str, Component]:
    """Write the networks of ``precision`` beside the float32 ones.

    Args:
        folder: holds the files of ``manifest``.
        manifest: its networks are float32.
        pixels: float32 [1, 3, S, S] each, of normal parts, for calibration.

    Returns:
        All components, the language model among them, as they are now.
    """
    components = dict(manifest.components)
    for name in CONVERTED[precision]:
        source = folder / components[name].file
        target = source.with_name(f"{name}.{precision}.onnx")
        if precision == "fp16":
            components[name] = export_float16(source, target)
        else:
            components[name] = to_int8(source, target, ({"pixels": batch} for batch in pixels))
    return components


def remove_originals(folder: Path, before: dict[str, Component], after: dict[str, Component]) -> None:
    """Delete the files of components that were converted."""
    for file in {c.file for c in before.values()} - {c.file for c in after.values()}:
        for path in (folder / file, folder / f"{file}.data"):
            path.unlink(missing_ok=True)

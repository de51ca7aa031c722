"""What the frozen backbone sees, computed once: training and evaluation then read arrays instead of images.

The backbone runs in ONNX Runtime, which is twice to four times as fast as torch on a processor.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .backbone import PIXEL_MEAN, PIXEL_SCALE, Backbone

Features = dict[str, NDArray[np.float16]]  # "tap<block>" → [N, C, side, side]
LARGEST_SIDE = 56  # taps with more cells a side are averaged down to it: 448 pixels in blocks of 8


def tap_name(block: int) -> str:
    return f"tap{block}"


class _Taps(nn.Module):
    """The backbone with its taps no larger than ``LARGEST_SIDE``."""

    def __init__(self, backbone: Backbone, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.taps = backbone, taps

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            nn.functional.avg_pool2d(tap, tap.shape[-1] // LARGEST_SIDE) if tap.shape[-1] > LARGEST_SIDE else tap
            for tap in self.backbone(pixels, self.taps)
        )


class Extractor:
    """The backbone in ONNX Runtime.

    Args:
        backbone: with the weights to use.
        taps: zero-based block numbers, ascending.
        size: side of its input in pixels, a multiple of 32.
        threads: at most this many.
    """

    def __init__(self, backbone: Backbone, taps: tuple[int, ...], size: int, threads: int = 1) -> None:
        self.taps, self.size = taps, size
        program = torch.onnx.export(
            _Taps(backbone, taps).eval(), (torch.zeros(1, 3, size, size),), dynamo=True, verbose=False
        )
        if program is None:
            raise RuntimeError("torch.onnx gave no program")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        model = program.model_proto.SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Features of images, BGR [N, S, S, 3]."""
        return self.run(pixels_of(images))

    def run(self, pixels: NDArray[np.float32]) -> Features:
        """Features of what ``pixels_of`` gives, [N, 3, S, S]."""
        rows = [self._session.run(None, {self._input: each[None]}) for each in pixels]
        columns = (np.concatenate(column).astype(np.float16) for column in zip(*rows, strict=True))
        return {tap_name(block): column for block, column in zip(self.taps, columns, strict=True)}


def pixels_of(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """BGR uint8 [N, S, S, 3] → what the backbone takes, RGB float32 [N, 3, S, S]."""
    rgb = images[..., ::-1].astype(np.float32)
    return np.ascontiguousarray(np.moveaxis((rgb - PIXEL_MEAN) / PIXEL_SCALE, -1, 1), np.float32)


def save_whole(path: Path, **arrays: np.ndarray) -> None:
    """``np.savez`` to a temporary name, then rename: a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)

"""Camera pixels to the encoder's input in one pass: cut, colour, antialiased resize, normalisation, layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from .choice import implementation
from .geometry import Box, Resize, check_box
from .sampling import normalisation_table, sampling
from .types import PixelFormat, check_host, frame_size


def preprocess(
    frame: np.ndarray,
    size: int,
    resize: Resize,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    format: PixelFormat = "BGR8",
    boxes: Sequence[Box] | None = None,
    dtype: Any = np.float32,
    out: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Cut boxes from a frame and make each the encoder's input; resizing equals Pillow 10's bicubic bit for bit.

    Pillow resizes in two passes with an 8-bit image between, the horizontal pass first; only the pixels that remain
    after the crop are computed. Colours follow OpenCV's integer conversions: NV12 and YUYV are BT.601 in studio range,
    with c = 1.164·(Y − 16): R = c + 1.596·V', G = c − 0.813·V' − 0.391·U', B = c + 2.018·U' (U', V' less 128;
    fixed point of 2**20, the chroma of a pixel pair shared without interpolation); Bayer pixels are
    interpolated bilinearly (GenICam's BayerRG8, OpenCV's COLOR_BayerRGGB2BGR), the outermost rows and columns
    take the colours of their inner neighbours.

    Args:
        frame: uint8, any strides: BGR8 and RGB8 [H, W, 3]; Mono8 and BayerRG8 [H, W]; YUYV [H, W, 2]; NV12
            [H * 3 / 2, W], the rows of luma before those of chroma.
        size: side S of the output in pixels.
        resize: how a box fits the square, see ``resize_window``.
        mean, std: three channel means and standard deviations in RGB order, for pixels in 0..1.
        format: the frame's pixel format, by its GenICam name where there is one.
        boxes: regions of interest, ``tile_grid`` for tiles; the whole frame when None.
        dtype: float32 or float16 of the result.
        out: C-contiguous ``dtype`` [B, 3, S, S] to write to.
        threads: at most this many CPU threads work on it.

    Returns:
        [B, 3, S, S], RGB, ``(x / 255 - mean) / std``; B boxes in their order.

    Raises:
        ValueError: the frame does not have the format's shape and type, a box does not lie in it, or another argument
            does not fit.
    """
    check_host("preprocess", frame, *(() if out is None else (out,)))
    height, width = frame_size(frame, format)
    if size < 1 or resize not in get_args(Resize):
        raise ValueError(
            f"preprocess makes squares of at least 1 pixel by crop or stretch, not {size}, {resize!r}"
        )
    whole = (Box(0, 0, width, height),)
    checked = whole if boxes is None else tuple(check_box(Box(*box), height, width) for box in boxes)
    samplings = [sampling(box, size, resize) for box in checked]
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float16):
        raise ValueError(f"preprocess gives float32 or float16, not {dtype}")
    shape = (len(checked), 3, size, size)
    if out is None:
        out = np.empty(shape, dtype)
    elif out.shape != shape or out.dtype != dtype or not out.flags.carray:
        raise ValueError(
            f"out must be C-contiguous, writable {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    table = normalisation_table(tuple(map(float, mean)), tuple(map(float, std)))
    if not np.isfinite(table).all():
        raise ValueError(f"mean {mean} and std {std} must be finite and std not 0")
    implementation().preprocess(frame, format, samplings, table, out, threads)
    return out

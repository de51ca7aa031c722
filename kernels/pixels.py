"""Camera pixels → the encoder's input, in one pass: cut, colour, antialiased resize, normalisation, layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from .choice import implementation
from .geometry import MAX_SIDE, Box, Resize, check_box
from .implementation import check_host
from .sampling import normalisation_table, sampling

PixelFormat = Literal["BGR8", "RGB8", "Mono8", "NV12", "YUYV", "BayerRG8"]
FORMATS: tuple[str, ...] = get_args(PixelFormat)
_SHAPES = {
    "BGR8": "[H, W, 3]",
    "RGB8": "[H, W, 3]",
    "Mono8": "[H, W]",
    "NV12": "[H * 3 / 2, W], H and W even",
    "YUYV": "[H, W, 2], W even",
    "BayerRG8": "[H, W], both at least 3",
}


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
    """Cut boxes from a frame and make each the encoder's input, equal to Pillow 10's bicubic bit for bit.

    Pillow resizes in two passes with an 8-bit image between, columns first; only the pixels that survive the
    crop are computed. Colours follow OpenCV's integer conversions: NV12 and YUYV are BT.601 in studio range,
    with c = 1.164·(Y − 16): R = c + 1.596·V', G = c − 0.813·V' − 0.391·U', B = c + 2.018·U' (U', V' less 128;
    fixed point of 2**20, the chroma of a pixel pair shared without interpolation); Bayer pixels are
    interpolated bilinearly (GenICam's BayerRG8, OpenCV's COLOR_BayerRGGB2BGR), the outermost row or column
    taking the colour of its neighbour inside.

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
        ValueError: the frame is not what the format says, a box does not lie in it, or ``out`` does not fit.
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


def frame_size(frame: np.ndarray, format: PixelFormat = "BGR8") -> tuple[int, int]:
    """(height, width) in pixels of a frame in a pixel format.

    Raises:
        ValueError: it is not what the format says.
    """
    if format not in FORMATS:
        raise ValueError(f"the pixel format {format!r} is not known: convert to one of {', '.join(FORMATS)}")
    shape = tuple(getattr(frame, "shape", ()))
    channels = {"BGR8": (3,), "RGB8": (3,), "YUYV": (2,)}.get(format, ())
    fits = (
        getattr(frame, "dtype", None) == np.uint8
        and len(shape) == 2 + len(channels)
        and shape[2:] == channels
    )
    height, width = shape[:2] if fits else (0, 0)
    if format == "NV12":
        fits = fits and height % 3 == 0 and height // 3 * 2 % 2 == 0 and width % 2 == 0
        height = height // 3 * 2
    elif format == "YUYV":
        fits = fits and width % 2 == 0
    smallest = 3 if format == "BayerRG8" else 1
    if not fits or min(height, width) < smallest:
        found = f"{getattr(frame, 'dtype', type(frame).__name__)} {list(shape)}"
        raise ValueError(f"a {format} frame is uint8 {_SHAPES[format]}, not {found}")
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"the frame has {width} x {height} pixels, and a side may have {MAX_SIDE}: cut it up"
        )
    return height, width

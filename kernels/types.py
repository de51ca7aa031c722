"""What the public operations and their implementations share: the memory bank, pixel formats, limits, checks.

This module imports nothing of the package, so that every other module may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

COSINE_EPSILON = 1e-8  # torch's: a shorter vector counts as zero, similar to nothing
MAX_SIDE = 1 << 16  # of a frame, pixels: fixed-point coordinates are exact up to here
MAX_CELLS = 256  # to a side of a map, see ``cell_peaks``

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


@dataclass(frozen=True, eq=False)
class Bank:
    """Patch features of normal samples, ready to be matched; ``prepare_bank`` makes it.

    Attributes:
        rows: float32, float16 or int8 [T, N, V]: N patches for each of T taps. Each row has unit length; int8 rows
            have it once they are multiplied by ``scales``.
        scales: float32 [T, N]; 1 unless the rows are int8.
    """

    rows: np.ndarray
    scales: np.ndarray
    _packed: dict[str, Any] = field(default_factory=dict, repr=False)

    def packed_for(self, chosen: Any) -> Any:
        """The rows in the layout of one implementation, made by the first call and kept."""
        if chosen.name not in self._packed:
            self._packed[chosen.name] = chosen.pack_bank(self)
        return self._packed[chosen.name]

    def to_float(self) -> np.ndarray:
        """The rows as float32 [T, N, V]; float16 and int8 rows have unit length except for rounding."""
        return self.rows.astype(np.float32) * self.scales[..., None]


def frame_size(frame: np.ndarray, format: PixelFormat = "BGR8") -> tuple[int, int]:
    """(height, width) in pixels of a frame in a pixel format.

    Raises:
        ValueError: the format is not known, the frame does not have its shape and type, or a side is too long.
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


def check_host(what: str, *arrays: Any) -> None:
    """Refuse every argument that is not a NumPy array.

    Args:
        what: the operation's name, for the message.

    Raises:
        ValueError: an argument is an array on a device, or something else.
    """
    for array in arrays:
        if not isinstance(array, np.ndarray):
            device = hasattr(array, "__cuda_array_interface__")
            fix = "kernels.cuda.stages take device arrays" if device else "np.asarray makes one"
            raise ValueError(f"{what} takes NumPy arrays, not {type(array).__name__}: {fix}")


def aligned(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy of it that is C-contiguous and aligned for its type."""
    return np.require(array, requirements=["C", "A"])

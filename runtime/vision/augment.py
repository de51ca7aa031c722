"""Copies of normal samples: the same part moved by less than a patch, or turned, so that few samples cover more.

An encoder of patches sees a part otherwise when its grid falls otherwise on it; a good part is never enrolled in
every position. The copies are made of the preprocessed pixels, so that whole frames, tiles and regions have them alike.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ..common.errors import ConfigError

Copies = Literal["none", "moved", "turned", "both"]
COPIES_OF: dict[Copies, int] = {"none": 1, "moved": 4, "turned": 4, "both": 7}  # how many there are with the sample


def check_copies(copies: str) -> None:
    """
    Raises:
        ConfigError: no such copies.
    """
    if copies not in get_args(Copies):
        raise ConfigError(f"copies of the good parts are {', '.join(get_args(Copies))}, not {copies!r}")


def make_copies(pixels: np.ndarray, copies: Copies, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A sample and its copies.

    Args:
        pixels: float32 [views, 3, S, S], what the encoder is given of a normal sample.
        copies: "moved" half the way to the next patch, right, down and both (the edge mirrored); "turned" by 90, 180
            and 270 degrees.
        grid: patches of a side.

    Returns:
        Pixels like the sample's, and int32 [grid²]: the sample's patch that each of their patches shows; the sample
        itself first.
    """
    patches = np.arange(grid * grid, dtype=np.int32).reshape(grid, grid)
    made = [(pixels, patches.ravel())]
    if copies in ("moved", "both"):
        size, half = pixels.shape[-1], pixels.shape[-1] // grid // 2
        padded = np.pad(pixels, ((0, 0), (0, 0), (0, half), (0, half)), mode="symmetric")
        for down, right in ((0, half), (half, 0), (half, half)):
            moved = padded[:, :, down : down + size, right : right + size]
            made.append((np.ascontiguousarray(moved), patches.ravel()))
    if copies in ("turned", "both"):
        for turns in (1, 2, 3):
            turned = np.ascontiguousarray(np.rot90(pixels, turns, (2, 3)))
            made.append((turned, np.rot90(patches, turns).ravel()))
    return made

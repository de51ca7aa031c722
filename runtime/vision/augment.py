"""Augmentation of normal samples: shifts by half a patch and rotations, so that few samples cover more poses.

The features of a patch depend on the position of the patch grid on the part, and the samples do not show a part in
every position. The preprocessed pixels are augmented, so that whole frames, tiles and regions are treated alike.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from ..bundles.bundle import Augmentation
from ..common.errors import ConfigError

# Number of images that one sample becomes, including itself.
NUM_IMAGES: dict[Augmentation, int] = {"none": 1, "moved": 4, "turned": 4, "both": 7}


def check_augmentation(augmentation: str) -> None:
    """Check the name of an augmentation.

    Raises:
        ConfigError: there is no such augmentation.
    """
    if augmentation not in get_args(Augmentation):
        choices = ", ".join(get_args(Augmentation))
        raise ConfigError(f"--augmentation must be one of {choices}, not {augmentation!r}")


def augment(pixels: np.ndarray, augmentation: Augmentation, grid: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A normal sample and its augmented versions.

    Args:
        pixels: float32 [views, 3, S, S], the encoder's input for a normal sample.
        augmentation: "moved": shifted by half a patch to the right, down, and both (the edge is mirrored); "turned":
            rotated by 90, 180 and 270 degrees; "both"; "none".
        grid: patches per side.

    Returns:
        For each version, the sample itself first, float32 pixels of the same shape, and for each of its patches the
        index of the patch of the sample that it shows, int32 [grid²].
    """
    patches = np.arange(grid * grid, dtype=np.int32).reshape(grid, grid)
    versions = [(pixels, patches.ravel())]
    if augmentation in ("moved", "both"):
        size, half = pixels.shape[-1], pixels.shape[-1] // grid // 2
        padded = np.pad(pixels, ((0, 0), (0, 0), (0, half), (0, half)), mode="symmetric")
        for down, right in ((0, half), (half, 0), (half, half)):
            moved = padded[:, :, down : down + size, right : right + size]
            versions.append((np.ascontiguousarray(moved), patches.ravel()))
    if augmentation in ("turned", "both"):
        for turns in (1, 2, 3):
            turned = np.ascontiguousarray(np.rot90(pixels, turns, (2, 3)))
            versions.append((turned, np.rot90(patches, turns).ravel()))
    return versions

"""Augmentation of normal samples: shifts by half a patch and rotations, so that few samples cover more poses.

The features of a patch depend on the position of the patch grid on the part, and the samples do not show a part in
every position. The preprocessed pixels are augmented, so that whole frames, tiles and regions are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import cv2
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


def vary(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Iterator[np.ndarray]:
    """A good part as it may look a moment later: moved, rotated, scaled, brighter, darker, blurred, noisy.

    Args:
        pixels: float32 [views, 3, S, S], the encoder's input.
        mean, std: of its channels, as in the manifest.

    Yields:
        Eight versions of the same shape, the same ones for every product; one at a time, as tiles take much memory.
    """
    planes = np.moveaxis(pixels, 1, -1) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)  # 0..1
    size = planes.shape[1]

    def moved(
        images: np.ndarray, angle: float = 0.0, scale: float = 1.0, x: float = 0.0, y: float = 0.0
    ) -> np.ndarray:
        matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, scale)
        matrix[:, 2] += (x * size, y * size)
        return np.stack(
            [
                cv2.warpAffine(
                    image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
                )
                for image in images
            ]
        )

    noise = np.random.default_rng(0).normal(0, 4 / 255, (size, size, 1)).astype(np.float32)

    def versions() -> Iterator[np.ndarray]:
        yield moved(planes, x=0.015, y=0.01)
        yield moved(planes, x=-0.01, y=-0.02)
        yield moved(planes, angle=3) * 1.1
        yield moved(planes, angle=-3) * 0.9
        yield moved(planes, angle=1, scale=1.03)
        yield moved(planes, angle=-1, scale=0.97)
        yield np.stack([cv2.GaussianBlur(image, (0, 0), size / 448) for image in planes])
        yield planes + noise

    for version in versions():
        scaled = (np.clip(version, 0, 1) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        yield np.ascontiguousarray(np.moveaxis(scaled, -1, 1), np.float32)

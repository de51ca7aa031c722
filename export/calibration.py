"""Images for int8 calibration and for checking its result: the user's normal images and generated ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.random import default_rng

from ..kernels import preprocess
from ..runtime.bundles.bundle import Preprocess
from ..runtime.common.errors import ConfigError
from ..runtime.synthetic.data import SIZE, draw
from ..runtime.synthetic.products import TRAINED_KINDS, Family
from ..runtime.vision.image_files import find_images
from ..runtime.vision.images import read_image
from .samples import draw_poster, draw_texture

MAX_IMAGES = 32  # taken from the user's folder at most, evenly spaced
CALIBRATION_SEED, SAMPLE_SEED = 8, 9  # of the generated images
NUM_UNLIKE = 12  # generated calibration images that show no part
NUM_SAMPLES = 4  # of each kind of image


def calibration_images(folder: Path | None) -> list[Path]:
    """The images of a folder that are used, at most ``MAX_IMAGES``; an empty list for None.

    Raises:
        ConfigError: the folder does not exist or contains no image.
    """
    if folder is None:
        return []
    images = find_images(folder).paths if folder.is_dir() else ()
    if not images:
        raise ConfigError(f"--calibration {folder} contains no image: give a folder of normal images")
    chosen = np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).round().astype(int)
    return [images[index] for index in chosen]


def calibration_pixels(images: list[Path], settings: Preprocess) -> Iterator[np.ndarray]:
    """Images that the quantisation is fitted to, float32 [1, 3, S, S] each: three of every four user images,
    generated good parts of every kind that nano is trained on, and images that show no part. Fitted to one product
    alone, the quantisation would be worse on everything else, including its defects.

    Raises:
        ImageError: an image cannot be decoded.
    """
    users = (path for index, path in enumerate(images) if index not in held_out(images))
    drawn = [
        *generated_frames(CALIBRATION_SEED, len(TRAINED_KINDS)),
        *unlike_frames(CALIBRATION_SEED, NUM_UNLIKE),
    ]
    return pixels_of([*map(read_image, users), *drawn], settings)


def sample_pixels(images: list[Path], settings: Preprocess) -> Iterator[np.ndarray]:
    """Images that the int8 networks are checked on, float32 [1, 3, S, S] each. None of them is a calibration image or
    an image of the parity comparison. The first shows a part, the second a texture.

    Raises:
        ImageError: an image cannot be decoded.
    """
    part, *parts = generated_frames(SAMPLE_SEED, NUM_SAMPLES)
    users = [read_image(images[index]) for index in held_out(images)]
    return pixels_of([part, *unlike_frames(SAMPLE_SEED, NUM_SAMPLES), *parts, *users[:NUM_SAMPLES]], settings)


def held_out(images: list[Path]) -> range:
    """Indices of the user's images that are kept for checking: every fourth."""
    return range(3, len(images), 4)


def pixels_of(frames: Iterable[np.ndarray], settings: Preprocess) -> Iterator[np.ndarray]:
    """uint8 BGR [H, W, 3] frames → float32 [1, 3, S, S] each."""
    for frame in frames:
        yield preprocess(frame, settings.size, settings.resize, settings.mean, settings.std)


def generated_frames(seed: int, count: int) -> Iterator[np.ndarray]:
    """Good parts of the first ``count`` kinds that nano is trained on: uint8 BGR [224, 224, 3]."""
    for index, kind in enumerate(TRAINED_KINDS[:count]):
        yield draw(Family(kind, seed), default_rng([seed, index]), 0, (SIZE, SIZE)).pixels


def unlike_frames(seed: int, count: int) -> Iterator[np.ndarray]:
    """Textures with the spectrum of photographs and flat areas of full contrast, alternating: uint8 BGR."""
    for index in range(count):
        yield (draw_texture, draw_poster)[index % 2](1000 * seed + index)

"""Normal images on which the networks run before they are quantised: the user's own, or generated ones."""

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

MAX_IMAGES = 32  # of a large folder, so many are taken, evenly spread
CALIBRATION_SEED, SAMPLE_SEED = 8, 9  # of what is drawn
NUM_UNLIKE = 12  # drawn images that are no parts, in calibration
NUM_SAMPLES = 4  # of each kind of image


def calibration_images(folder: Path | None) -> list[Path]:
    """The images of a folder that are used; none for None.

    Raises:
        ConfigError: no folder, or no image in it.
    """
    if folder is None:
        return []
    images = find_images(folder).paths if folder.is_dir() else ()
    if not images:
        raise ConfigError(f"--calibration {folder} holds no image: give a folder of normal images")
    chosen = np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).round().astype(int)
    return [images[index] for index in chosen]


def calibration_pixels(images: list[Path], settings: Preprocess) -> Iterator[np.ndarray]:
    """What rounding is fitted to, float32 [1, 3, S, S] each: the user's images but for every fourth, good parts of
    every kind that nano is trained on, and what is no part; fitted to one product alone, rounding would be worse on
    everything else, a defect for one.

    Raises:
        ImageError: an image does not decode.
    """
    users = (path for index, path in enumerate(images) if index not in held_out(images))
    drawn = [
        *generated_frames(CALIBRATION_SEED, len(TRAINED_KINDS)),
        *unlike_frames(CALIBRATION_SEED, NUM_UNLIKE),
    ]
    return pixels_of([*map(read_image, users), *drawn], settings)


def sample_pixels(images: list[Path], settings: Preprocess) -> Iterator[np.ndarray]:
    """What int8 has to hold on: none of the above and nothing that the gate looks at, the first one a part, the second
    a texture.

    Raises:
        ImageError: an image does not decode.
    """
    part, *parts = generated_frames(SAMPLE_SEED, NUM_SAMPLES)
    users = [read_image(images[index]) for index in held_out(images)]
    return pixels_of([part, *unlike_frames(SAMPLE_SEED, NUM_SAMPLES), *parts, *users[:NUM_SAMPLES]], settings)


def held_out(images: list[Path]) -> range:
    """Which of the user's images are samples: every fourth."""
    return range(3, len(images), 4)


def pixels_of(frames: Iterable[np.ndarray], settings: Preprocess) -> Iterator[np.ndarray]:
    for frame in frames:
        yield preprocess(frame, settings.size, settings.resize, settings.mean, settings.std)


def generated_frames(seed: int, count: int) -> Iterator[np.ndarray]:
    """Good parts, each of another kind that nano is trained on: uint8 BGR [224, 224, 3]."""
    for index, kind in enumerate(TRAINED_KINDS[:count]):
        yield draw(Family(kind, seed), default_rng([seed, index]), 0, (SIZE, SIZE)).pixels


def unlike_frames(seed: int, count: int) -> Iterator[np.ndarray]:
    """Textures like photographs' and flat areas of full contrast, in turns."""
    for index in range(count):
        yield (draw_texture, draw_poster)[index % 2](1000 * seed + index)

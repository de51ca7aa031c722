"""Normal images on which the networks run before they are quantised: the user's own, or generated ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import default_rng

from ..kernels import preprocess
from ..models.nano.data import SIZE, draw
from ..models.nano.products import TRAINED_KINDS, Family
from ..runtime.bundle import Preprocess
from ..runtime.cameras.folder import is_image
from ..runtime.errors import ConfigError
from ..runtime.images import read_image
from .samples import draw_poster, draw_texture

MAX_IMAGES = 32  # of a large folder, so many are taken, evenly spread
GENERATED_SEED = 8


def calibration_images(folder: Path | None) -> list[Path]:
    """The images of a folder that are used; none for None.

    Raises:
        ConfigError: no folder, or no image in it.
    """
    if folder is None:
        return []
    images = sorted(filter(is_image, folder.rglob("*"))) if folder.is_dir() else []
    if not images:
        raise ConfigError(f"--calibration {folder} holds no image: give a folder of normal images")
    chosen = np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).round().astype(int)
    return [images[index] for index in chosen]


def calibration_pixels(images: list[Path], settings: Preprocess) -> Iterator[np.ndarray]:
    """Pixels as the encoder gets them, float32 [1, 3, S, S] each; without images, of generated good parts.

    Raises:
        ImageError: an image does not decode.
    """
    for frame in map(read_image, images) if images else generated_frames():
        yield preprocess(frame, settings.size, settings.resize, settings.mean, settings.std)


def unlike_pixels(settings: Preprocess) -> list[np.ndarray]:
    """Pixels of what is no part: a texture and flat areas of full contrast; not those that the gate looks at."""
    frames = (draw_texture(GENERATED_SEED), draw_poster(GENERATED_SEED))
    return [preprocess(frame, settings.size, settings.resize, settings.mean, settings.std) for frame in frames]


def generated_frames() -> Iterator[np.ndarray]:
    """One good part of every kind that nano is trained on: uint8 BGR [224, 224, 3]."""
    for index, kind in enumerate(TRAINED_KINDS):
        family = Family(kind, GENERATED_SEED)
        yield draw(family, default_rng([GENERATED_SEED, index]), 0, (SIZE, SIZE)).pixels

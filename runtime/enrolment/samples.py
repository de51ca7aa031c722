"""Normal samples with their names: reading, and checks before the encoder runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..common.errors import ImageError, RecipeError
from ..vision.images import check_frame, read_image


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a good part.

    Attributes:
        name: the file or another name for messages.
        pixels: uint8 [H, W, 3] BGR.
    """

    name: str
    pixels: np.ndarray

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the pixels and their shape, independent of the file."""
        shape = repr(self.pixels.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self.pixels).tobytes()).digest()


def read_samples(paths: Iterable[Path]) -> list[Sample]:
    """Read image files.

    Raises:
        ImageError: a file cannot be read or is not an image.
    """
    return [Sample(str(path), read_image(path)) for path in paths]


def name_samples(frames: Sequence[np.ndarray | Sample], word: str) -> list[Sample]:
    """Make samples of frames; a frame without a name is named by ``word`` and its number, from 1.

    Raises:
        ImageError: something is not a frame; the message contains its name.
    """
    samples = []
    for number, frame in enumerate(frames, 1):
        sample = frame if isinstance(frame, Sample) else Sample(f"{word} {number}", frame)
        try:
            check_frame(sample.pixels)
        except ImageError as error:
            raise ImageError(f"{sample.name}: {error}") from error
        samples.append(sample)
    return samples


def check_sizes(samples: Sequence[Sample]) -> None:
    """Check that all samples have the same size, as tiles and regions require.

    Raises:
        ImageError: a sample's size differs from that of the first one.
    """
    height, width = samples[0].pixels.shape[:2]
    for sample in samples:
        if sample.pixels.shape[:2] != (height, width):
            other_height, other_width = sample.pixels.shape[:2]
            raise ImageError(
                f"{sample.name} has {other_width} x {other_height} pixels, but {samples[0].name} has {width} x "
                f"{height}: tiles and regions need images of one size"
            )


def check_apart(normals: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Check that no held-out sample is also in the memory bank, where its distance would be 0.

    Raises:
        RecipeError: a sample is in both.
    """
    in_bank = {sample.digest: sample.name for sample in normals}
    for sample in held_out:
        if (same := in_bank.get(sample.digest)) is not None:
            raise RecipeError(
                f"{sample.name} has the same pixels as {same}, which is in the memory bank: "
                "hold out images of other parts"
            )


def identical_samples(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """Pairs of names: each sample with the same pixels as an earlier one, and that one."""
    first: dict[bytes, str] = {}
    repeated = []
    for sample in samples:
        if sample.digest in first:
            repeated.append((sample.name, first[sample.digest]))
        else:
            first[sample.digest] = sample.name
    return repeated

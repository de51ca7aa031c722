"""Normal samples by name: read, compared with each other, checked before anything is computed."""

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
        name: its file, for messages.
        pixels: uint8 [H, W, 3] BGR.
    """

    name: str
    pixels: np.ndarray

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the pixels and their shape: equal for equal pictures, whatever their files."""
        shape = repr(self.pixels.shape).encode()
        return hashlib.sha256(shape + np.ascontiguousarray(self.pixels).tobytes()).digest()


def read_samples(paths: Iterable[Path]) -> list[Sample]:
    """Read image files.

    Raises:
        ImageError: a file that cannot be read or is not an image.
    """
    return [Sample(str(path), read_image(path)) for path in paths]


def name_samples(frames: Sequence[np.ndarray | Sample], word: str) -> list[Sample]:
    """Frames without a name get ``word`` and their number, from 1.

    Raises:
        ImageError: something is not a frame; its name is in the message.
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
    """Tiles and regions are for frames of one size.

    Raises:
        ImageError: a sample has another size than the first one.
    """
    height, width = samples[0].pixels.shape[:2]
    for sample in samples:
        if sample.pixels.shape[:2] != (height, width):
            other_height, other_width = sample.pixels.shape[:2]
            raise ImageError(
                f"{sample.name} has {other_width} x {other_height} pixels and {samples[0].name} has {width} x "
                f"{height}: tiles and regions need images of one size"
            )


def check_apart(normals: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Held-out samples must be other pictures than those in the bank: a part is always near itself.

    Raises:
        RecipeError: one is in both.
    """
    in_bank = {sample.digest: sample.name for sample in normals}
    for sample in held_out:
        if (same := in_bank.get(sample.digest)) is not None:
            raise RecipeError(
                f"{sample.name} is the same picture as {same}, which is in the memory bank: "
                "hold out images of other parts"
            )


def identical_samples(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """Pairs of names: each sample that repeats an earlier one, and that one."""
    first: dict[bytes, str] = {}
    repeated = []
    for sample in samples:
        if sample.digest in first:
            repeated.append((sample.name, first[sample.digest]))
        else:
            first[sample.digest] = sample.name
    return repeated

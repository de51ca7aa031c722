"""Normal samples with their names: reading, and checks before the encoder runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..common.errors import ConfigError, ImageError, RecipeError
from ..vision.images import check_frame, read_image
from ..vision.views import Layout, Resize, describe_share, tiles_to_cover, unseen_share

MAX_UNSEEN = 0.1  # share of the frame outside the centre square that needs the user's choice


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


def largest_unseen(
    samples: Sequence[Sample], layout: Layout, resize: Resize
) -> tuple[float, tuple[int, int]]:
    """The largest share of a sample that no view shows, 0..1, and (height, width) of that sample in pixels."""
    sizes = {sample.pixels.shape[:2] for sample in samples}
    return max((unseen_share(layout.views(size), size, resize), size) for size in sizes)


def check_unseen(samples: Sequence[Sample], layout: Layout, resize: Resize, overlap: float) -> None:
    """Check that whole frames are inspected almost completely.

    Args:
        samples: the normal samples.
        layout: the views of a frame; regions are a choice already, and tiles show the whole frame.
        resize: how frames are fitted to the encoder's input.
        overlap: of the tiles that the message proposes.

    Raises:
        ConfigError: over 10 % of a frame lies outside the centre square.
    """
    if not layout.is_whole:
        return
    share, (height, width) = largest_unseen(samples, layout, resize)
    if share > MAX_UNSEEN:
        tiles = tiles_to_cover((height, width), overlap)
        raise ConfigError(
            f"{describe_share(share)} of a frame of {width} x {height} pixels lies outside its centre square and would "
            f"not be inspected: give --tiles {tiles} or --resize stretch to inspect all of it, or --resize crop to "
            "accept it"
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

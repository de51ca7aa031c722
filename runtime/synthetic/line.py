"""The built-in demo line: parts of a few products, some of them defective, with known truth.

The products are families that the bundled model was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from .data import draw, num_defects
from .products import Family

FRAME_SIZE = (480, 640)  # height, width of the demo camera
DEFECT_RATE = 0.3

_LINE = {
    "gear": Family("gear", 2_000_003),
    "circuit board": Family("board", 2_000_008),
    "fabric": Family("weave", 2_000_006),
    "capsule": Family("capsule", 2_000_008),
    "tablet tray": Family("blister", 2_000_008),
}
PRODUCTS: tuple[str, ...] = tuple(_LINE)


@dataclass(frozen=True)
class Part:
    """One part as the camera sees it, with the truth that only a demo knows."""

    product: str
    frame: NDArray[np.uint8]  # [480, 640, 3] BGR
    mask: NDArray[np.bool_]  # [480, 640], all False on a good part
    defects: tuple[str, ...]


def normal_sample(product: str, index: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    """A good part to enrol, uint8 BGR [480, 640, 3]; ``render_line`` never yields it."""
    return draw(_LINE[product], default_rng([seed, 1, PRODUCTS.index(product), index]), 0, FRAME_SIZE).pixels


def render_line(num_parts: int, seed: int = 0) -> Iterator[Part]:
    """The line's parts in order; part i does not depend on ``num_parts``."""
    for index in range(num_parts):
        rng = default_rng([seed, 2, index])
        product = PRODUCTS[int(rng.integers(len(PRODUCTS)))]
        defective = rng.random() < DEFECT_RATE
        sample = draw(_LINE[product], rng, num_defects(rng) if defective else 0, FRAME_SIZE)
        while defective and not _inspected(sample.mask):
            sample = draw(_LINE[product], rng, num_defects(rng), FRAME_SIZE)
        yield Part(product, sample.pixels, sample.mask, tuple(d.name for d in sample.defects))


def _inspected(mask: NDArray[np.bool_]) -> bool:
    """Whether more than 90 % of the defective pixels lie in the centre square, the area that the model inspects."""
    height, width = mask.shape
    margin = (width - height) // 2
    return bool(mask[:, margin : width - margin].sum() > 0.9 * mask.sum())

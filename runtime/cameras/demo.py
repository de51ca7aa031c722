"""The built-in line: generated parts of a few products, some of them with known defects."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..synthetic import line
from .base import Camera, Frame

NUM_PARTS = 60
PRODUCTS: tuple[str, ...] = tuple(line.PRODUCTS)


class DemoLine(Camera):
    """Generated parts; the same seed gives the same parts."""

    def __init__(self, num_parts: int | None = None, seed: int = 0) -> None:
        self.name = "demo"
        self._num_parts = NUM_PARTS if num_parts is None else num_parts
        self.num_frames = self._num_parts
        self._seed = seed

    def frames(self) -> Iterator[Frame]:
        for position, part in enumerate(line.render_line(self._num_parts, self._seed), start=1):
            yield Frame(
                part_id=f"{position:04d}",
                source=f"demo line, seed {self._seed}",
                pixels=part.frame,
                product=part.product,
                defects=tuple(part.defects),
            )

    def close(self) -> None:
        pass


def normal_samples(product: str, count: int, seed: int = 0) -> list[np.ndarray]:
    """Good parts for enrolling a product: uint8 [480, 640, 3] BGR each; none of them appears on the line."""
    return [line.normal_sample(product, index, seed) for index in range(count)]

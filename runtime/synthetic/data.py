"""Training and evaluation samples, each a pure function of (seed, index), so that they can be drawn in any order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from .camera import photograph
from .defects import Defect, add_defects, plausible_defects
from .products import KINDS, Family, render

SIZE = 224
GRID = 16
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, RGB
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TRAINING_FAMILY_SEEDS = (0, 1_000_000)
VALIDATION_FAMILY_SEEDS = (1_000_000, 2_000_000)  # for choices between recipes
HELD_OUT_FAMILY_SEEDS = (
    3_000_000,
    4_000_000,
)  # for reported figures only (the demo line's seeds lie in between)


@dataclass
class Sample:
    """One photographed part."""

    pixels: NDArray[np.uint8]  # [H, W, 3] BGR
    mask: NDArray[np.bool_]  # [H, W]
    defects: list[Defect]
    kind: str


def draw(
    family: Family,
    rng: Generator,
    num_defects: int,
    size: tuple[int, int] = (SIZE, SIZE),
    variation: float = 1.0,
) -> Sample:
    """Render and photograph one part with ``num_defects`` defects (0: a good part).

    Args:
        family: the product.
        rng: generator of everything that differs between parts and shots.
        num_defects: defects to add.
        size: (height, width) in pixels.
        variation: see ``photograph``.
    """
    scene = render(family, rng, size)
    image, mask = scene.image, np.zeros(size, bool)
    defects: list[Defect] = []
    if num_defects:
        image, mask, defects = add_defects(scene, rng, num_defects, plausible_defects(family.kind))
    style = default_rng([family.seed, 7])  # the line's camera: fixed for the product
    return Sample(photograph(image, style, rng, variation), mask, defects, family.kind)


def num_defects(rng: Generator) -> int:
    """A random number of defects: mostly one, sometimes two or three."""
    return int(rng.choice([1, 1, 1, 1, 2, 3]))


def mirror_defects(defects: list[Defect], left_right: bool, up_down: bool) -> list[Defect]:
    """The same defects in the mirrored image."""

    def center(d: Defect) -> tuple[float, float]:
        row, column = d.center
        return (1 - row if up_down else row, 1 - column if left_right else column)

    return [dataclasses.replace(d, center=center(d)) for d in defects]


def validation_families(count: int = len(KINDS)) -> list[Family]:
    """Products for choices between recipes: neither trained on nor part of the reported figures."""
    rng = default_rng(VALIDATION_FAMILY_SEEDS[0])
    return [Family(KINDS[i % len(KINDS)], int(rng.integers(*VALIDATION_FAMILY_SEEDS))) for i in range(count)]


def held_out_families(count: int = 2 * len(KINDS)) -> list[Family]:
    """Products that training never saw: every kind in turn, the held-out kinds among them."""
    rng = default_rng(HELD_OUT_FAMILY_SEEDS[0])
    return [Family(KINDS[i % len(KINDS)], int(rng.integers(*HELD_OUT_FAMILY_SEEDS))) for i in range(count)]


def fixed_samples(
    family: Family, num_normal: int, num_good: int, num_bad: int, variation: float = 1.0
) -> tuple[list[Sample], ...]:
    """(normal samples, good queries, defective queries) of a family, always the same; ``variation``: see
    ``photograph``."""
    rng = default_rng([family.seed, 99])
    return (
        [draw(family, rng, 0, variation=variation) for _ in range(num_normal)],
        [draw(family, rng, 0, variation=variation) for _ in range(num_good)],
        [draw(family, rng, num_defects(rng), variation=variation) for _ in range(num_bad)],
    )


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """BGR uint8 [..., H, W, 3] → RGB float32 [..., 3, H, W], normalised with CLIP's mean and deviation."""
    rgb = pixels[..., ::-1].astype(np.float32) / np.float32(255)
    return np.moveaxis(((rgb - MEAN) / STD).astype(np.float32, copy=False), -1, -3)


def patch_coverage(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mask bool [..., 224, 224] → the defective share of each patch, float32 [..., 256]."""
    shape = mask.shape[:-2]
    cells = mask.reshape(*shape, GRID, SIZE // GRID, GRID, SIZE // GRID).mean(axis=(-3, -1))
    return cells.reshape(*shape, GRID * GRID).astype(np.float32)

"""Training and evaluation samples, each a pure function of (seed, index): deterministic, resumable, parallel."""

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
VALIDATION_FAMILY_SEEDS = (1_000_000, 2_000_000)  # choices between recipes
HELD_OUT_FAMILY_SEEDS = (3_000_000, 4_000_000)  # reported figures only (the demo line's lie in between)


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
    unrest: float = 1.0,
) -> Sample:
    """Make and photograph one part with ``num_defects`` defects (0 = a good one); ``unrest`` is ``photograph``'s."""
    scene = render(family, rng, size)
    image, mask = scene.image, np.zeros(size, bool)
    defects: list[Defect] = []
    if num_defects:
        image, mask, defects = add_defects(scene, rng, num_defects, plausible_defects(family.kind))
    style = default_rng([family.seed, 7])  # the line's camera: fixed for the product
    return Sample(photograph(image, style, rng, unrest), mask, defects, family.kind)


def num_defects(rng: Generator) -> int:
    """One mostly, sometimes two or three."""
    return int(rng.choice([1, 1, 1, 1, 2, 3]))


def mirror_defects(defects: list[Defect], left_right: bool, up_down: bool) -> list[Defect]:
    """The same defects in the mirrored image."""

    def center(d: Defect) -> tuple[float, float]:
        row, column = d.center
        return (1 - row if up_down else row, 1 - column if left_right else column)

    return [dataclasses.replace(d, center=center(d)) for d in defects]


def validation_families(count: int = len(KINDS)) -> list[Family]:
    """Products to choose between recipes with: neither trained on nor in the figures that are reported."""
    rng = default_rng(VALIDATION_FAMILY_SEEDS[0])
    return [Family(KINDS[i % len(KINDS)], int(rng.integers(*VALIDATION_FAMILY_SEEDS))) for i in range(count)]


def held_out_families(count: int = 2 * len(KINDS)) -> list[Family]:
    """Products that training never saw: every kind in turn, the held-out kinds among them."""
    rng = default_rng(HELD_OUT_FAMILY_SEEDS[0])
    return [Family(KINDS[i % len(KINDS)], int(rng.integers(*HELD_OUT_FAMILY_SEEDS))) for i in range(count)]


def fixed_samples(
    family: Family, num_normal: int, num_good: int, num_bad: int, unrest: float = 1.0
) -> tuple[list[Sample], ...]:
    """(references, good queries, defective queries) of a family, always the same; ``unrest`` is ``photograph``'s."""
    rng = default_rng([family.seed, 99])
    return (
        [draw(family, rng, 0, unrest=unrest) for _ in range(num_normal)],
        [draw(family, rng, 0, unrest=unrest) for _ in range(num_good)],
        [draw(family, rng, num_defects(rng), unrest=unrest) for _ in range(num_bad)],
    )


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """BGR uint8 [..., H, W, 3] → RGB float32 [..., 3, H, W], CLIP's mean and deviation."""
    rgb = pixels[..., ::-1].astype(np.float32) / np.float32(255)
    return np.moveaxis(((rgb - MEAN) / STD).astype(np.float32, copy=False), -1, -3)


def patch_coverage(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[..., 224, 224] → the defective share of each patch, [..., 256]."""
    shape = mask.shape[:-2]
    cells = mask.reshape(*shape, GRID, SIZE // GRID, GRID, SIZE // GRID).mean(axis=(-3, -1))
    return cells.reshape(*shape, GRID * GRID).astype(np.float32)

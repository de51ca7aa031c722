"""Generated groups, as the frozen backbone sees them: drawn and encoded once, then read by every step of training.

A group is one product: good parts to match with, and queries. What it shows depends on the pool's seed and the group's
number alone. Half of the groups are drawn at 224 pixels and enlarged, as pictures of small sensors and crops are.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from ...runtime.synthetic.data import (
    TRAINING_FAMILY_SEEDS,
    Sample,
    draw,
    mirror_defects,
    num_defects,
)
from ...runtime.synthetic.defects import Defect
from ...runtime.synthetic.products import GENERATOR_VERSION, TRAINED_KINDS, Family
from .encoder import LiteEncoder
from .features import Extractor, save_whole, tap_name

NORMALS = 4  # good parts of a group; the queries behind them: two defective ones and a good one
QUERIES = 3
GROUP = NORMALS + QUERIES
SHARD_GROUPS = 10
CALM_SHARE, CALM = 0.5, 0.3  # of the groups, and what is left there of a line's variation from shot to shot
COARSE_SIZE = 224


@dataclass
class Group:
    """The parts of one product."""

    pixels: NDArray[np.uint8]  # [GROUP, S, S, 3] BGR
    masks: NDArray[np.bool_]  # [GROUP, S, S]
    defects: list[list[Defect]]
    kind: str


def draw_group(seed: int, index: int, size: int) -> Group:
    """Group ``index`` of the pool of this seed, S = ``size``."""
    rng = default_rng([GENERATOR_VERSION, seed, index])
    family = Family(str(rng.choice(TRAINED_KINDS)), int(rng.integers(*TRAINING_FAMILY_SEEDS)))
    counts = [0] * NORMALS + [num_defects(rng), num_defects(rng), 0]
    variation = CALM if rng.random() < CALM_SHARE else 1.0
    side = COARSE_SIZE if rng.random() < 0.5 else size
    samples = [draw(family, rng, count, (side, side), variation) for count in counts]
    pixels, masks = fit(samples, size)
    return Group(*_vary(pixels, masks, [sample.defects for sample in samples], rng), family.kind)


def fit(samples: list[Sample], size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Parts drawn at any size → pixels [N, S, S, 3] and masks [N, S, S] at ``size``."""
    square = (size, size)
    pixels = [
        s.pixels if s.pixels.shape[0] == size else cv2.resize(s.pixels, square, interpolation=cv2.INTER_CUBIC)
        for s in samples
    ]
    masks = [
        cv2.resize(s.mask.astype(np.uint8), square, interpolation=cv2.INTER_NEAREST_EXACT) > 0 for s in samples
    ]
    return np.stack(pixels), np.stack(masks)


def _vary(
    pixels: NDArray[np.uint8], masks: NDArray[np.bool_], defects: list[list[Defect]], rng: Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[list[Defect]]]:
    """The same turn, mirror and colours for all parts of a group."""
    turns = int(rng.integers(4))
    pixels, masks = np.rot90(pixels, turns, (1, 2)), np.rot90(masks, turns, (1, 2))
    defects = [turn_defects(each, turns) for each in defects]
    if rng.integers(2):
        pixels, masks = pixels[:, :, ::-1], masks[:, :, ::-1]
        defects = [mirror_defects(each, left_right=True, up_down=False) for each in defects]
    if rng.random() < 0.3:
        grey = np.rint(pixels.astype(np.float32).mean(axis=-1, keepdims=True))
        pixels = np.repeat(grey, 3, axis=-1).astype(np.uint8)
    elif rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    table = 255 * np.linspace(0, 1, 256) ** np.exp(rng.normal(0, 0.25)) * rng.uniform(0.75, 1.1)
    if rng.random() < 0.1:
        table = 255 - table
        defects = [[replace(d, shade=-d.shade) for d in each] for each in defects]
    recoloured = np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels]
    return np.ascontiguousarray(recoloured), np.ascontiguousarray(masks), defects


def turn_defects(defects: list[Defect], turns: int) -> list[Defect]:
    """The same defects in the image turned counter-clockwise by so many quarters, as ``numpy.rot90`` turns it."""
    for _ in range(turns):
        defects = [replace(d, center=(1 - d.center[1], d.center[0])) for d in defects]
    return defects


def cell_coverage(masks: NDArray[np.bool_], grid: int) -> NDArray[np.float16]:
    """The defective share of each cell: [N, S, S] → [N, grid²]."""
    count, size = masks.shape[:2]
    cell = size // grid
    return masks.reshape(count, grid, cell, grid, cell).mean(axis=(2, 4)).reshape(count, -1).astype(np.float16)


def build_pool(folder: Path, seed: int, num_groups: int, extractor: Extractor, grid: int) -> None:
    """Draw and encode ``num_groups`` groups (rounded up to whole shards) into ``folder``, going on where it stopped.

    Raises:
        ValueError: ``folder`` holds a pool of another seed, generator or encoder.
    """
    about = {
        "generator": GENERATOR_VERSION,
        "seed": seed,
        "size": extractor.size,
        "taps": list(extractor.taps),
        "grid": grid,
    }
    note = folder / "pool.json"
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and json.loads(note.read_text()) != about:
        raise ValueError(f"{folder} holds a pool of another recipe: choose another folder, or delete it")
    note.write_text(json.dumps(about))
    missing = [s for s in range(-(-num_groups // SHARD_GROUPS)) if not _shard_file(folder, s).exists()]
    began = time.monotonic()
    for done, shard in enumerate(missing, 1):
        groups = [draw_group(seed, shard * SHARD_GROUPS + i, extractor.size) for i in range(SHARD_GROUPS)]
        features = extractor(np.concatenate([group.pixels for group in groups]))
        coverage = cell_coverage(np.concatenate([group.masks for group in groups]), grid)
        save_whole(
            _shard_file(folder, shard),
            coverage=coverage,
            kinds=np.array([group.kind for group in groups]),
            **features,
        )
        left = (time.monotonic() - began) / done * (len(missing) - done) / 60
        print(f"pool {done}/{len(missing)} shards, {left:.1f} minutes left", flush=True)


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npz"


@dataclass
class Pool:
    """A finished pool, in memory; the parts of group g are rows g · GROUP and following."""

    gathered: list[NDArray[np.float16]]  # of each tap [N, grid², C]
    summaries: NDArray[np.float32]  # [N, C], means of the last tap
    coverage: NDArray[np.float16]  # [N, grid²]
    kinds: NDArray[np.str_]  # [groups]

    @property
    def num_groups(self) -> int:
        return len(self.kinds)


def load_pool(folder: Path, num_groups: int, encoder: LiteEncoder) -> Pool:
    """The first ``num_groups`` groups (rounded up to whole shards), as the encoder's projections take them."""
    parts = [load_shard(folder, shard, encoder) for shard in range(-(-num_groups // SHARD_GROUPS))]
    gathered = [np.concatenate(taps) for taps in zip(*(part.gathered for part in parts), strict=True)]
    others = ("summaries", "coverage", "kinds")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in others}
    return Pool(gathered, **joined)


@torch.no_grad()
def load_shard(folder: Path, shard: int, encoder: LiteEncoder) -> Pool:
    """The groups of one shard, as ``load_pool`` gives them."""
    names = [tap_name(block) for block in encoder.config.tap_blocks]
    with np.load(_shard_file(folder, shard), allow_pickle=False) as file:
        taps = {name: file[name] for name in names}
        return Pool(
            [encoder.gather(torch.from_numpy(tap).float()).half().numpy() for tap in taps.values()],
            taps[names[-1]].mean(axis=(2, 3), dtype=np.float32),
            file["coverage"],
            file["kinds"],
        )

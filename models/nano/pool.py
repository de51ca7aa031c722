"""Generated groups on disk: drawn once, by several processes, then read by every step of the training.

A pool is a folder of shards of ``SHARD_GROUPS`` groups: pixels in an ``.npy`` file that is memory-mapped, everything
else in an ``.npz`` file that is written last, so that an interrupted ``build_pool`` can be continued. A group depends
only on the pool's seed, its share of calm lines and the group's number.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from ...runtime.synthetic.data import SIZE, TRAINING_FAMILY_SEEDS, draw, num_defects
from ...runtime.synthetic.defects import Defect
from ...runtime.synthetic.products import GENERATOR_VERSION, TRAINED_KINDS, Family

NORMALS, QUERIES = 3, 3  # normal samples, then queries: one defective, one defective or good, one good
GROUP = NORMALS + QUERIES
SHARD_GROUPS = 25
CALM = 0.3  # variation of a calm line


@dataclass
class Group:
    """Six parts of one product."""

    pixels: NDArray[np.uint8]  # [6, 224, 224, 3] BGR
    masks: NDArray[np.bool_]  # [6, 224, 224]
    defects: list[list[Defect]]
    kind: str


def draw_group(seed: int, index: int, calm_share: float = 0.0) -> Group:
    """Group ``index`` of the pool with this seed; ``calm_share`` of the groups are from calm lines."""
    rng = default_rng([GENERATOR_VERSION, seed, index])
    family = Family(str(rng.choice(TRAINED_KINDS)), int(rng.integers(*TRAINING_FAMILY_SEEDS)))
    counts = [0] * NORMALS + [num_defects(rng), num_defects(rng) if rng.random() < 0.5 else 0, 0]
    variation = CALM if index % 100 < 100 * calm_share else 1.0
    samples = [draw(family, rng, count, variation=variation) for count in counts]
    pixels, masks = np.stack([s.pixels for s in samples]), np.stack([s.mask for s in samples])
    return Group(pixels, masks, [s.defects for s in samples], family.kind)


def _write_shard(folder: Path, seed: int, calm_share: float, shard: int) -> int:
    cv2.setNumThreads(1)
    groups = [draw_group(seed, shard * SHARD_GROUPS + i, calm_share) for i in range(SHARD_GROUPS)]
    defects = [[[asdict(d) for d in ds] for ds in group.defects] for group in groups]
    notes = json.dumps({"kinds": [group.kind for group in groups], "defects": defects})
    masks = np.packbits(np.stack([group.masks for group in groups]), axis=-1)
    np.save(_pixels_file(folder, shard), np.stack([group.pixels for group in groups]))
    temporary = _notes_file(folder, shard).with_suffix(".tmp.npz")
    np.savez(temporary, masks=masks, notes=np.frombuffer(notes.encode(), np.uint8))
    temporary.replace(_notes_file(folder, shard))
    return shard


def _pixels_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npy"


def _notes_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.npz"


def build_pool(folder: Path, seed: int, num_groups: int, workers: int = 1, calm_share: float = 0.0) -> None:
    """Draw ``num_groups`` groups (rounded up to whole shards) into ``folder``; ``calm_share`` of them from calm lines.

    Raises:
        ValueError: ``folder`` contains a pool of another seed, generator or share of calm lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-num_groups // SHARD_GROUPS)
    about, note = (
        {"generator": GENERATOR_VERSION, "seed": seed, "calm_share": calm_share},
        folder / "pool.json",
    )
    if note.exists() and json.loads(note.read_text()) != about:
        raise ValueError(
            f"{folder} contains a pool of another seed, generator or share of calm lines: choose another folder, "
            "or delete it"
        )
    note.write_text(json.dumps(about))
    missing = [shard for shard in range(shards) if not _notes_file(folder, shard).exists()]
    write, began = partial(_write_shard, folder, seed, calm_share), time.monotonic()
    if workers < 2:
        _report(map(write, missing), len(missing), began)
    else:
        with ProcessPoolExecutor(workers) as processes:
            _report(processes.map(write, missing), len(missing), began)


def _report(finished, total: int, began: float) -> None:
    for done, _ in enumerate(finished, 1):
        if done % 10 == 0 or done == total:
            left = (time.monotonic() - began) / done * (total - done) / 60
            print(f"pool {done}/{total} shards, {left:.1f} minutes left", flush=True)


class Pool:
    """A finished pool: group number → group, with memory-mapped pixels."""

    def __init__(self, folder: Path, num_groups: int) -> None:
        self.folder, self.num_groups = folder, num_groups
        self._pixels: list[NDArray[np.uint8]] = []
        self._masks: list[NDArray[np.uint8]] = []
        self._notes: list[dict] = []
        for shard in range(-(-num_groups // SHARD_GROUPS)):
            self._pixels.append(np.load(_pixels_file(folder, shard), mmap_mode="r"))
            with np.load(_notes_file(folder, shard), allow_pickle=False) as file:
                self._masks.append(file["masks"])
                self._notes.append(json.loads(file["notes"].tobytes()))

    def __getitem__(self, index: int) -> Group:
        shard, row = divmod(index, SHARD_GROUPS)
        notes = self._notes[shard]
        masks = np.unpackbits(self._masks[shard][row], axis=-1, count=SIZE).astype(bool)
        defects = [
            [Defect(**{**d, "center": tuple(d["center"])}) for d in sample]
            for sample in notes["defects"][row]
        ]
        return Group(self._pixels[shard][row], masks, defects, notes["kinds"][row])

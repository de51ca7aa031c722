"""``python -m anomalygpt_edge.models.nano.sheet --out FOLDER``: draws contact sheets of products and defects."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.random import default_rng

from ...runtime.synthetic.camera import photograph
from ...runtime.synthetic.data import draw
from ...runtime.synthetic.defects import DEFECTS, add_defects, plausible_defects
from ...runtime.synthetic.products import KINDS, Family, render

CELL = 150


def _cell(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (CELL, CELL), interpolation=cv2.INTER_AREA)


def product_sheet(families: int = 5) -> np.ndarray:
    """One row for each kind, with two good parts of each family: uint8 BGR."""
    return np.vstack(
        [
            np.hstack(
                [
                    _cell(draw(Family(kind, seed), default_rng([seed, part]), 0).pixels)
                    for seed in range(families)
                    for part in (0, 1)
                ]
            )
            for kind in KINDS
        ]
    )


def defect_sheet(columns: int = 6) -> np.ndarray:
    """One row for each defect, with parts and, right of each, its mask: uint8 BGR."""
    rows = []
    for number, name in enumerate(DEFECTS):
        cells = []
        for column in range(columns):
            rng = default_rng([number, column])
            kinds = [kind for kind in KINDS if name in plausible_defects(kind)]
            family = Family(str(rng.choice(kinds)), int(rng.integers(1000)))
            image, mask, _ = add_defects(render(family, rng), rng, 1, (name,))
            shot = photograph(image, default_rng([family.seed, 7]), rng)
            cells += [_cell(shot), _cell(np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2))]
        rows.append(np.hstack(cells))
    return np.vstack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/nano-sheet"), help="folder to write")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in (("products.png", product_sheet()), ("defects.png", defect_sheet())):
        if not cv2.imwrite(str(folder / name), image):
            raise SystemExit(f"cannot write {folder / name}: free disk space, or make the folder writable")
        print(folder / name)


if __name__ == "__main__":
    main()

"""``python -m anomalygpt_edge.models.nano.holdout --out FOLDER``: writes held-out products as an MVTec-AD folder.

The families are fixed by seed. No product is used in training, and ``HELD_OUT_KINDS`` contains kinds that training
does not use at all. ``agpt eval BUNDLE FOLDER`` evaluates a bundle on the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from ...runtime.synthetic.data import Sample, fixed_samples, held_out_families


def write_holdout(
    folder: Path, num_families: int, num_normal: int = 4, num_good: int = 10, num_bad: int = 10
) -> None:
    """Write ``<kind>_<number>/{train/good,test/good,test/defect,ground_truth/defect}`` as PNG files.

    Raises:
        OSError: a file cannot be written.
    """
    for number, family in enumerate(held_out_families(num_families)):
        normal, good, bad = fixed_samples(family, num_normal, num_good, num_bad)
        category = folder / f"{family.kind}_{number:02d}"
        for split, samples in (("train/good", normal), ("test/good", good), ("test/defect", bad)):
            for index, sample in enumerate(samples):
                _write(category / split / f"{index:03d}.png", sample.pixels)
        for index, sample in enumerate(bad):
            _write(category / "ground_truth" / "defect" / f"{index:03d}_mask.png", _mask_image(sample))
        print(f"{number + 1}/{num_families} {category.name}", flush=True)


def _mask_image(sample: Sample) -> np.ndarray:
    return sample.mask.astype(np.uint8) * 255


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f"cannot write {path}: free disk space, or make the folder writable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--families",
        type=int,
        default=len(held_out_families()),
        help="number of products; by default two of every kind",
    )
    options = parser.parse_args()
    write_holdout(options.out, options.families)


if __name__ == "__main__":
    main()

"""Makes the picture of README from overlays of the demo: ``python -m tools.readme_picture out/demo 3 24 48 33``."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

COLUMNS = 2
SCALE = 0.75


def _overlay(folder: Path, part: int) -> np.ndarray:
    path = next((folder / "overlays").glob(f"{part:05d}_*.png"))
    image = cv2.imread(str(path))
    assert image is not None, path
    return cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_AREA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --out folder of agpt run")
    parser.add_argument(
        "parts", type=int, nargs="+", help="numbers of the parts to show; an even number of parts"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    options = parser.parse_args()
    images = [_overlay(options.folder, part) for part in options.parts]
    rows = [np.hstack(images[i : i + COLUMNS]) for i in range(0, len(images), COLUMNS)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(options.out), np.vstack(rows), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()

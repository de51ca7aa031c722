"""What accuracy do methods without training reach on labelled images, with a few normal samples?

The figures are those of ``agpt eval``, with the same normal samples, the same geometry and the same size of the maps,
so that the tables can be compared.

    python benchmarks/baselines.py FOLDER [--shots 1,4] [--seed 0] [--random-vit] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from anomalygpt_edge.kernels import match, normalise, preprocess, upsample
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.evaluation.datasets import Category, find_categories
from anomalygpt_edge.runtime.evaluation.evaluate import (
    Figures,
    Scores,
    choose_normals,
    mask_as_seen,
    parse_shots,
)
from anomalygpt_edge.runtime.evaluation.metrics import mean
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.vision.images import read_image
from anomalygpt_edge.runtime.vision.regions import top_mean
from anomalygpt_edge.runtime.vision.views import FrameSize

SIZE, GRID = 224, 16
CELL = SIZE // GRID
NUM_ORIENTATIONS = 9
RESIZE: Literal["crop"] = "crop"
MEASURES = ("image_auroc_max", "image_auroc_top1", "pixel_auroc")

Features = np.ndarray  # float32 [P, F], one row per patch
Extract = Callable[[np.ndarray], Features]  # from pixels float32 [3, 224, 224], RGB in 0..1
Distance = Callable[[Features, list[Features]], np.ndarray]  # query, normal samples → float32 [P]


class Method(NamedTuple):
    name: str
    extract: Extract
    distance: Distance
    localises: bool = True


def mean_grey(pixels: np.ndarray) -> Features:
    """The image's mean grey level, the same in every patch: it does not localise."""
    return np.full((GRID * GRID, 1), pixels.mean(), np.float32)


def hog_and_colour(pixels: np.ndarray) -> Features:
    """Histogram of oriented gradients of each 14 × 14 cell with its 3 × 3 neighbourhood (Dalal and Triggs, CVPR 2005),
    and mean and standard deviation of each colour."""
    cells = pixels.reshape(3, GRID, CELL, GRID, CELL)
    colour = np.concatenate([cells.mean(axis=(2, 4)), cells.std(axis=(2, 4))])
    blocks = _neighbourhoods(_orientation_histograms(pixels.mean(axis=0)))
    return np.concatenate([blocks, colour.reshape(6, -1).T], axis=1).astype(np.float32)


def _orientation_histograms(grey: np.ndarray) -> np.ndarray:
    """float32 [224, 224] → [9, 16, 16]: gradient strength by direction (0..180°), interpolated between two bins."""
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0, ksize=1), cv2.Sobel(grey, cv2.CV_32F, 0, 1, ksize=1)
    strength = np.hypot(across, down)
    place = np.mod(np.arctan2(down, across), np.pi) / np.pi * NUM_ORIENTATIONS
    lower = np.floor(place).astype(int)
    upper_share = place - lower
    planes = np.zeros((NUM_ORIENTATIONS, SIZE, SIZE), np.float32)
    for bin_, share in ((lower, 1 - upper_share), (lower + 1, upper_share)):
        rows, columns = np.indices(grey.shape)
        planes[bin_ % NUM_ORIENTATIONS, rows, columns] += strength * share
    return planes.reshape(NUM_ORIENTATIONS, GRID, CELL, GRID, CELL).sum(axis=(2, 4))


def _neighbourhoods(histograms: np.ndarray) -> np.ndarray:
    """[9, 16, 16] → [256, 81]: each cell with its neighbours (the edge is repeated), scaled to unit length."""
    padded = np.pad(histograms, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifted = [padded[:, y : y + GRID, x : x + GRID] for y in range(3) for x in range(3)]
    rows = np.concatenate(shifted).reshape(-1, GRID * GRID).T
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-2)


def euclidean(query: Features, normals: list[Features]) -> np.ndarray:
    """Distance of each patch to the nearest patch of any normal sample, at any position."""
    bank = np.concatenate(normals)
    squares = (query**2).sum(1)[:, None] - 2 * query @ bank.T + (bank**2).sum(1)
    return np.sqrt(np.maximum(squares.min(axis=1), 0)).astype(np.float32)


def cosine(query: Features, normals: list[Features]) -> np.ndarray:
    """The original's few-shot distance over taps; features are [T, P, V]."""
    return match(query[None], normalise(np.concatenate(normals, axis=1)))[0]


def random_vit() -> Extract:
    """The bundled model's encoder with random weights: the accuracy of its architecture alone."""
    import torch

    from anomalygpt_edge.models.imagebind import VisionEncoder
    from anomalygpt_edge.models.nano.config import nano_config

    torch.manual_seed(0)
    encoder = VisionEncoder(nano_config().vision).eval()

    def extract(pixels: np.ndarray) -> Features:
        with torch.no_grad():
            return encoder(torch.tensor((pixels - 0.45) / 0.27)[None].float())[1][0].numpy()

    return extract


def evaluate(category: Category, method: Method, shots: list[int], seed: int) -> dict[int, Figures]:
    """Figures of a category by number of shots."""
    possible = [k for k in shots if 0 < k <= len(category.normals)]
    normals = [
        method.extract(load(path)) for path in choose_normals(category, max(possible, default=0), seed)
    ]
    scores = {k: Scores() for k in possible}
    for sample in category.tests:
        frame = read_image(sample.image)
        mask = mask_as_seen(sample, frame.shape[:2], (SIZE, SIZE), RESIZE) if method.localises else None
        query = method.extract(load(sample.image))
        for k, kept in scores.items():
            anomaly_map = upsample(method.distance(query, normals[:k])[None], SIZE)[0]
            kept.add(sample, as_verdict(anomaly_map, frame.shape[:2]), mask)
    return {k: kept.figures() for k, kept in scores.items()}


def load(path: Path) -> np.ndarray:
    """float32 [3, 224, 224], RGB in 0..1, cropped like the bundled model's pixels."""
    return preprocess(read_image(path), SIZE, RESIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))[0]


def as_verdict(anomaly_map: np.ndarray, frame_size: tuple[int, int]) -> Verdict:
    """A verdict with only a map: these methods give no answer."""
    return Verdict(
        status=Status.NO_RESULT,
        reason="a map only",
        frame=FrameSize(width=frame_size[1], height=frame_size[0]),
        resize=RESIZE,
        maps=anomaly_map[None],
        score=top_mean(anomaly_map),
        peak=float(anomaly_map.max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of labelled images in the layout of MVTec-AD or VisA"
    )
    parser.add_argument("--shots", default="1,4", help="numbers of normal samples, comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of normal samples")
    parser.add_argument(
        "--random-vit",
        action="store_true",
        help="also evaluate the bundled model's encoder with random weights; needs torch",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if options.folder is None:
        print("baselines.py: skipped, because no folder of labelled images was given")
        return
    methods = [
        Method("mean grey level", mean_grey, euclidean, localises=False),
        Method("HOG + mean/std, Euclidean", hog_and_colour, euclidean),
    ]
    if options.random_vit:
        methods.append(Method("random ViT, cosine", random_vit(), cosine))
    try:
        categories = find_categories(options.folder)
        shots = parse_shots(options.shots)
        results = {
            method.name: {
                category.name: evaluate(category, method, shots, options.seed) for category in categories
            }
            for method in methods
        }
    except AgptError as error:
        sys.exit(f"baselines.py: {error}")
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps(plain(results), indent=2) + "\n")


def plain(results: dict[str, dict[str, dict[int, Figures]]]) -> dict:
    return {
        method: {
            category: {
                k: {name: getattr(figures, name) for name in MEASURES} for k, figures in by_shots.items()
            }
            for category, by_shots in categories.items()
        }
        for method, categories in results.items()
    }


def print_table(results: dict[str, dict[str, dict[int, Figures]]]) -> None:
    table = Table(title="methods without training", box=box.SIMPLE_HEAD)
    for name in ("method", "category"):
        table.add_column(name, no_wrap=True)
    for name in ("shots", "image AUROC max", "image AUROC top 1 %", "pixel AUROC"):
        table.add_column(name, justify="right")
    for method, categories in results.items():
        for category, by_shots in categories.items():
            for k, figures in by_shots.items():
                table.add_row(method, category, str(k), *(cell(getattr(figures, name)) for name in MEASURES))
        for k in dict.fromkeys(
            k for by_shots in categories.values() for k in by_shots if len(categories) > 1
        ):
            found = [by_shots[k] for by_shots in categories.values() if k in by_shots]
            means = (cell(mean([getattr(figures, name) for figures in found])) for name in MEASURES)
            table.add_row(method, "mean", str(k), *means, style="bold")
        table.add_section()
    Console().print(table)


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()

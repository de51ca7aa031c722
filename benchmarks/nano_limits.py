"""What limits the bundled model's accuracy on generated products: the images, the normal sample, or the encoder?

Every part of the validation families (used for choices; the held-out set is not touched) is compared with another good
part, as on a line, and with its twin: the same part without the defect, photographed again in perfect registration, as
no line can do. Defects that the twin's pixels do not show are lost in dirt, light, focus and noise. Defects that its
pixels show and its features do not are lost by the encoder. The difference between the twin and another good part is
due to pose and texture.

Measured (the encoder of generator 1, patches mixed): image AUROC with the twin's pixels .915, its features .870, the
twin in the bank .845, another good part .765. So the encoder causes about a third of the loss, and matching without
positions half of it: defects that are anomalous only by their position (bent, cut and pasted, another colour) are at
chance level with such matching and at .85 to .9 with the other methods.

    python benchmarks/nano_limits.py [--bundle DIR] [--families 70] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.kernels import normalise, upsample
from anomalygpt_edge.models.nano.evaluate import auroc, pixel_auroc, top_share
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.synthetic.camera import photograph
from anomalygpt_edge.runtime.synthetic.data import SIZE, draw, num_defects, validation_families
from anomalygpt_edge.runtime.synthetic.defects import Defect, add_defects, plausible_defects
from anomalygpt_edge.runtime.synthetic.products import Family, render

NUM_QUERIES = 5  # good queries of each family, and the same number of defective ones
AREAS = (0.0, 0.002, 0.005, 0.02, 1.0)
CONTRASTS = (0.0, 0.05, 0.1, 0.2, 1.0)
WAYS = (
    "another good part in the bank",
    "its own twin in the bank",
    "features, patch by patch with its twin",
    "pixels with its twin, lighting matched",
)
NANO = Path(__file__).parents[1] / "models" / "nano" / "bundle"


@dataclass
class Pair:
    """A part, and the same part without its defects in another shot."""

    pixels: NDArray[np.uint8]
    twin: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    defects: list[Defect]


def draw_pairs(family: Family) -> tuple[NDArray[np.uint8], list[Pair]]:
    """Another good part of the family, and its pairs, the good ones first."""
    rng = default_rng([family.seed, 77])
    pairs = []
    for defective in [False] * NUM_QUERIES + [True] * NUM_QUERIES:
        scene = render(family, rng)
        image, mask, defects = scene.image, np.zeros((SIZE, SIZE), bool), []
        if defective:
            image, mask, defects = add_defects(scene, rng, num_defects(rng), plausible_defects(family.kind))
        pixels, twin = (
            photograph(shown, default_rng([family.seed, 7]), rng) for shown in (image, scene.image)
        )
        pairs.append(Pair(pixels, twin, mask, defects))
    return draw(family, rng, 0).pixels, pairs


def pixel_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Largest difference of the channels after matching the local brightness, smoothed: float32 [H, W] in 0..1."""
    first, second = (image.astype(np.float32) / 255 for image in (a, b))
    light = [cv2.GaussianBlur(image.mean(axis=2), (0, 0), 24) + 0.02 for image in (first, second)]
    difference = np.abs(first - second * (light[0] / light[1])[..., None]).max(axis=2)
    return np.asarray(cv2.GaussianBlur(difference, (0, 0), 2), np.float32)


def maps_of(inspector: Inspector, reference: NDArray[np.uint8], pair: Pair) -> list[NDArray[np.float32]]:
    """The part's map [H, W] by each of ``WAYS``."""
    vision, product = inspector.vision, inspector.product
    asked, twin = (vision.encode_frame(pixels, product).patch_features for pixels in (pair.pixels, pair.twin))
    matched = [
        inspector.make_bank([normal], augmentation="none").match(asked, 1)[0]
        for normal in (reference, pair.twin)
    ]
    aligned = 1 - (normalise(asked[0]) * normalise(twin[0])).sum(axis=-1).mean(axis=0)
    patches = [*matched, aligned[None].astype(np.float32)]
    return [*(upsample(distance, SIZE)[0] for distance in patches), pixel_difference(pair.pixels, pair.twin)]


def measure(inspector: Inspector, families: list[Family]) -> dict:
    """Figures by way; and the share of good parts of the same family with a lower score, averaged over defective parts
    of each area, contrast and kind of defect."""
    truth = np.repeat([0.0, 1.0], NUM_QUERIES)
    image, pixel = np.zeros((2, len(families), len(WAYS)))
    scores = np.zeros((len(families), 2 * NUM_QUERIES, len(WAYS)))
    bad: list[
        tuple[float, float, str, NDArray]
    ] = []  # area, contrast, name of a single defect or "", shares by way
    for index, family in enumerate(track(families, "families", console=Console(stderr=True))):
        reference, pairs = draw_pairs(family)
        masks = np.stack([pair.mask for pair in pairs])
        by_way = zip(*(maps_of(inspector, reference, pair) for pair in pairs), strict=True)
        for way, maps in enumerate(map(np.stack, by_way)):
            scores[index, :, way] = top_share(maps)
            image[index, way] = auroc(scores[index, :, way], truth)
            pixel[index, way] = pixel_auroc(maps / maps.max(), masks)
        for pair, score in zip(pairs[NUM_QUERIES:], scores[index, NUM_QUERIES:], strict=True):
            above = (score > scores[index, :NUM_QUERIES]).mean(axis=0)
            name = pair.defects[0].name if len(pair.defects) == 1 else ""
            bad.append((float(pair.mask.mean()), max(d.contrast for d in pair.defects), name, above))
    every, labels = scores.reshape(-1, len(WAYS)), np.tile(truth, len(families))
    return {
        "image_auroc": dict(zip(WAYS, image.mean(axis=0).tolist(), strict=True)),
        "pixel_auroc": dict(zip(WAYS, pixel.mean(axis=0).tolist(), strict=True)),
        "best_accuracy_with_one_threshold": dict(
            zip(WAYS, (best_accuracy(column, labels) for column in every.T), strict=True)
        ),
        "by_area": between(bad, 0, AREAS),
        "by_contrast": between(bad, 1, CONTRASTS),
        "by_defect": {
            name: row([each for each in bad if each[2] == name])
            for name in sorted({b[2] for b in bad} - {""})
        },
    }


def best_accuracy(scores: NDArray, labels: NDArray) -> float:
    """Accuracy with the best single threshold for all families."""
    levels = np.quantile(scores, np.linspace(0.01, 0.99, 99))
    return float(max(((scores > level) == labels).mean() for level in levels))


def between(bad: list[tuple], column: int, edges: tuple[float, ...]) -> dict[str, dict]:
    return {
        f"{low:.1%} to {high:.1%}": row([each for each in bad if low <= each[column] < high])
        for low, high in itertools.pairwise(edges)
    }


def row(parts: list[tuple]) -> dict:
    shares = np.mean([part[3] for part in parts], axis=0).tolist() if parts else [None] * len(WAYS)
    return {"parts": len(parts), **dict(zip(WAYS, shares, strict=True))}


def print_tables(found: dict) -> None:
    console = Console()
    table = Table("", *WAYS, title="one normal sample", box=box.SIMPLE_HEAD)
    for name in ("image_auroc", "pixel_auroc", "best_accuracy_with_one_threshold"):
        table.add_row(name.replace("_", " "), *(f"{found[name][way]:.3f}" for way in WAYS))
    console.print(table)
    for name in ("by_area", "by_contrast", "by_defect"):
        table = Table(name.replace("_", " "), "parts", *WAYS, title="image AUROC", box=box.SIMPLE_HEAD)
        for key, values in found[name].items():
            cells = ("–" if values[way] is None else f"{values[way]:.2f}" for way in WAYS)
            table.add_row(key, str(values["parts"]), *cells)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=NANO, help="bundle folder; by default nano's")
    parser.add_argument("--families", type=int, default=70, help="number of validation families")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with Inspector.open(options.bundle, threads=1) as inspector:
        found = measure(inspector, validation_families(options.families))
    print_tables(found)
    if options.json:
        options.json.write_text(json.dumps({"nano_limits": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How much AUROC do nano's fp16 and int8 encoders cost, compared with float32?

Uses held-out families (with the queries and, as first choice, the normal samples of ``nano_holdout.py``), or with
``--validation`` the validation families, and with ``--data`` folders in MVTec-AD's layout. Every image is encoded once
per precision; memory banks are built as by the inspector, from several choices of normal samples. One choice is not
conclusive: the patches that a bank keeps change single figures by .01 in either direction. The cost of an encoder is
the mean difference over folders and choices; the limit is .003 for each figure.

    python benchmarks/precision_auroc.py [--data FOLDER ...] [--families 70] [--choices 4] [--cache FOLDER]

The three bundles are exported from the checkpoint as by ``agpt export --precision``; ``--cache`` keeps them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from demo_line import processor_name
from nano_holdout import NUM_PARTS, NUM_REFERENCES
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.kernels import preprocess, summarise, upsample
from anomalygpt_edge.models.nano.evaluate import auroc, pixel_auroc
from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.evaluation.datasets import Category, find_categories
from anomalygpt_edge.runtime.evaluation.evaluate import choose_normals, mask_as_seen
from anomalygpt_edge.runtime.synthetic.data import draw, fixed_samples, held_out_families, validation_families
from anomalygpt_edge.runtime.synthetic.products import Family
from anomalygpt_edge.runtime.vision.augment import augment
from anomalygpt_edge.runtime.vision.engines import Engine, open_engine
from anomalygpt_edge.runtime.vision.images import read_image
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank

RESULTS = Path(__file__).parent / "results" / "precision_auroc.json"
CHECKPOINT = Path(__file__).parents[1] / "models" / "nano" / "checkpoint"
PRECISIONS = ("fp32", "fp16", "int8")
LIMIT = 0.003  # largest accepted mean difference
SHOTS = (1, 4)
MEASURES = ("image_auroc", "pixel_auroc")
NUM_MORE = 4  # normal samples of a family in addition to ``nano_holdout``'s
MORE_SEED = 103
# smallest number of normal, good and defective images of a folder; with fewer, one image changes AUROC by over a tenth
MIN_IMAGES = 10
NUM_FARTHEST = 5  # folders named in the results


@dataclass(frozen=True)
class Product:
    """The frames of one family or folder.

    Attributes:
        name: of the family or folder.
        normals: normal samples, uint8 [H, W, 3] BGR each.
        choices: indices of the normal samples of each choice, for the largest number of shots; fewer shots use the
            first ones.
        queries: uint8 [H, W, 3] BGR each.
        defective: bool [Q].
        masks: bool [S, S] of each query, in the encoder's geometry; None for a defective one without a mask.
    """

    name: str
    normals: list[np.ndarray]
    choices: list[list[int]]
    queries: list[np.ndarray]
    defective: np.ndarray
    masks: list[np.ndarray | None]


def family_product(family: Family, number: int, num_choices: int) -> Product:
    references, good, bad = fixed_samples(family, NUM_REFERENCES, NUM_PARTS, NUM_PARTS)
    rng = np.random.default_rng([family.seed, MORE_SEED])
    normals = references + [draw(family, rng, 0) for _ in range(NUM_MORE)]
    choices = [list(range(NUM_REFERENCES))]
    choices += [rng.permutation(len(normals))[:NUM_REFERENCES].tolist() for _ in range(num_choices - 1)]
    return Product(
        f"{family.kind} {number}",
        [sample.pixels for sample in normals],
        choices,
        [sample.pixels for sample in good + bad],
        np.repeat([False, True], NUM_PARTS),
        [sample.mask for sample in good + bad],
    )


def folder_product(category: Category, num_choices: int, size: int) -> Product:
    """A folder's frames; the choices of normal samples are those of ``agpt eval --seed`` 0, 1, …"""
    chosen = [choose_normals(category, max(SHOTS), seed) for seed in range(num_choices)]
    paths = sorted({path for choice in chosen for path in choice})
    queries = [read_image(sample.image) for sample in category.tests]
    return Product(
        category.name,
        [read_image(path) for path in paths],
        [[paths.index(path) for path in choice] for choice in chosen],
        queries,
        np.array([sample.anomalous for sample in category.tests]),
        [
            mask_as_seen(sample, frame.shape[:2], (size, size), "crop")
            for sample, frame in zip(category.tests, queries, strict=True)
        ],
    )


@dataclass(frozen=True)
class Encoder:
    """A bundle's encoder with its preprocessing."""

    bundle: Bundle
    engine: Engine
    threads: int

    @classmethod
    def open(cls, folder: Path, threads: int) -> Encoder:
        bundle = open_bundle(folder)
        component = bundle.manifest.components["encoder"]
        return cls(bundle, open_engine(bundle.folder / component.file, component, threads), threads)

    def close(self) -> None:
        self.engine.close()

    def pixels(self, frame: np.ndarray) -> np.ndarray:
        """uint8 BGR [H, W, 3] → float32 [1, 3, S, S]."""
        settings = self.bundle.manifest.preprocess
        return preprocess(
            frame, settings.size, settings.resize, settings.mean, settings.std, threads=self.threads
        )

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → patch features [1, T, P, V], not normalised."""
        return self.engine.run(pixels=pixels)["patch_features"]

    def measure(self, product: Product) -> np.ndarray:
        """Image AUROC (top 1 %) and pixel AUROC by shots and choice: float64 [shots, choices, 2]."""
        manifest = self.bundle.manifest
        augmented = [
            augment(self.pixels(frame), manifest.augmentation, manifest.vision.grid)
            for frame in product.normals
        ]
        known = [np.concatenate([self.features(pixels) for pixels, _ in each], axis=2) for each in augmented]
        shown = np.concatenate([patches for _, patches in augmented[0]]) if len(augmented[0]) > 1 else None
        asked = np.concatenate([self.features(self.pixels(frame)) for frame in product.queries])

        def figures(choice: list[int]) -> tuple[float, float]:
            chosen = [known[i] for i in choice]
            bank = MemoryBank.from_features(
                chosen, "", shown=shown, distinct=manifest.vision.num_distinct, threads=self.threads
            )
            distances = bank.match(asked, self.threads)[0]
            maps = upsample(distances, manifest.vision.map_size, threads=self.threads)
            scores = np.array([summarise(one).top_mean for one in maps])
            drawn = [index for index, mask in enumerate(product.masks) if mask is not None]
            masks = np.stack([product.masks[index] for index in drawn])  # type: ignore[misc]
            return auroc(scores, product.defective), pixel_auroc(maps[drawn], masks)

        return np.array([[figures(choice[:shots]) for choice in product.choices] for shots in SHOTS])


def measure(products: Iterable[Product], encoders: dict[str, Encoder]) -> dict[str, dict[str, np.ndarray]]:
    """Product → precision → result of ``Encoder.measure``."""
    return {
        product.name: {precision: encoder.measure(product) for precision, encoder in encoders.items()}
        for product in products
    }


def compare(found: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, dict]]]:
    """Precision → shots → measure → difference from fp32.

    ``difference`` is the mean over products and choices, which ``LIMIT`` applies to; ``standard_error`` its standard
    error, from the products' means; ``single`` the standard deviation of one choice of one product; ``farthest`` the
    products with the largest means over the choices.
    """
    figures = {  # [products, shots, choices, 2]
        precision: np.stack([by_precision[precision] for by_precision in found.values()])
        for precision in next(iter(found.values()))
    }
    results: dict[str, dict[str, dict[str, dict]]] = {}
    for precision in figures.keys() - {"fp32"}:
        differences = figures[precision] - figures["fp32"]
        for s, shots in enumerate(SHOTS):
            for m, name in enumerate(MEASURES):
                one = differences[:, s, :, m]
                means = dict(zip(found, one.mean(axis=1).tolist(), strict=True))
                farthest = sorted(means, key=lambda product: -abs(means[product]))[:NUM_FARTHEST]
                results.setdefault(precision, {}).setdefault(str(shots), {})[name] = {
                    "fp32": round(float(figures["fp32"][:, s, :, m].mean()), 4),
                    "difference": round(float(one.mean()), 5),
                    "standard_error": round(float(one.mean(axis=1).std() / np.sqrt(len(one))), 5),
                    "single": round(float(one.std()), 5),
                    "farthest": {product: round(means[product], 5) for product in farthest},
                }
    return dict(sorted(results.items()))


def beyond(results: dict[str, dict[str, dict[str, dict]]]) -> list[str]:
    """Descriptions of the figures whose mean difference is over ``LIMIT`` or NaN."""
    return [
        f"{precision}, {shots} normal samples, {name}: {figure['difference']:+.4f}"
        for precision, by_shots in results.items()
        for shots, figures in by_shots.items()
        for name, figure in figures.items()
        if not abs(figure["difference"]) <= LIMIT
    ]


def export_all(checkpoint: Path, cache: Path) -> dict[str, Path]:
    """Precision → bundle of this checkpoint; bundles in the cache are not exported again."""
    digest = hashlib.sha256()
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    folder = cache / digest.hexdigest()[:12]
    for precision in PRECISIONS:
        if not (folder / precision).is_dir():
            print(f"exporting {precision}", file=sys.stderr, flush=True)
            export_bundle(ExportOptions.of_folder(checkpoint, folder / precision, precision=precision))
    return {precision: folder / precision for precision in PRECISIONS}


def find_products(options: argparse.Namespace, size: int) -> Iterator[tuple[str, Iterator[Product]]]:
    """The groups whose means are compared: name and products of each."""
    kind, list_families = (
        ("validation", validation_families) if options.validation else ("held-out", held_out_families)
    )
    if options.families:
        families = progress(list_families(options.families), f"{kind} families")
        yield (
            f"{kind} families",
            (family_product(family, n, options.choices) for n, family in enumerate(families)),
        )
    categories = []
    for category in (category for folder in options.data for category in find_categories(folder)):
        defective = [sample.anomalous for sample in category.tests]
        fewest = min(defective.count(True), defective.count(False), len(category.normals))
        if fewest >= MIN_IMAGES:
            categories.append(category)
        else:
            print(f"{category.name} is left out: it has only {fewest} normal, good or defective images")
    if categories:
        yield (
            "folders",
            (folder_product(each, options.choices, size) for each in progress(categories, "folders")),
        )


def progress(items: list, what: str) -> Iterable:
    return track(items, what, console=Console(stderr=True), disable=not sys.stderr.isatty())


def run(options: argparse.Namespace, cache: Path) -> dict:
    bundles = export_all(options.checkpoint, cache)
    encoders = {name: Encoder.open(folder, options.threads) for name, folder in bundles.items()}
    try:
        size = encoders["fp32"].bundle.manifest.preprocess.size
        groups = {}
        for name, products in find_products(options, size):
            found = measure(products, encoders)
            groups[name] = {"products": len(found), "precisions": compare(found)}
            print_table(name, groups[name])
    finally:
        for encoder in encoders.values():
            encoder.close()
    return {
        "command": shlex.join(["python", "benchmarks/precision_auroc.py", *map(plain, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "processor": processor_name(),
        "packages": {name: version(name) for name in ("numpy", "onnxruntime")},
        "encoders": {name: encoder.bundle.encoder_sha256 for name, encoder in encoders.items()},
        "choices": options.choices,
        "limit": LIMIT,
        "groups": groups,
    }


def plain(argument: str) -> str:
    """The last part of a path, so that results do not contain folders of this machine; other arguments unchanged."""
    return Path(argument).name if "/" in argument else argument


def print_table(name: str, group: dict) -> None:
    table = Table(title=f"{group['products']} {name}, against fp32", box=box.SIMPLE_HEAD)
    for column in ("", "shots", "measure", "fp32", "difference", "± s.e.", "of one choice, s.d.", "farthest"):
        table.add_column(column, justify="left" if column in ("", "measure", "farthest") else "right")
    for precision, by_shots in group["precisions"].items():
        for shots, figures in by_shots.items():
            for measure, figure in figures.items():
                table.add_row(
                    precision, shots, measure, f"{figure['fp32']:.4f}", f"{figure['difference']:+.4f}",
                    f"{figure['standard_error']:.4f}", f"{figure['single']:.4f}",
                    ", ".join(f"{product} {value:+.4f}" for product, value in list(figure["farthest"].items())[:3]),
                )  # fmt: skip
    Console(width=160).print(table)
    for line in beyond(group["precisions"]):
        print(f"beyond {LIMIT}: {line}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument(
        "--cache", type=Path, help="folder for the exported bundles; by default a temporary one"
    )
    parser.add_argument(
        "--families", type=int, default=len(held_out_families()), help="number of families; 0: none"
    )
    parser.add_argument(
        "--validation", action="store_true", help="use the validation families instead of the held-out ones"
    )
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders in MVTec-AD's layout")
    parser.add_argument("--choices", type=int, default=4, help="choices of normal samples per product")
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the results")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            results = run(options, options.cache or Path(temporary))
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()

"""``agpt eval``: figures of merit of a bundle on labelled images, with the same inspector as on a line."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...kernels import Window, resize_window
from ..bundles.bundle import MANIFEST_FILE, digest_file
from ..common.errors import ConfigError, ImageError
from ..common.files import write_whole
from ..inspection.inspector import Inspector
from ..inspection.verdict import Status, Verdict
from ..vision.engines import AUTO
from ..vision.images import read_image
from ..vision.memory_bank import MemoryBank
from ..vision.views import WHOLE, Layout, Tiles, describe_tiles
from .datasets import Category, Sample, find_categories
from .metrics import accuracy, auroc, mean

MAX_SHOTS = 1000
MAX_FRAME_SIDE = 512  # longer side in pixels of the map that frames of several views are scored with


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one category at one number of shots; None if undefined (no good image, no mask)."""

    image_auroc_max: float | None  # image score = the map's maximum, as in the original
    image_auroc_top1: float | None  # image score = mean of the map's highest 1 %
    pixel_auroc: float | None
    accuracy: float | None  # of the verdicts; NO_RESULT counts as wrong
    num_good: int
    num_anomalous: int
    num_without_mask: int  # anomalous images left out of pixel_auroc
    num_no_result: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Figures by category name and number of shots, and their means over the categories."""

    bundle: str
    bundle_sha256: str
    folder: str
    shots: list[int]
    seed: int
    tiles: Tiles | None = None
    seconds: float
    categories: dict[str, dict[str, Figures]]
    mean: dict[str, dict[str, float | None]]


MEASURES = ("image_auroc_max", "image_auroc_top1", "pixel_auroc", "accuracy")


def parse_shots(text: str) -> list[int]:
    """Parse ``--shots``: "0,1,4" → [0, 1, 4].

    Raises:
        ConfigError: the text is not a list of whole numbers from 0 to 1000.
    """
    try:
        shots = [int(part) for part in text.split(",")]
    except ValueError:
        shots = [-1]
    if min(shots) < 0 or max(shots) > MAX_SHOTS:
        raise ConfigError(f"--shots {text!r} is not a list like 0,1,2,4 (0 to {MAX_SHOTS})")
    return sorted(set(shots))


def evaluate_folder(
    bundle: Path | None,
    folder: Path,
    shots: list[int],
    class_name: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    engine: str = AUTO,
    tiles: Tiles | None = None,
) -> Evaluation:
    """Evaluate every category in a folder.

    Args:
        bundle: the folder; the bundle that ships with the package when None.
        folder: one category or several, in the layout of MVTec-AD or VisA.
        shots: numbers of normal samples; 0 is zero-shot.
        class_name: the class of all categories; derived from each category's name when None.
        seed: seed of the choice of normal samples; those for k shots are also among those for more shots.
        threads, engine: as in ``Inspector.open``.
        tiles: inspect tiles; maps and masks are then compared over the whole frame instead of the centre crop.

    Raises:
        AgptError: the bundle, the folder or the class name cannot be used.
    """
    started = time.monotonic()
    categories = find_categories(folder)
    with Inspector.open(bundle, class_name=class_name, threads=threads, engine=engine) as inspector:
        found = {}
        progress = Progress(console=Console(stderr=True), transient=True)
        with inspector.vision.encoder_cache(), progress:
            for category in categories:
                steps = progress.track(category.tests, description=category.name)
                found[category.name] = evaluate_category(
                    inspector, category, shots, class_name, seed, steps, Layout(tiles=tiles)
                )
        return Evaluation(
            bundle=inspector.bundle.manifest.name,
            bundle_sha256=digest_file(inspector.bundle.folder / MANIFEST_FILE).sha256,
            folder=folder.resolve().name,
            shots=shots,
            seed=seed,
            tiles=tiles,
            seconds=round(time.monotonic() - started, 1),
            categories=found,
            mean=_means(found),
        )


def evaluate_category(
    inspector: Inspector,
    category: Category,
    shots: list[int],
    class_name: str | None,
    seed: int,
    samples: Iterable[Sample] | None = None,
    layout: Layout = WHOLE,
) -> dict[str, Figures]:
    """Figures by number of shots, without those numbers that exceed the category's normal samples.

    Args:
        inspector: the inspector; its product changes.
        category: the category.
        shots: numbers of normal samples; 0 is zero-shot.
        class_name: the class; derived from the category's name when None.
        seed: seed of the choice of normal samples.
        samples: the test samples; the category's when None.
        layout: the views of a frame.
    """
    manifest = inspector.bundle.manifest
    class_name = class_name or class_of(category.name, manifest.classes) or manifest.default_class
    zero_shot = inspector.prepare(class_name=class_name)
    if not layout.is_whole:
        zero_shot = replace(zero_shot, layout=layout, resize="stretch")
    inspector.use(zero_shot)
    banks = _banks(inspector, category, shots, seed)
    scores = {k: Scores() for k in shots if k == 0 or k in banks}
    for sample in category.tests if samples is None else samples:
        try:
            frame = read_image(sample.image)
        except ImageError:
            for kept in scores.values():
                kept.miss(sample)
            continue
        if layout.is_whole:
            size = manifest.vision.map_size, manifest.vision.map_size
        else:
            size = frame_map_size(frame.shape[:2])
        mask = mask_as_seen(sample, frame.shape[:2], size, zero_shot.resize)
        for k, kept in scores.items():
            inspector.use(replace(zero_shot, bank=banks.get(k)))
            kept.add(sample, inspector.inspect(frame), mask)
    return {str(k): kept.figures() for k, kept in scores.items()}


def class_of(category: str, classes: list[str]) -> str | None:
    """The class of a category by its name: "metal_nut" is "metal nut", "pcb3" is "pcb"; None if there is none."""
    plain = re.sub(r"\d+$", "", category.lower().replace("_", " ")).strip()
    return plain if plain in classes else None


class Scores:
    """Collects the results of one category's images at one number of shots."""

    def __init__(self) -> None:
        self.labels: list[bool] = []
        self.peaks: list[float] = []
        self.tops: list[float] = []
        self.judged: list[tuple[bool, bool]] = []  # (anomalous, verdict is right)
        self.maps: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.num_without_mask = 0
        self.num_no_result = 0

    def miss(self, sample: Sample) -> None:
        """Count an image that cannot be read: NO_RESULT, a wrong verdict, no score."""
        self.num_no_result += 1
        self.judged.append((sample.anomalous, False))

    def add(self, sample: Sample, verdict: Verdict, mask: np.ndarray | None) -> None:
        """Add a verdict; ``mask`` is bool [h, w] at the map's size, or None if an anomalous image has none."""
        right = Status.FAIL if sample.anomalous else Status.PASS
        self.judged.append((sample.anomalous, verdict.status == right))
        self.num_no_result += verdict.status == Status.NO_RESULT
        if verdict.anomaly_map is None or verdict.peak is None or verdict.score is None:
            return
        self.labels.append(sample.anomalous)
        self.peaks.append(verdict.peak)
        self.tops.append(verdict.score)
        if mask is None:
            self.num_without_mask += 1
        else:
            whole = verdict.map_in_frame(size=mask.shape) if verdict.views else verdict.anomaly_map
            self.maps.append(whole.ravel())
            self.masks.append(mask.ravel())

    def figures(self) -> Figures:
        """The figures of all images added so far."""
        anomalous = [label for label, _ in self.judged]
        return Figures(
            image_auroc_max=auroc(self.labels, self.peaks),
            image_auroc_top1=auroc(self.labels, self.tops),
            pixel_auroc=auroc(np.concatenate(self.masks), np.concatenate(self.maps)) if self.maps else None,
            accuracy=accuracy([True] * len(self.judged), [right for _, right in self.judged]),
            num_good=anomalous.count(False),
            num_anomalous=anomalous.count(True),
            num_without_mask=self.num_without_mask,
            num_no_result=self.num_no_result,
        )


def _banks(inspector: Inspector, category: Category, shots: list[int], seed: int) -> dict[int, MemoryBank]:
    """Memory banks by number of shots; each contains the first samples of the same random order."""
    possible = [k for k in shots if 0 < k <= len(category.normals)]
    if not possible:
        return {}
    normals = [read_image(path) for path in choose_normals(category, max(possible), seed)]
    return {k: inspector.make_bank(normals[:k]) for k in possible}


def choose_normals(category: Category, count: int, seed: int) -> list[Path]:
    """The first ``count`` normal images of a random order, so that larger choices contain smaller ones."""
    order = np.random.default_rng(seed).permutation(len(category.normals))
    return [category.normals[index] for index in order[:count]]


def mask_as_seen(
    sample: Sample, frame_size: tuple[int, int], size: tuple[int, int], resize: Literal["crop", "stretch"]
) -> np.ndarray | None:
    """The ground truth in the map's geometry: resized like the frame, but with the nearest neighbour.

    Args:
        sample: the sample.
        frame_size: (height, width) of its image.
        size: (height, width) of the map.
        resize: how the frame was fitted to the map.

    Returns:
        bool [h, w] of ``size``; None for an anomalous image without a mask.

    Raises:
        ImageError, ConfigError: the mask cannot be read, or its size differs from the image's.
    """
    if sample.mask is None:
        return None if sample.anomalous else np.zeros(size, bool)
    mask = read_image(sample.mask).max(axis=2)
    if mask.shape != tuple(frame_size):
        raise ConfigError(
            f"{sample.mask} is {mask.shape}, but its image is {tuple(frame_size)}: give masks of the images' size"
        )
    height, width = size
    window = resize_window(*frame_size, height, "crop") if resize == "crop" else Window(height, width, 0, 0)
    # INTER_NEAREST_EXACT takes the pixel with the nearest centre, like Pillow; INTER_NEAREST is half a pixel off.
    fitted = cv2.resize(mask, (window.width, window.height), interpolation=cv2.INTER_NEAREST_EXACT)
    return fitted[window.top : window.top + height, window.left : window.left + width] > 0


def frame_map_size(frame_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the map that a whole frame is scored with: the frame's shape, at most 512 pixels long."""
    scale = min(1, MAX_FRAME_SIDE / max(frame_size))
    return max(1, round(scale * frame_size[0])), max(1, round(scale * frame_size[1]))


def _means(found: dict[str, dict[str, Figures]]) -> dict[str, dict[str, float | None]]:
    """Mean of each measure by number of shots, over the categories for which it is defined."""
    shots = dict.fromkeys(k for figures in found.values() for k in figures)
    return {
        k: {
            name: mean([getattr(figures[k], name) for figures in found.values() if k in figures])
            for name in MEASURES
        }
        for k in shots
    }


def print_table(results: Evaluation, console: Console | None = None) -> None:
    """Print a table with one row per category and number of shots, then the means."""
    title = f"{results.bundle} on {results.folder}, seed {results.seed}"
    if results.tiles:
        title += f", tiles {describe_tiles(results.tiles)}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("category")
    for name in ("shots", "image AUROC max", "image AUROC top 1 %", "pixel AUROC", "accuracy", "images"):
        table.add_column(name, justify="right")
    for category, by_shots in results.categories.items():
        for k, figures in by_shots.items():
            counts = f"{figures.num_good} + {figures.num_anomalous}"
            table.add_row(category, k, *(_cell(getattr(figures, name)) for name in MEASURES), counts)
        table.add_section()
    for k, means in results.mean.items() if len(results.categories) > 1 else ():
        table.add_row("mean", k, *(_cell(means[name]) for name in MEASURES), style="bold")
    console = console or Console()
    console.print(table)
    for remark in _remarks(results):
        console.print(remark)


def _remarks(results: Evaluation) -> list[str]:
    """Sentences about images and shots that the figures leave out."""
    remarks = []
    for name, by_shots in results.categories.items():
        if absent := [str(k) for k in results.shots if str(k) not in by_shots]:
            remarks.append(f"{name}: too few normal images for {', '.join(absent)} shots")
        if unmasked := max((f.num_without_mask for f in by_shots.values()), default=0):
            remarks.append(f"{name}: {unmasked} anomalous images have no mask and are not in the pixel AUROC")
        if failed := max((f.num_no_result for f in by_shots.values()), default=0):
            remarks.append(f"{name}: {failed} images gave NO_RESULT, which counts as wrong")
    return remarks


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def write_json(results: Evaluation, path: Path) -> None:
    """Write the evaluation as JSON; its folder is created if necessary.

    Raises:
        AgptError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")

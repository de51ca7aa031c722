"""Building a memory bank from normal frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..bundles.bundle import Augmentation, Manifest, Vision
from ..common.errors import RecipeError
from .augment import NUM_IMAGES, augment, check_augmentation, vary
from .frame_check import FrameCheck, learn_frame_check, statistics
from .memory_bank import MemoryBank, Storage
from .pipeline import ViewSettings, VisionPipeline
from .variation import measure_variation
from .views import Layout

# The most patches to choose a bank's rows from: twelve samples of 256 patches with their moved versions. Choosing from
# more takes minutes, and many samples need no augmentation.
MAX_CANDIDATES = 12 * 1024
MAX_CHECKED = 8  # normal samples that are matched with the others for the frame check
MAX_VARIED_VIEWS = 4  # views of a frame whose augmented versions are encoded for the frame check


def build_bank(
    vision: VisionPipeline,
    normals: Sequence[np.ndarray],
    settings: ViewSettings,
    storage: Storage = "float32",
    max_patches: int | None = None,
    augmentation: Augmentation | None = None,
    *,
    track: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> MemoryBank:
    """Build the memory bank of normal frames.

    Args:
        vision: its encoder computes the features.
        normals: the frames, uint8 [H, W, 3] BGR each.
        settings: the views of the product's frames.
        storage, max_patches: see ``MemoryBank.from_features``.
        augmentation: see ``augment``; None: ``default_augmentation``.
        track: wraps the frames, to show progress.

    Raises:
        ImageError: something is not a frame, or its size differs from that of the product's regions or tiles.
        RecipeError: there is no frame, a feature is not finite, or the storage is unknown.
        ConfigError: the augmentation is unknown.
    """
    if not normals:
        raise RecipeError("there are no normal images: give at least one")
    manifest, layout = vision.bundle.manifest, settings.layout
    if augmentation is None:
        augmentation = default_augmentation(manifest, layout, len(normals))
    check_augmentation(augmentation)
    geometry = manifest.vision
    augmented, overlapping = NUM_IMAGES[augmentation] > 1, geometry.shifts > 1
    thinned = overlapping and not are_few(manifest, layout, len(normals))
    kept = distinct_patches(geometry) if thinned else slice(None)
    samples, plain = [], []
    first: np.ndarray | None = None
    for frame in track(normals):
        pixels = vision.preprocess(frame, vision.views(frame, settings), settings)
        versions = augment(pixels, augmentation, geometry.grid)
        features = [vision.encode(version).patch_features for version, _ in versions]
        samples.append(np.concatenate([each[:, :, kept] for each in features], axis=2))
        plain.append(features[0])
        first = pixels if first is None else first
    shown = np.concatenate([patches[kept] for _, patches in versions]) if augmented or thinned else None
    assert first is not None
    spec = manifest.preprocess
    measured = measure_variation(
        plain,
        (vision.encode(each).patch_features for each in vary(first, spec.mean, spec.std)),  # made if needed
        geometry.tap_weights,
        geometry.map_size,
        per_view=bool(layout.regions),
        threads=vision.threads,
    )
    return MemoryBank.from_features(
        samples,
        vision.bundle.encoder_sha256,
        storage,
        max_patches,
        per_view=bool(layout.regions),
        shown=shown,
        distinct=geometry.num_distinct if augmented or overlapping else None,
        measured=measured,
        weights=geometry.tap_weights,
        threads=vision.threads,
    )


def learn_check(
    vision: VisionPipeline, normals: Sequence[np.ndarray], settings: ViewSettings, bank: MemoryBank
) -> FrameCheck:
    """Learn the frame check of a product: each normal sample is matched with the rows of the others.

    Augmented versions of the first sample count as well, where a frame has few views: samples that were taken at the
    same moment differ less than the same part under drifting light.

    Args:
        vision: its encoder computes the features.
        normals: the frames of the bank, uint8 [H, W, 3] BGR each, in its order.
        settings: the views of the product's frames.
        bank: their memory bank.
    """
    spec = vision.bundle.manifest.preprocess
    chosen = np.unique(np.linspace(0, len(normals) - 1, MAX_CHECKED).round().astype(int)).tolist()
    different = 1 if bank.variation is None else bank.variation.num_samples
    found, versions = [], []
    for index in chosen:
        pixels = vision.preprocess(normals[index], vision.views(normals[index], settings), settings)
        if different > 1:
            others = bank.without_sample(index)
            features = vision.encode(pixels).patch_features
            found.append(statistics(*others.match(features, vision.threads)[:2]))
        if index == 0 and (different == 1 or len(pixels) <= MAX_VARIED_VIEWS):
            for varied in vary(pixels, spec.mean, spec.std):
                distance, nearest, _ = bank.match(vision.encode(varied).patch_features, vision.threads)
                versions.append(statistics(distance, nearest))
    return learn_frame_check(normals, found or versions, versions, different)


def default_augmentation(manifest: Manifest, layout: Layout, num_samples: int) -> Augmentation:
    """The bundle's default augmentation for few samples (``are_few``), "none" for many."""
    return manifest.augmentation if are_few(manifest, layout, num_samples) else "none"


def are_few(manifest: Manifest, layout: Layout, num_samples: int) -> bool:
    """Whether ``num_samples`` samples have at most ``MAX_CANDIDATES`` augmented and overlapping patches."""
    num_views = 1 if layout.regions else layout.num_views
    patches = NUM_IMAGES[manifest.augmentation] * num_samples * num_views * manifest.vision.grid**2
    return patches <= MAX_CANDIDATES


def distinct_patches(geometry: Vision) -> np.ndarray:
    """Indices of a view's patches in a grid without overlap, int [num_distinct]."""
    patches = np.arange(geometry.grid**2).reshape(geometry.grid, geometry.grid)
    return patches[:: geometry.shifts, :: geometry.shifts].ravel()

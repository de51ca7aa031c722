"""Labelled sets to judge the encoder on, encoded once: folders of real images, and generated families.

Real images are read to evaluate and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from ...kernels import preprocess
from ...runtime.evaluation.datasets import Category, Sample
from ...runtime.evaluation.evaluate import mask_as_seen
from ...runtime.synthetic.data import draw, num_defects
from ...runtime.synthetic.products import Family
from ...runtime.vision.images import read_image
from .features import Extractor, Features, save_whole, tap_name
from .groups import COARSE_SIZE, fit

DRAWS = 3  # of the normal images
MOST_NORMALS = 12
MOST_TESTS = 30  # good ones, and as many defective ones
NUM_AUGMENTED = 2  # normals of each draw that augmented versions are made of


@dataclass
class LabelledSet:
    """One product, encoded.

    Attributes:
        normals: features of every normal image that a draw uses, [N, …].
        draws: int [DRAWS, 12 or fewer], rows of ``normals``.
        augmented: features of the versions of the normals in ``augmented_of``, [M, …].
        augmented_of: int [M], rows of ``normals``.
        queries: features of the test images, [Q, …].
        defective: bool [Q].
        masks: bool [Q, S, S].
    """

    name: str
    normals: Features
    draws: NDArray[np.int64]
    augmented: Features
    augmented_of: NDArray[np.int64]
    queries: Features
    defective: NDArray[np.bool_]
    masks: NDArray[np.bool_]

    @property
    def num_normals(self) -> int:
        return len(next(iter(self.normals.values())))


def augment(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the same good part may look like a moment later: moved, turned, brighter, darker, softer, noisier, scaled.

    Args:
        image: BGR [S, S, 3].

    Returns:
        [8, S, S, 3], the same versions for every product.
    """
    size = image.shape[0]

    def moved(angle: float = 0.0, scale: float = 1.0, x: float = 0.0, y: float = 0.0) -> NDArray[np.uint8]:
        matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, scale)
        matrix[:, 2] += (x * size, y * size)
        turned = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(turned, np.uint8)

    def lit(gain: float, source: NDArray[np.uint8] = image) -> NDArray[np.uint8]:
        return np.clip(np.rint(source.astype(np.float32) * gain), 0, 255).astype(np.uint8)

    soft = np.asarray(cv2.GaussianBlur(image, (0, 0), 1.0), np.uint8)
    noise = default_rng(0).normal(0, 4, (size, size, 1))
    noisy = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return np.stack(
        [
            moved(x=0.015, y=0.01),
            moved(x=-0.01, y=-0.02),
            lit(1.1, moved(angle=3)),
            lit(0.9, moved(angle=-3)),
            moved(angle=1, scale=1.03),
            moved(angle=-1, scale=0.97),
            soft,
            noisy,
        ]
    )


def encode_category(category: Category, extractor: Extractor, path: Path) -> None:
    """Encode a folder's draws of normal images and up to 30 good and 30 defective test images into ``path``."""
    size = extractor.size
    orders = [default_rng([5, d]).permutation(len(category.normals))[:MOST_NORMALS] for d in range(DRAWS)]
    used = np.unique(np.concatenate(orders))
    draws = np.stack([np.searchsorted(used, order) for order in orders])
    good = _spread([sample for sample in category.tests if not sample.anomalous])
    bad = _spread([sample for sample in category.tests if sample.anomalous])
    normals = np.stack([_seen(category.normals[i], size) for i in used])
    queries = np.stack([_seen(sample.image, size) for sample in good + bad])
    masks = np.stack([_mask(sample, size) for sample in good + bad])
    _encode(normals, draws, queries, np.repeat([False, True], [len(good), len(bad)]), masks, extractor, path)


def encode_family(family: Family, extractor: Extractor, path: Path, coarse: bool, num_queries: int = 5) -> None:
    """The same of a generated product: 16 normals, as many good as defective queries, drawn at 224 pixels or whole."""
    size = extractor.size
    side = (COARSE_SIZE, COARSE_SIZE) if coarse else (size, size)
    rng = default_rng([family.seed, 98])
    count = MOST_NORMALS + 4
    pixels, masks = fit(
        [draw(family, rng, 0, side) for _ in range(count + num_queries)]
        + [draw(family, rng, num_defects(rng), side) for _ in range(num_queries)],
        size,
    )
    draws = np.stack([default_rng([5, d]).permutation(count)[:MOST_NORMALS] for d in range(DRAWS)])
    defective = np.repeat([False, True], num_queries)
    _encode(pixels[:count], draws, pixels[count:], defective, masks[count:], extractor, path)


def _encode(
    normals: NDArray[np.uint8],
    draws: NDArray[np.int64],
    queries: NDArray[np.uint8],
    defective: NDArray[np.bool_],
    masks: NDArray[np.bool_],
    extractor: Extractor,
    path: Path,
) -> None:
    first = np.unique(draws[:, :NUM_AUGMENTED])
    versions = np.concatenate([augment(normals[i]) for i in first])
    groups = {"normals": normals, "augmented": versions, "queries": queries}
    features = {f"{name}_{tap}": f for name, part in groups.items() for tap, f in extractor(part).items()}
    save_whole(
        path,
        draws=draws,
        augmented_of=np.repeat(first, len(versions) // len(first)),
        defective=defective,
        masks=np.packbits(masks, axis=-1),
        **features,
    )


def load_set(path: Path, taps: tuple[int, ...]) -> LabelledSet:
    """A set that was encoded before, with these taps."""
    with np.load(path, allow_pickle=False) as file:
        normals, augmented, queries = (
            {tap_name(block): file[f"{group}_{tap_name(block)}"] for block in taps}
            for group in ("normals", "augmented", "queries")
        )
        masks = np.unpackbits(file["masks"], axis=-1).astype(bool)
        return LabelledSet(
            path.stem,
            normals,
            file["draws"],
            augmented,
            file["augmented_of"],
            queries,
            file["defective"],
            masks,
        )


def _spread(samples: list[Sample]) -> list[Sample]:
    """At most ``MOST_TESTS`` of them, evenly spaced."""
    if len(samples) <= MOST_TESTS:
        return samples
    return [samples[i] for i in np.linspace(0, len(samples) - 1, MOST_TESTS).round().astype(int)]


def _seen(image: Path, size: int) -> NDArray[np.uint8]:
    """The centre crop as the runtime cuts it, BGR [S, S, 3]."""
    planes = preprocess(read_image(image), size, "crop", (0.0,) * 3, (1.0,) * 3)[0]
    return np.rint(np.moveaxis(planes, 0, -1)[..., ::-1] * 255).astype(np.uint8)


def _mask(sample: Sample, size: int) -> NDArray[np.bool_]:
    if not sample.anomalous:
        return np.zeros((size, size), bool)
    frame = read_image(sample.image)
    mask = mask_as_seen(sample, frame.shape[:2], (size, size), "crop")
    if mask is None:
        raise ValueError(f"{sample.image} has no mask")
    return mask

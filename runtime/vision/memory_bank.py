"""The memory bank: patch features of a product's normal samples, with which its frames are compared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta

from ...kernels import Bank, coreset, match, nearest_row, normalise, prepare_bank
from ..bundles.bundle import Bundle, Sha256, digest_file
from ..common.errors import RecipeError
from ..common.files import write_whole
from .subsample import cover
from .views import WHOLE, Layout

Storage = Literal["float32", "float16", "int8"]


class MemoryBankRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe's reference to its memory bank: the file beside the recipe, its digest, and the encoder's digest."""

    file: Annotated[str, Meta(pattern=r"^[^/\\\x00]{1,200}$")]
    sha256: Sha256
    num_samples: Annotated[int, Meta(ge=1)]
    encoder_sha256: Sha256

    def __post_init__(self) -> None:
        if self.file in (".", ".."):
            raise ValueError(f"{self.file!r} is not a file name")


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """The patch features of a product's normal samples.

    Attributes:
        features: float32, float16 or int8 [M, T, N, V], of unit length (int8 features after multiplication with
            ``scales``). M is the number of regions, each compared with its own patches, or 1 if all views share them.
        num_samples: number of normal images ("shots").
        encoder_sha256: digest of the encoder that computed the features.
        scales: float32 [M, T, N], the scales of int8 features; None: all 1.
        origins: int32 [M, T, N], the patch of the samples that each row shows. Patches are numbered over all samples,
            the views of each sample that share this bank, and the patches of each view. None: row n shows patch n.
    """

    features: np.ndarray
    num_samples: int
    encoder_sha256: str
    scales: np.ndarray | None = None
    origins: np.ndarray | None = None

    @cached_property
    def prepared(self) -> tuple[Bank, ...]:
        """The M banks in the form that ``kernels.match`` takes."""
        scales = np.ones(self.features.shape[:3], np.float32) if self.scales is None else self.scales
        return tuple(map(Bank, np.ascontiguousarray(self.features), scales))

    def match(self, patch_features: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Match each view of a frame with its bank, see ``kernels.match``.

        Args:
            patch_features: float32 [views, T, P, V], raw taps.
            threads: the most CPU threads to use.

        Returns:
            Distances, float32 [views, P], and the index of the nearest row in each tap, int32 [views, T, P].

        Raises:
            ValueError: the bank is for another number of regions.
        """
        banks = self.prepared
        if len(banks) == 1:
            return match(patch_features, banks[0], indices=True, threads=threads)
        pairs = zip(patch_features[:, None], banks, strict=True)
        found = [match(view, bank, indices=True, threads=threads) for view, bank in pairs]
        distances, nearest = zip(*found, strict=True)
        return np.concatenate(distances), np.concatenate(nearest)

    def nearest_normal(self, view: int, nearest: np.ndarray) -> int:
        """Number of the normal patch, as in ``origins``, that is nearest to a patch of a view.

        Args:
            view: index of the view.
            nearest: int32 [T], the index of the row nearest to the patch in each tap.
        """
        if self.origins is not None:
            nearest = self.origins[view if len(self.features) > 1 else 0, np.arange(len(nearest)), nearest]
        return nearest_row(nearest)

    @classmethod
    def from_features(
        cls,
        samples: Sequence[np.ndarray],
        encoder_sha256: str,
        storage: Storage = "float32",
        max_patches: int | None = None,
        *,
        per_view: bool = False,
        shown: np.ndarray | None = None,
        distinct: int | None = None,
        threads: int = 1,
    ) -> MemoryBank:
        """Make the bank of several normal images.

        Args:
            samples: the raw taps of each image, float32 [views, T, P, V].
            encoder_sha256: digest of the encoder that computed them.
            storage: float16 halves a bank's memory; int8 quarters it and is matched three times as fast.
            max_patches: the most patches to keep of each tap; those that cover the others best are chosen, by a
                greedy coreset, or by ``subsample.cover`` if ``distinct`` is given.
            per_view: compare each view with its own patches only (regions), instead of with those of all views.
            shown: int32 [P], the patch of the view that each of the P shows; None: patch p shows patch p. Needed for
                augmented samples and for a part of the patches.
            distinct: number of patches of a view without augmentation and overlap; None: all P. The bank then keeps
                this many patches per view and sample, or ``max_patches`` if that is less.
            threads: the most CPU threads to choose the greedy coreset.

        Raises:
            RecipeError: there is no image, a feature is not finite, or the storage or limit is invalid.
        """
        if len(samples) == 0:
            raise RecipeError("a memory bank needs at least one normal image: give one or more")
        if storage not in get_args(Storage):
            raise RecipeError(f"a memory bank is stored as float32, float16 or int8, not {storage!r}")
        if max_patches is not None and max_patches < 1:
            raise RecipeError(f"a memory bank needs at least one patch, not {max_patches}")
        if not all(np.isfinite(sample).all() for sample in samples):
            raise RecipeError("the features of a normal image are not finite: leave the image out")
        # [M, images, T, P, V]
        groups = np.stack(samples, axis=1) if per_view else np.concatenate(samples)[None]
        num_banks, _, taps, _, width = groups.shape
        rows = normalise(groups.swapaxes(1, 2).reshape(num_banks, taps, -1, width))
        origins = None
        if distinct is not None:
            max_patches = min(max_patches or rows.shape[2], groups.shape[1] * distinct)
        if max_patches is not None and max_patches < rows.shape[2]:
            if distinct is None:
                origins = np.sort([coreset(bank, max_patches, threads=threads) for bank in rows], axis=2)
            else:
                origins = np.stack([cover(bank, max_patches) for bank in rows])
            rows = np.take_along_axis(rows, origins[..., None], axis=2)
        if shown is not None:
            if origins is None:
                origins = np.broadcast_to(np.arange(rows.shape[2], dtype=np.int32), rows.shape[:3])
            image, patch = np.divmod(origins, len(shown))
            origins = (image * (int(shown.max()) + 1) + shown[patch]).astype(np.int32)
        banks = [prepare_bank(bank, storage) for bank in rows]
        scales = np.stack([bank.scales for bank in banks]) if storage == "int8" else None
        return cls(np.stack([bank.rows for bank in banks]), len(samples), encoder_sha256, scales, origins)

    def save(self, path: Path) -> MemoryBankRecord:
        """Write the bank as npz and return the recipe's reference to it."""
        arrays = {"features": self.features, "scales": self.scales, "origins": self.origins}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
        write_whole(path, buffer.getvalue())
        return MemoryBankRecord(path.name, digest_file(path).sha256, self.num_samples, self.encoder_sha256)


def load_bank(record: MemoryBankRecord, folder: Path, bundle: Bundle, layout: Layout = WHOLE) -> MemoryBank:
    """Load a recipe's memory bank.

    Args:
        record: the recipe's reference to the bank.
        folder: the recipe's folder.
        bundle: the bundle that it is used with.
        layout: the recipe's layout.

    Raises:
        RecipeError: the file is missing or altered, it was made with another encoder, or its arrays do not fit the
            encoder and the layout.
    """
    path = folder / record.file
    again = "run agpt enroll again"
    if record.encoder_sha256 != bundle.encoder_sha256:
        raise RecipeError(f"{path} was made with another encoder than this bundle's: {again}")
    if not path.is_file():
        raise RecipeError(f"the recipe's memory bank {path} is missing: copy it beside the recipe or {again}")
    if digest_file(path).sha256 != record.sha256:
        raise RecipeError(f"{path} was altered: copy it again or {again}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, scales, origins = (arrays.get(name) for name in ("features", "scales", "origins"))
        if features is None:
            raise ValueError("it holds no features")
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path} is not a memory bank: {again}") from error
    if features.ndim == 3:  # written by a version without regions and tiles
        features, scales, origins = (
            array if array is None else array[None] for array in (features, scales, origins)
        )
    vision = bundle.manifest.vision
    num_banks = max(1, len(layout.regions))
    patches = record.num_samples * vision.grid**2 * (layout.num_views // num_banks)
    taps, width = len(vision.tap_layers), vision.width
    rows = features.shape[2] if features.ndim == 4 else 0
    fits = (
        features.shape == (num_banks, taps, rows, width)
        and 1 <= rows <= patches
        and str(features.dtype) in get_args(Storage)
    )
    if not fits or not np.isfinite(features).all():
        raise RecipeError(
            f"{path} is {features.dtype} {features.shape}, not finite float32 {(num_banks, taps, patches, width)} "
            f"(or float16, int8, fewer patches): {again}"
        )
    if (scales is None) == (features.dtype == np.int8) or (
        scales is not None
        and (
            scales.shape != features.shape[:3] or scales.dtype != np.float32 or not np.isfinite(scales).all()
        )
    ):
        raise RecipeError(f"{path} has scales that do not fit its features: {again}")
    if (origins is None and rows != patches) or (
        origins is not None
        and (
            origins.shape != features.shape[:3]
            or origins.dtype != np.int32
            or not (origins.min() >= 0 and origins.max() < patches)
        )
    ):
        raise RecipeError(f"{path} has no valid patch numbers (origins): {again}")
    return MemoryBank(features, record.num_samples, record.encoder_sha256, scales, origins)

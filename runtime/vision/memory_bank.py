"""The memory bank: patch features of a product's normal samples, with which its frames are compared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta

from ...kernels import Bank, coreset, match, match_scaled, nearest_row, normalise, prepare_bank
from ..bundles.bundle import Bundle, Sha256, digest_file
from ..common.errors import RecipeError
from ..common.files import write_whole
from .subsample import cover
from .variation import Measured, Variation, tap_shares
from .views import WHOLE, Layout

Storage = Literal["float32", "float16", "int8"]


class MemoryBankRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A recipe's reference to its memory bank: the file beside the recipe, its digest, the encoder's digest, and the
    variation of the normal samples."""

    file: Annotated[str, Meta(pattern=r"^[^/\\\x00]{1,200}$")]
    sha256: Sha256
    num_samples: Annotated[int, Meta(ge=1)]
    encoder_sha256: Sha256
    variation: Variation | None = None

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
        units: float32 [M, T, N], the unit of each row, see ``variation``; None: maps have no units.
        variation: levels, spread and limit of the normal samples' scores; None without ``units``.
        weights: of the taps in maps in units of normal variation; empty: equal.
        patches_per_sample: number of patches of each normal sample, by which they are numbered; 0 in a loaded bank.
    """

    features: np.ndarray
    num_samples: int
    encoder_sha256: str
    scales: np.ndarray | None = None
    origins: np.ndarray | None = None
    units: np.ndarray | None = None
    variation: Variation | None = None
    weights: tuple[float, ...] = ()
    patches_per_sample: int = 0

    @cached_property
    def prepared(self) -> tuple[Bank, ...]:
        """The M banks in the form that ``kernels.match`` takes."""
        scales = np.ones(self.features.shape[:3], np.float32) if self.scales is None else self.scales
        return tuple(map(Bank, np.ascontiguousarray(self.features), scales))

    @cached_property
    def gains(self) -> np.ndarray | None:
        """Factor of each row's distance in maps in units of normal variation, float32 [M, T, N]: the weight of the tap
        (``weights``) over the unit of the row and the level; None without units."""
        if self.units is None or self.variation is None:
            return None
        shares = tap_shares(self.weights, self.features.shape[1])[:, None]
        levels = np.array(self.variation.levels)[:, None, None]
        return np.ascontiguousarray(shares / (self.units * levels), np.float32)

    def match(
        self, patch_features: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Match each view of a frame with its bank, see ``kernels.match``.

        Args:
            patch_features: float32 [views, T, P, V], raw taps.
            threads: the most CPU threads to use.

        Returns:
            Distances, float32 [views, P], the index of the nearest row in each tap, int32 [views, T, P], and the
            distances in units of normal variation, float32 [views, P], or None without units.

        Raises:
            ValueError: the bank is for another number of regions.
        """
        banks = self.prepared
        views = [patch_features] if len(banks) == 1 else patch_features[:, None]
        if self.gains is None:
            plain = [
                match(view, bank, indices=True, threads=threads)
                for view, bank in zip(views, banks, strict=True)
            ]
            distance, nearest = map(np.concatenate, zip(*plain, strict=True))
            return distance, nearest, None
        found = [
            match_scaled(view, bank, gains, threads=threads)
            for view, bank, gains in zip(views, banks, self.gains, strict=True)
        ]
        distance, scaled, nearest = map(np.concatenate, zip(*found, strict=True))
        return distance, nearest, scaled

    def without_sample(self, sample: int) -> MemoryBank:
        """The bank without the rows of one normal sample (from 0), which then match nothing."""
        banks, _, rows, _ = self.features.shape
        numbers = np.arange(rows)[None, None] if self.origins is None else self.origins
        keeps = (numbers // self.patches_per_sample != sample)[..., None]
        features = self.features * np.broadcast_to(keeps, (banks, self.features.shape[1], rows, 1))
        return replace(self, features=features.astype(self.features.dtype))

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
        measured: Measured | None = None,
        weights: Sequence[float] = (),
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
            measured: the variation of the samples; None: maps get no units.
            weights: of the taps in maps in units of normal variation; empty: equal.
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
        units = None if measured is None else units_of_rows(measured.units, rows.shape[:3], origins, per_view)
        return cls(
            np.stack([bank.rows for bank in banks]),
            len(samples),
            encoder_sha256,
            scales,
            origins,
            units,
            None if measured is None else measured.variation,
            tuple(weights),
            groups.shape[1] // len(samples) * (groups.shape[3] if shown is None else int(shown.max()) + 1),
        )

    def save(self, path: Path) -> MemoryBankRecord:
        """Write the bank as npz and return the recipe's reference to it."""
        arrays = {
            "features": self.features,
            "scales": self.scales,
            "origins": self.origins,
            "units": self.units,
        }
        buffer = io.BytesIO()
        np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
        write_whole(path, buffer.getvalue())
        digest = digest_file(path).sha256
        return MemoryBankRecord(path.name, digest, self.num_samples, self.encoder_sha256, self.variation)


def units_of_rows(
    units: np.ndarray, shape: tuple[int, ...], origins: np.ndarray | None, per_view: bool
) -> np.ndarray:
    """The unit of each row of a bank.

    Args:
        units: of the samples' patches, float32 [samples, views, T, P].
        shape: of the bank, (M, T, N).
        origins: the patch that each row shows, see ``MemoryBank``; None: row n shows patch n.
        per_view: the bank is of M views, each with its own rows.

    Returns:
        float32 [M, T, N].
    """
    _, _, taps, patches = units.shape
    by_bank = units.swapaxes(0, 1) if per_view else units.reshape(1, -1, taps, patches)  # [M, images, T, P]
    flat = by_bank.swapaxes(1, 2).reshape(shape[0], taps, -1)
    if origins is None:
        return np.ascontiguousarray(flat, np.float32)
    return np.ascontiguousarray(np.take_along_axis(flat, origins, axis=2), np.float32)


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
            features, scales, origins, units = (
                arrays.get(name) for name in ("features", "scales", "origins", "units")
            )
        if features is None:
            raise ValueError("it holds no features")
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path} is not a memory bank: {again}") from error
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
    if units is None or record.variation is None:
        raise RecipeError(f"{path} was made by a version that did not measure the normal variation: {again}")
    if len(record.variation.levels) != num_banks:
        raise RecipeError(f"the recipe has {len(record.variation.levels)} levels for {num_banks} banks: {again}")
    if units.shape != features.shape[:3] or units.dtype != np.float32 or not (np.isfinite(units) & (units > 0)).all():
        raise RecipeError(f"{path} has units that do not fit its features: {again}")
    return MemoryBank(
        features,
        record.num_samples,
        record.encoder_sha256,
        scales,
        origins,
        units,
        record.variation,
        tuple(vision.tap_weights),
    )

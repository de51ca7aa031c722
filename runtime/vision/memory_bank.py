"""Patch features of normal samples: what "normal" looks like for one product."""

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
    """What a recipe keeps of its memory bank: the file beside the recipe, its digest, and the encoder that made it."""

    file: Annotated[str, Meta(pattern=r"^[^/\\\x00]{1,200}$")]
    sha256: Sha256
    num_samples: Annotated[int, Meta(ge=1)]
    encoder_sha256: Sha256

    def __post_init__(self) -> None:
        if self.file in (".", ".."):
            raise ValueError(f"{self.file!r} is not a file name")


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Attributes:
    features: float32, float16 or int8 [M, T, N, V]: unit length, int8 times ``scales``; M is the number of views
        that are compared each with its own patches, or 1: all are compared with the same.
    num_samples: normal images in it ("shots").
    encoder_sha256: the encoder that made the features.
    scales: float32 [M, T, N] of int8 features; None: all 1.
    origins: int32 [M, T, N], which patch of the samples each row shows, counted through all samples, the views of
        each and the patches of each view that the bank serves; None: all of them once, in their order.
    """

    features: np.ndarray
    num_samples: int
    encoder_sha256: str
    scales: np.ndarray | None = None
    origins: np.ndarray | None = None

    @cached_property
    def prepared(self) -> tuple[Bank, ...]:
        """As the kernels match with it, M of them."""
        scales = np.ones(self.features.shape[:3], np.float32) if self.scales is None else self.scales
        return tuple(map(Bank, np.ascontiguousarray(self.features), scales))

    def match(self, patch_features: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """``kernels.match`` of a frame's views with their patches.

        Args:
            patch_features: float32 [views, T, P, V], raw.
            threads: at most this many.

        Returns:
            Distances, float32 [views, P], and the rows that were nearest in each tap, int32 [views, T, P].

        Raises:
            ValueError: another number of views than the bank has patches for.
        """
        banks = self.prepared
        if len(banks) == 1:
            return match(patch_features, banks[0], indices=True, threads=threads)
        pairs = zip(patch_features[:, None], banks, strict=True)
        found = [match(view, bank, indices=True, threads=threads) for view, bank in pairs]
        distances, nearest = zip(*found, strict=True)
        return np.concatenate(distances), np.concatenate(nearest)

    def nearest_normal(self, view: int, nearest: np.ndarray) -> int:
        """The patch of the normal samples, counted as ``origins`` are, that a patch of a view is nearest to.

        Args:
            view: its index.
            nearest: int32 [T], the rows nearest to the patch in each tap.
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
        """Bank of K normal images from their raw taps, float32 [views, T, P, V] each.

        Args:
            samples: see above.
            encoder_sha256: digest of the encoder that made them.
            storage: float16 halves a bank's memory, int8 quarters it and is matched three times as fast.
            max_patches: keep at most so many patches of each tap, those that cover the rest best (a greedy coreset;
                where several show the same, ``cover``).
            per_view: compare each view with its own patches only, not with those of all.
            shown: int32 [P], which patch of a view each of the P shows, where they are not all patches once
                (copies of the sample).
            distinct: how many patches of a view show something else each, where that is not all P (copies, patches
                that overlap): the bank is then as large as with those alone, unless ``max_patches`` says less.
            threads: at most this many choose the greedy coreset.

        Raises:
            RecipeError: no image, a feature that is not finite, or a storage or limit that does not exist.
        """
        if len(samples) == 0:
            raise RecipeError("a memory bank needs at least one normal image: give some")
        if storage not in get_args(Storage):
            raise RecipeError(f"a memory bank is stored as float32, float16 or int8, not {storage!r}")
        if max_patches is not None and max_patches < 1:
            raise RecipeError(f"a memory bank needs at least one patch, not {max_patches}")
        if not all(np.isfinite(sample).all() for sample in samples):
            raise RecipeError("a normal image gives features that are not finite: leave it out")
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
        """Write the features as npz; returns what a recipe needs to find and trust the file."""
        arrays = {"features": self.features, "scales": self.scales, "origins": self.origins}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
        write_whole(path, buffer.getvalue())
        return MemoryBankRecord(path.name, digest_file(path).sha256, self.num_samples, self.encoder_sha256)


def load_bank(record: MemoryBankRecord, folder: Path, bundle: Bundle, layout: Layout = WHOLE) -> MemoryBank:
    """The bank that a recipe in ``folder`` names, for the views of its layout.

    Raises:
        RecipeError: missing, altered, made with another encoder, or not what this bundle's encoder gives.
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
    if features.ndim == 3:  # as banks were written before there were views
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
        raise RecipeError(f"{path} does not say which patches it holds: {again}")
    return MemoryBank(features, record.num_samples, record.encoder_sha256, scales, origins)

"""Patch features of normal samples: what "normal" looks like for one product."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..kernels import Bank, normalise, prepare_bank
from .bundle import Bundle, digest_file
from .errors import RecipeError
from .recipe import MemoryBankRecord, write_whole


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Attributes:
    features: float32 [T, N, V], unit length; N = num_samples * patches of one image.
    num_samples: normal images in it ("shots").
    encoder_sha256: the encoder that made the features.
    """

    features: np.ndarray
    num_samples: int
    encoder_sha256: str

    @cached_property
    def prepared(self) -> Bank:
        """As the kernels match with it."""
        return prepare_bank(self.features)

    @classmethod
    def from_features(cls, patch_features: np.ndarray, encoder_sha256: str) -> MemoryBank:
        """Bank of K normal images from their raw taps, float32 [K, T, P, V].

        Raises:
            RecipeError: no image, or a feature that is not finite.
        """
        num_samples, taps, _, width = patch_features.shape
        if num_samples == 0:
            raise RecipeError("a memory bank needs at least one normal image: give some")
        if not np.isfinite(patch_features).all():
            raise RecipeError("a normal image gives features that are not finite: leave it out")
        rows = patch_features.transpose(1, 0, 2, 3).reshape(taps, -1, width)
        return cls(normalise(np.ascontiguousarray(rows, np.float32)), num_samples, encoder_sha256)

    def save(self, path: Path) -> MemoryBankRecord:
        """Write the features as npz; returns what a recipe needs to find and trust the file."""
        buffer = io.BytesIO()
        np.savez(buffer, features=self.features)
        write_whole(path, buffer.getvalue())
        return MemoryBankRecord(path.name, digest_file(path).sha256, self.num_samples, self.encoder_sha256)


def load_bank(record: MemoryBankRecord, folder: Path, bundle: Bundle) -> MemoryBank:
    """The bank that a recipe in ``folder`` names.

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
            features = arrays["features"]
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path} is not a memory bank: {again}") from error
    vision = bundle.manifest.vision
    expected = (len(vision.tap_layers), record.num_samples * vision.grid**2, vision.width)
    if features.dtype != np.float32 or features.shape != expected or not np.isfinite(features).all():
        raise RecipeError(
            f"{path} is {features.dtype} {features.shape}, not finite float32 {expected}: {again}"
        )
    return MemoryBank(features, record.num_samples, record.encoder_sha256)

"""The file of text features: one embedding of "normal" and one of "abnormal" for each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..runtime.bundles.bundle import TEXT_FEATURES_FILE
from .tensor_files import CheckpointError


def read_text_features(path: Path, embed_dim: int) -> dict[str, np.ndarray]:
    """Read class name → float32 [2, E], unit norm (normal, abnormal).

    Raises:
        CheckpointError: the file is missing or not an npz of arrays, or an array has another shape or norm.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: check --text-features") from error
    except Exception as error:  # numpy raises zipfile's, zlib's and its own errors for damaged archives
        raise CheckpointError(
            f"{path} is not a readable npz of float arrays ({error}): create it again"
        ) from error
    if not features:
        raise CheckpointError(f"{path} contains no class: create the text features again")
    for name, value in features.items():
        if value.shape != (2, embed_dim):
            raise CheckpointError(
                f"{path}: {name!r} has shape {value.shape} instead of (2, {embed_dim}): "
                "give text features of the same model as the ImageBind file"
            )
        if not np.allclose(np.linalg.norm(value, axis=1), 1, atol=1e-3):
            raise CheckpointError(
                f"{path}: {name!r} does not have unit norm (or is not finite): create the text features again"
            )
    return features


def save_text_features(features: Mapping[str, np.ndarray], classes: Iterable[str], folder: Path) -> None:
    """Write the features of these classes into a bundle folder."""
    arrays = {name: features[name] for name in classes}
    np.savez(folder / TEXT_FEATURES_FILE, **arrays)  # type: ignore[arg-type]

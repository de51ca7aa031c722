"""The file of text features: what "normal" and "abnormal" mean for each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..runtime.bundles.bundle import TEXT_FEATURES_FILE
from .tensor_files import CheckpointError


def read_text_features(path: Path, embed_dim: int) -> dict[str, np.ndarray]:
    """Class name → float32 [2, E], unit norm (normal, abnormal).

    Raises:
        CheckpointError: missing, not an npz of arrays, or a class whose array is not that.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not there: check --text-features") from error
    except Exception as error:  # numpy raises zipfile's, zlib's and its own errors for damaged archives
        raise CheckpointError(
            f"{path} is not a readable npz of float arrays ({error}): make it again"
        ) from error
    if not features:
        raise CheckpointError(f"{path} holds no class: make the text features again")
    for name, value in features.items():
        if value.shape != (2, embed_dim):
            raise CheckpointError(
                f"{path}: {name!r} is {value.shape} instead of (2, {embed_dim}): "
                "the text features are of another model than the ImageBind file"
            )
        if not np.allclose(np.linalg.norm(value, axis=1), 1, atol=1e-3):
            raise CheckpointError(
                f"{path}: {name!r} is not unit norm (or not finite): make the text features again"
            )
    return features


def save_text_features(features: Mapping[str, np.ndarray], classes: Iterable[str], folder: Path) -> None:
    """Write the features of these classes as a bundle's."""
    arrays = {name: features[name] for name in classes}
    np.savez(folder / TEXT_FEATURES_FILE, **arrays)  # type: ignore[arg-type]

"""The encoder of ``lite`` as a checkpoint: one safetensors file with its configuration in the metadata."""

from __future__ import annotations

from typing import Any

from ..models.lite.encoder import LiteEncoder, LiteVisionConfig
from .keys import check_keys, module_shapes, read_metadata
from .tensor_files import CheckpointError, Tensors

STEM = "backbone.stem.weight"  # a key that no other checkpoint has


def is_lite(tensors: Tensors) -> bool:
    """Whether the file is an encoder of ``lite``."""
    return STEM in tensors


def read_lite_config(tensors: Tensors) -> LiteVisionConfig:
    """Dimensions from the file's metadata; the shapes of all tensors are checked against them.

    Raises:
        CheckpointError: the metadata has no valid configuration, or keys are missing, unexpected or of another shape.
    """
    settings = read_metadata(tensors, "config", {})
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        config = LiteVisionConfig(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{tensors.path}: the configuration in its metadata is not valid ({error}): train or save it again"
        ) from error
    expected = module_shapes(LiteEncoder, config)
    check_keys(
        tensors.path, tensors.shapes, expected, "it is not an encoder of lite as its training saves it"
    )
    return config

"""The trained encoder on disk: one safetensors file, and the way back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...runtime.common.errors import ConfigError
from .encoder import LiteEncoder, LiteVisionConfig

CONFIG = "config"  # key of the metadata: the configuration as JSON


def save_encoder(encoder: LiteEncoder, path: Path) -> None:
    """Write the encoder; the backbone is rounded to float16, projections and head stay float32."""
    tensors = {
        name: (tensor.half() if name.startswith("backbone.") else tensor.float()).contiguous().clone()
        for name, tensor in encoder.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {CONFIG: json.dumps(asdict(encoder.config))})
    temporary.replace(path)


def load_encoder(path: Path) -> LiteEncoder:
    """Read an encoder, float32, ready to encode.

    Raises:
        ConfigError: no such file, or not one of these.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads(file.metadata()[CONFIG])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        config = LiteVisionConfig(**settings)
        encoder = LiteEncoder(config)
        encoder.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a checkpoint of lite's encoder ({error}): train one") from error
    return encoder.eval()

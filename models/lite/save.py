"""The trained model on disk: the encoder in one safetensors file, the other parts in the original's formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...runtime.common.errors import ConfigError
from ..anomalygpt import AnomalyGPT
from ..image_decoder import ImageDecoder
from ..nano.dialogues import KNOWN_QUESTIONS
from ..nano.save import save_second_half
from ..nano.train_vision import OBJECT
from .encoder import LiteEncoder, LiteVisionConfig

CONFIG = "config"  # key of the metadata: the configuration as JSON
ENCODER_FILE = "vision.safetensors"
NAME = "anomalygpt-lite"
NOTICES = (
    "Lite: the encoder's backbone starts from EfficientNet-Lite0 (Google; trained on ImageNet; Apache-2.0). Everything "
    "else was trained from scratch on generated images only; weights under Apache-2.0.",
)


def save_checkpoint(
    model: AnomalyGPT,
    encoder: LiteEncoder,
    tokenizer_model: Path,
    text_features: Mapping[str, np.ndarray],
    region_level: Mapping[str, float | None],
    folder: Path,
) -> None:
    """Write the encoder, the other checkpoints, the text features and ``model.json`` into ``folder``.

    Args:
        model: everything but the encoder; the language model is rounded to float16.
        encoder: its encoder.
        tokenizer_model: the sentencepiece model file that the language model was trained with.
        text_features: class name → float32 [2, E], unit norm, row 0 normal and row 1 abnormal.
        region_level: ``{"few_shot": …, "zero_shot": …}``, the map level from which on a pixel belongs to a region, the
            first in units of normal variation.
        folder: created if missing; files of an earlier checkpoint are overwritten.
    """
    save_encoder(encoder, folder / ENCODER_FILE)
    about = {
        "name": NAME,
        "notices": list(NOTICES),
        "region_level": dict(region_level),
        "map_units": model.config.prompt_learner.map_units,
        "classes": list(text_features),
        "questions": list(KNOWN_QUESTIONS),
    }
    save_second_half(model, tokenizer_model, text_features, about, folder)


def load_decoder(folder: Path, config: LiteVisionConfig) -> tuple[ImageDecoder, Tensor]:
    """The image decoder of a checkpoint, and the text features [2, E] of class "object".

    Raises:
        ConfigError: a file is missing or damaged.
    """
    decoder, prefix = ImageDecoder(config.width, config.embed_dim, len(config.tap_blocks)), "image_decoder."
    try:
        delta = load_file(folder / "anomalygpt.safetensors")
        decoder.load_state_dict({n.removeprefix(prefix): t for n, t in delta.items() if n.startswith(prefix)})
        with np.load(folder / "text_features.npz", allow_pickle=False) as features:
            text = torch.from_numpy(features[OBJECT])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} is not a checkpoint of lite ({error}): train one") from error
    return decoder.eval(), text


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

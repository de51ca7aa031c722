"""Computes text features with ImageBind's text tower at export, so that bundles need no text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch

from ..models.clip_tokens import ClipTokenizer
from ..models.prompts import ensemble
from ..models.text_tower import TextEncoder, ensemble_features
from .checkpoints import Checkpoints
from .tensor_files import CheckpointError


def add_text_features(
    checkpoints: Checkpoints,
    tokenizer: ClipTokenizer,
    classes: Iterable[str],
    advance: Callable[[str], None] = lambda name: None,
) -> Checkpoints:
    """The checkpoints with the features of these classes, computed with ImageBind's text tower.

    Raises:
        CheckpointError: the text tower is damaged or has another vocabulary than CLIP's.
    """
    encoder = checkpoints.text_encoder()
    path = checkpoints.imagebind.path
    if encoder.config.vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"{path}: its text tower has {encoder.config.vocab_size} token embeddings but CLIP's vocabulary "
            f"{tokenizer.vocab_size} tokens, so it is not ImageBind's: give --text-features"
        )
    features = compute_text_features(encoder, tokenizer, classes, advance)
    if broken := [name for name, value in features.items() if not np.isfinite(value).all()]:
        raise CheckpointError(
            f"{path}: the text features of {broken[0]!r} are not finite: download the file again"
        )
    return replace(checkpoints, text_features=features)


@torch.inference_mode()
def compute_text_features(
    encoder: TextEncoder,
    tokenizer: ClipTokenizer,
    classes: Iterable[str],
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, np.ndarray]:
    """Class name → float32 [2, E], unit norm: the original's ensemble of 14 normal and 10 abnormal sentences."""
    features = {}
    for name in classes:
        normal, abnormal = (
            tokenizer.tokenize(sentences, encoder.config.context_length) for sentences in ensemble(name)
        )
        features[name] = ensemble_features(encoder, normal, abnormal).numpy()
        advance(name)
    return features

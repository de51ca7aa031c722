"""Second half of lite's training: picture network, prompt learner, projection and language model, on maps of the frozen
encoder in units of normal variation.

The loops are nano's; the weights start from nano's, which learned the same answers from other maps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from ..anomalygpt import AnomalyGPT, AnomalyGPTConfig
from ..nano import train as nano_train
from ..nano.config import nano_config
from ..nano.tokenizer import load_tokenizer
from ..nano.train_language import Maps, Vocabulary, train_language
from ..nano.train_look import look_at, train_look
from .encoder import LiteEncoder, LiteVisionConfig
from .gallery import UnitGallery, load_validation
from .train_decoder import ZeroShot
from .train_vision import Recipe

START = Path(nano_train.__file__).parent / "checkpoint"  # nano's
TOKENIZER = START / "vicuna" / "tokenizer.model"


def lite_config(vision: LiteVisionConfig, vocab_size: int) -> AnomalyGPTConfig:
    """nano's language model and prompt learner on lite's encoder."""
    config = nano_config(vocab_size)
    learner = replace(config.prompt_learner, map_units="normal variation")
    return replace(config, vision=vision, prompt_learner=learner)


def load_start(model: AnomalyGPT) -> None:
    """Load nano's language model and prompt learner; the projection keeps its initial weights, as lite's image
    embedding is another."""
    llama = load_file(START / "vicuna" / "model.safetensors")
    model.llama.load_state_dict({name: tensor.float() for name, tensor in llama.items()})
    delta, prefix = load_file(START / "anomalygpt.safetensors"), "prompt_learner."
    learner = {name.removeprefix(prefix): tensor for name, tensor in delta.items() if name.startswith(prefix)}
    model.prompt_learner.load_state_dict(learner)


def train_second_half(
    recipe: Recipe,
    encoder: LiteEncoder,
    zero_shot: ZeroShot,
    gallery: UnitGallery,
    contrasts: NDArray[np.float16],
    validation: list[Path],
    folder: Path,
) -> AnomalyGPT:
    """Train the picture network, then prompt learner, projection and language model, or continue their training.

    Args:
        recipe: the settings.
        encoder: frozen.
        zero_shot: the trained image decoder.
        gallery: the maps to train on; the last tenth of the products is for calibration.
        contrasts: of the gallery's pictures.
        validation: files of ``encode_validation``.
        folder: for states and training curves.
    """
    vocabulary = Vocabulary(load_tokenizer(TOKENIZER))
    torch.manual_seed(recipe.language.seed + 2)
    model = AnomalyGPT(lite_config(encoder.config, vocabulary.tokenizer.vocab_size()))
    load_start(model)
    model.encoder.load_state_dict(encoder.state_dict())
    model.image_decoder.load_state_dict(zero_shot.decoder.state_dict())

    def contrasts_of(entries: NDArray[np.intp]) -> Tensor:
        return torch.from_numpy(contrasts[entries])

    look = train_look(recipe.language, model.prompt_learner.look_net, gallery, contrasts_of, folder, "cpu")
    maps = Maps(gallery, look_at(look, gallery, contrasts_of), name_lines=True)
    shown = load_validation(validation, look)
    return train_language(recipe.language, model, shown, maps, vocabulary, folder, "cpu")

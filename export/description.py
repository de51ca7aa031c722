"""The manifest of a bundle before it is sealed: names, dimensions, classes, the original's prompt."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..models import prompts
from ..models.prompt_learner import NUM_PROMPTS
from ..runtime.bundles.bundle import (
    AnswerForms,
    Augmentation,
    Component,
    Language,
    Manifest,
    MapUnits,
    Preprocess,
    PromptLayout,
    RegionLevel,
    Vision,
)
from ..runtime.common.errors import ConfigError
from ..runtime.common.schema_errors import describe_error
from .checkpoints import Checkpoints
from .options import ExportOptions
from .staging import tool_versions
from .tensor_files import CheckpointError, read_json
from .vicuna import SIZES

GGUF_FILE = "llm.gguf"
ORIGINAL_NOTICES = (
    "Weights derived from ImageBind, LLaMA/Vicuna, PandaGPT and AnomalyGPT: their licences forbid commercial "
    "use; read them before passing this bundle on.",
)


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of ``model.json``, the description that lies beside a checkpoint."""

    name: str
    notices: list[str]
    region_level: RegionLevel = RegionLevel()
    map_units: MapUnits = "raw"
    augmentation: Augmentation = "none"
    classes: list[str] = []
    questions: list[str] = []


def read_about(path: Path | None, checkpoints: Checkpoints) -> About:
    """The model's description: from ``model.json``, or the original's name and notices.

    Raises:
        CheckpointError: the file is missing or not a valid description.
    """
    if path is None:
        size = SIZES.get(checkpoints.config.llama.hidden_size)
        return About(f"anomalygpt-{size.lower()}" if size else "anomalygpt", list(ORIGINAL_NOTICES))
    try:
        return msgspec.convert(read_json(path), About)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{path} does not describe a model ({describe_error(error)}): fix or leave out --about"
        ) from error


def choose_classes(options: ExportOptions, about: About, checkpoints: Checkpoints) -> list[str]:
    """The classes asked for, else those of ``model.json``, else all that have text features, else the original's.

    Raises:
        ConfigError: a class has no text features and there is no text tower to compute them with.
    """
    known = checkpoints.text_features
    chosen = list(options.classes or about.classes or known or prompts.ENSEMBLE_CLASSES)
    unknown = [name for name in chosen if name not in known]
    if unknown and checkpoints.text is None:
        raise ConfigError(
            f"class {unknown[0]!r} has no text features in {options.text_features}: "
            f"choose among {', '.join(known)}"
        )
    return list(dict.fromkeys(chosen))


def describe(
    options: ExportOptions,
    about: About,
    classes: list[str],
    checkpoints: Checkpoints,
    components: dict[str, Component],
) -> Manifest:
    """The manifest without digests and parity figures."""
    vision, llama = checkpoints.config.vision, checkpoints.config.llama
    return Manifest(
        name=about.name,
        notices=about.notices,
        preprocess=Preprocess(
            vision.image_size, options.resize, list(vision.pixel_mean), list(vision.pixel_std)
        ),
        vision=Vision(
            vision.width,
            list(vision.tap_layers),
            vision.grid,
            vision.embed_dim,
            vision.map_size,
            vision.shifts,
            list(vision.tap_weights),
        ),
        language=Language(
            llama.hidden_size, llama.vocab_size, llama.num_hidden_layers, llama.max_position_embeddings
        ),
        classes=classes,
        default_class="object" if "object" in classes else classes[0],
        region_level=about.region_level,
        map_units=about.map_units,
        augmentation=about.augmentation,
        prompt=prompt_layout(),
        questions=about.questions,
        components={**components, "language_model": Component(GGUF_FILE, options.llm_quant)},
        tools=tool_versions(),
    )


def prompt_layout() -> PromptLayout:
    """The pieces of the original's prompt and the forms of its answers."""
    return PromptLayout(
        before_image=prompts.PIECE_BEFORE_IMAGE,
        after_image=prompts.PIECE_AFTER_IMAGE,
        num_prompts=NUM_PROMPTS,
        assistant=prompts.PIECE_ASSISTANT,
        question=prompts.DEFAULT_QUESTION,
        affirmative=prompts.AFFIRMATIVE,
        negative=prompts.NEGATIVE,
        stop_piece=prompts.STOP_PIECE,
        turn_end=prompts.STOP_STRING,
        answers=AnswerForms(
            none=[prompts.ANSWER_NONE],
            one=[prompts.ANSWER_ONE],
            several=[prompts.ANSWER_SEVERAL],
            places=list(prompts.PLACES),
        ),
    )

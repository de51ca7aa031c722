"""Opens the four checkpoints of an AnomalyGPT, checks them against each other, and maps them onto ``models/``.

Formats and key names are the original's. Dimensions are read from the files, never assumed. Errors name missing,
unexpected and mis-shaped keys, with the likely cause.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ..models.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from ..models.evidence import NUM_FIGURES
from ..models.image_decoder import ImageDecoder
from ..models.imagebind import VisionEncoder, fold_video_kernel
from ..models.lite.encoder import LiteVisionConfig
from ..models.original_names import IMAGEBIND_KEY, LORA_KEY, original_text_name, original_vision_name
from ..models.prompt_learner import MapUnits, PromptLearner, PromptLearnerConfig
from ..models.text_tower import TextConfig, TextEncoder
from .imagebind import read_text_config, read_vision_config
from .keys import check_keys, module_shapes, name_some, read_metadata, shape_of
from .lite import is_lite, read_lite_config
from .options import vision_file
from .tensor_files import CheckpointError, Tensors, open_tensors
from .text_features import read_text_features
from .vicuna import LlamaSource, open_llama, read_lora, size_name

NUM_META_CONVS = 6
EVIDENCE_KEYS = tuple(
    f"prompt_learner.evidence_net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
)
LOOK_KERNELS = tuple(f"prompt_learner.look_net.convs.{i}.weight" for i in range(3))


@dataclass(frozen=True)
class Checkpoints:
    """All inputs of one model; tensors are read on access."""

    config: AnomalyGPTConfig
    imagebind: Tensors
    llama: LlamaSource
    pandagpt: Tensors
    anomalygpt: Tensors
    text_features: Mapping[str, np.ndarray] = field(default_factory=dict)  # empty until read or computed
    text: TextConfig | None = None  # None: the features come from a file

    def vision_state(self) -> dict[str, Tensor]:
        """State dict of the vision encoder, float32."""
        if isinstance(self.config.vision, LiteVisionConfig):
            return {name: self.imagebind[name].float() for name in self.imagebind}
        names = module_shapes(VisionEncoder, self.config.vision)
        state = {name: self.imagebind[original_vision_name(name)].float() for name in names}
        state["patch_embedding.weight"] = fold_video_kernel(state["patch_embedding.weight"])
        return state

    def text_encoder(self) -> TextEncoder:
        """The text tower, float32; the weights of a float32 checkpoint stay in the mapped file.

        Raises:
            CheckpointError: a weight is damaged, or ``open_checkpoints`` was given text features instead.
        """
        if self.text is None:
            raise CheckpointError(f"{self.imagebind.path}: its text tower was not opened")
        with torch.device("meta"):
            encoder = TextEncoder(self.text)
        names = module_shapes(TextEncoder, self.text)
        state = {name: self.imagebind[original_text_name(name)].float() for name in names}
        encoder.load_state_dict(state, assign=True)
        return encoder.eval().requires_grad_(False)

    def delta_state(self, module: str) -> dict[str, Tensor]:
        """State dict of ``image_decoder``, ``prompt_learner`` or ``llama_proj``, float32."""
        source = self.pandagpt if module == "llama_proj" else self.anomalygpt
        prefix = f"{module}."
        return {key[len(prefix) :]: source[key].float() for key in source if key.startswith(prefix)}


def open_checkpoints(
    imagebind: Path, vicuna: Path, pandagpt: Path, anomalygpt: Path, text_features: Path | None = None
) -> Checkpoints:
    """Open all files and check each one and their fit; almost no weights are read yet.

    Without ``text_features``, the ImageBind file must contain the text tower to compute them with.

    Raises:
        CheckpointError: describes the first mistake found.
    """
    checkpoints = open_networks(imagebind, vicuna, pandagpt, anomalygpt)
    embed_dim = checkpoints.config.vision.embed_dim
    if text_features is None:
        return replace(checkpoints, text=read_text_config(checkpoints.imagebind, embed_dim))
    return replace(checkpoints, text_features=read_text_features(text_features, embed_dim))


def open_networks(imagebind: Path, vicuna: Path, pandagpt: Path, anomalygpt: Path) -> Checkpoints:
    """Like ``open_checkpoints`` for the four checkpoints alone, without text features and text tower."""
    sources = (open_tensors(imagebind), open_tensors(pandagpt), open_tensors(anomalygpt))
    for tensors, role in zip(sources, ("ImageBind", "PandaGPT", "AnomalyGPT"), strict=True):
        check_role(tensors, role)
    vision_file, panda_file, anomaly_file = sources
    vision = read_lite_config(vision_file) if is_lite(vision_file) else read_vision_config(vision_file)
    llama_config, llama_tensors = open_llama(vicuna)
    learner = read_learner_config(anomaly_file)
    config = AnomalyGPTConfig(vision, learner, llama_config)
    lora = read_lora(panda_file, llama_config)
    check_fit(config, panda_file, anomaly_file)
    llama = LlamaSource(vicuna, llama_config, llama_tensors, lora)
    return Checkpoints(config, vision_file, llama, panda_file, anomaly_file)


def load_model(checkpoints: Checkpoints, *, with_llama: bool = True) -> AnomalyGPT:
    """The torch model, float32, LoRA merged; without ``with_llama`` the language model's weights stay unallocated."""
    with torch.device("meta"):
        model = AnomalyGPT(checkpoints.config)
    model.encoder.load_state_dict(checkpoints.vision_state(), assign=True)
    for name in ("image_decoder", "prompt_learner", "llama_proj"):
        model.get_submodule(name).load_state_dict(checkpoints.delta_state(name), assign=True)
    if with_llama:
        names = model.llama.state_dict()
        model.llama.load_state_dict({name: checkpoints.llama.merged(name) for name in names}, assign=True)
    return model.eval().requires_grad_(False)


def open_checkpoint_folder(folder: Path) -> Checkpoints:
    """Open a folder written by the training of nano or lite."""
    return open_checkpoints(
        vision_file(folder),
        folder / "vicuna",
        folder / "pandagpt.safetensors",
        folder / "anomalygpt.safetensors",
        folder / "text_features.npz",
    )


def check_role(tensors: Tensors, role: str) -> None:
    """Refuse a file that is one of the other three checkpoints; two of the downloads are both called
    ``pytorch_model.pt``.

    Raises:
        CheckpointError: the keys are not those of ``role``.
    """
    found = identify(tensors)
    if found is None:
        raise CheckpointError(
            f"{tensors.path} is not the {role} checkpoint: its keys ({name_some(tensors)}) belong to another model; "
            "check the path"
        )
    if found != role:
        raise CheckpointError(
            f"{tensors.path} is the {found} checkpoint, but it was given as {role}'s: swap the two options"
        )


def identify(tensors: Tensors) -> str | None:
    """The checkpoint that these keys belong to: one of the four roles, or None."""
    if any(key.startswith(("image_decoder.", "prompt_learner.")) for key in tensors):
        return "AnomalyGPT"
    if is_lite(tensors) or any(IMAGEBIND_KEY.match(key) for key in tensors):
        return "ImageBind"
    if any(key.startswith("llama_proj.") or LORA_KEY.search(key) for key in tensors):
        return "PandaGPT"
    if "model.embed_tokens.weight" in tensors:
        return "Vicuna"
    return None


def read_learner_config(tensors: Tensors) -> PromptLearnerConfig:
    """The prompt learner's dimensions and inputs, from the tensors' shapes, and the units of its maps, from the
    metadata (raw without).

    Raises:
        CheckpointError: keys are missing, the units are unknown, or the learner expects another number of evidence
            features than this version computes.
    """
    kernels = [
        shape_of(tensors, f"prompt_learner.meta_net.{3 * i}.weight", dims=4) for i in range(NUM_META_CONVS)
    ]
    first, second, third, fourth, fifth, last = (kernel[0] for kernel in kernels)
    channels, units = (first, second, third, fourth, fifth), read_metadata(tensors, "map_units", "raw")
    if units not in get_args(MapUnits):
        raise CheckpointError(
            f"{tensors.path}: the unit {units!r} of its anomaly maps is not one of {', '.join(get_args(MapUnits))}: "
            "use the version that it was trained with, or train it again"
        )
    return PromptLearnerConfig(channels, last, read_evidence_width(tensors), read_look_channels(tensors), units)


def read_evidence_width(tensors: Tensors) -> int:
    """Width of the prompt learner's evidence network; 0 without one.

    Raises:
        CheckpointError: as ``read_learner_config``.
    """
    missing = [key for key in EVIDENCE_KEYS if key not in tensors]
    if len(missing) == len(EVIDENCE_KEYS):
        return 0
    if missing:
        raise CheckpointError(
            f"{tensors.path} lacks {name_some(missing)} of the evidence network: save or download the "
            "whole checkpoint again"
        )
    width, figures = shape_of(tensors, EVIDENCE_KEYS[0], dims=2)
    if figures != NUM_FIGURES:
        raise CheckpointError(
            f"{tensors.path}: its prompt learner expects {figures} evidence features, but this version computes "
            f"{NUM_FIGURES}: use the version that it was trained with, or train it again"
        )
    return width


def read_look_channels(tensors: Tensors) -> tuple[int, int, int] | None:
    """Channels of the prompt learner's picture network (``LookNet``); None without one. Its other keys are checked
    with the rest of the learner's.

    Raises:
        CheckpointError: some of its kernels are missing.
    """
    missing = [key for key in LOOK_KERNELS if key not in tensors]
    if missing and not any(key.startswith("prompt_learner.look_") for key in tensors):
        return None
    if missing:
        raise CheckpointError(
            f"{tensors.path} lacks {name_some(missing)} of the picture network: save or download the whole "
            "checkpoint again"
        )
    first, second, third = (shape_of(tensors, key, dims=4)[0] for key in LOOK_KERNELS)
    return first, second, third


def check_fit(config: AnomalyGPTConfig, pandagpt: Tensors, anomalygpt: Tensors) -> None:
    """Check that the PandaGPT and AnomalyGPT deltas fit ImageBind and the language model.

    Raises:
        CheckpointError: a width or a key does not fit.
    """
    width, vision = config.llama.hidden_size, config.vision
    for tensors, found, what in (
        (pandagpt, shape_of(pandagpt, "llama_proj.weight", dims=2)[0], "PandaGPT"),
        (anomalygpt, config.prompt_learner.llm_width, "AnomalyGPT"),
    ):
        if found != width:
            raise CheckpointError(
                f"{tensors.path} is a {what} delta for width {found}{size_name(found)}, but the language "
                f"model has width {width}{size_name(width)}: give the delta and the Vicuna of the same size"
            )
    projection = {"llama_proj.weight": (width, vision.embed_dim), "llama_proj.bias": (width,)}
    present = {key: shape for key, shape in pandagpt.shapes.items() if not LORA_KEY.search(key)}
    check_keys(pandagpt.path, present, projection, "it does not belong to this ImageBind")
    decoder = module_shapes(ImageDecoder, vision.width, vision.embed_dim, len(vision.tap_layers))
    learner = module_shapes(PromptLearner, config.prompt_learner)
    expected = {f"image_decoder.{name}": shape for name, shape in decoder.items()}
    expected |= {f"prompt_learner.{name}": shape for name, shape in learner.items()}
    cause = "it is not an AnomalyGPT delta as published, or it belongs to another ImageBind"
    check_keys(anomalygpt.path, anomalygpt.shapes, expected, cause)

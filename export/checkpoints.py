"""The four checkpoints of an AnomalyGPT, opened, checked against each other, and mapped onto ``models/``.

Formats and key names are the original's. Dimensions are read from the files, never assumed; every missing,
extra or mis-shaped key is named, with the likely cause.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from ..models.image_decoder import ImageDecoder
from ..models.imagebind import VisionConfig, VisionEncoder, fold_video_kernel
from ..models.llama import Llama, LlamaConfig
from ..models.original_names import (
    FRAMES,
    IMAGEBIND_KEY,
    LORA_ALPHA,
    LORA_KEY,
    PATCH_KERNEL,
    TEXT_KEY,
    TEXT_MASK,
    TEXT_SCALE,
    VISION_KEY,
    original_text_name,
    original_vision_name,
)
from ..models.prompt_learner import PromptLearner, PromptLearnerConfig
from ..models.text_tower import TextConfig, TextEncoder
from .tensor_files import CheckpointError, Shape, Tensors, open_tensor_folder, open_tensors, read_json

SIZES = {4096: "7B", 5120: "13B"}  # LLaMA's width → the name users know
SIZE_LAYERS = {"7B": 32, "13B": 40}
DELTA_NORM = 0.1  # the final norm's mean weight is about 1 in a LLaMA, and the difference of two is near 0
NUM_META_CONVS = 6
IGNORED_LLAMA_KEY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MAX_NAMED = 3  # keys spelt out in an error


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the attention projections: W' = W + scaling · B @ A."""

    factors: Mapping[str, tuple[str, str]]  # Hugging Face's weight name → names of A [r, in] and B [out, r]
    scaling: float
    tensors: Tensors

    def update(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] in float32 for a weight, or None when it has no update."""
        if name not in self.factors:
            return None
        a, b = self.factors[name]
        return self.tensors[a].float(), self.tensors[b].float()


@dataclass(frozen=True)
class LlamaSource:
    """A Hugging Face LLaMA folder and the LoRA that belongs to it."""

    folder: Path
    config: LlamaConfig
    tensors: Tensors
    lora: Lora | None

    def merged(self, name: str) -> Tensor:
        """One weight in float32 with its LoRA merged (merging in float16 would round twice)."""
        weight = self.tensors[name].float()
        update = self.lora.update(name) if self.lora else None
        if self.lora is None or update is None:
            return weight
        a, b = update
        return weight + self.lora.scaling * (b @ a)


@dataclass(frozen=True)
class Checkpoints:
    """Everything that one model is made of; tensors are read when asked for."""

    config: AnomalyGPTConfig
    imagebind: Tensors
    llama: LlamaSource
    pandagpt: Tensors
    anomalygpt: Tensors
    text_features: Mapping[str, np.ndarray] = field(default_factory=dict)  # empty until read or computed
    text: TextConfig | None = None  # None: the features come from a file

    def vision_state(self) -> dict[str, Tensor]:
        """State dict of ``VisionEncoder``, float32."""
        names = module_shapes(VisionEncoder, self.config.vision)
        state = {name: self.imagebind[original_vision_name(name)].float() for name in names}
        state["patch_embedding.weight"] = fold_video_kernel(state["patch_embedding.weight"])
        return state

    def text_encoder(self) -> TextEncoder:
        """The text tower, float32; a float32 checkpoint's weights stay in the mapped file.

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
    """Open all the files, check each one and that they fit together; hardly a weight is read yet.

    Without ``text_features`` the ImageBind file must hold the text tower that they are computed with.

    Raises:
        CheckpointError: the first thing that is wrong, in one sentence.
    """
    checkpoints = open_networks(imagebind, vicuna, pandagpt, anomalygpt)
    embed_dim = checkpoints.config.vision.embed_dim
    if text_features is None:
        return replace(checkpoints, text=read_text_config(checkpoints.imagebind, embed_dim))
    return replace(checkpoints, text_features=read_text_features(text_features, embed_dim))


def open_networks(imagebind: Path, vicuna: Path, pandagpt: Path, anomalygpt: Path) -> Checkpoints:
    """The same for the four checkpoints alone, as yet without text features or text tower."""
    sources = (open_tensors(imagebind), open_tensors(pandagpt), open_tensors(anomalygpt))
    for tensors, role in zip(sources, ("ImageBind", "PandaGPT", "AnomalyGPT"), strict=True):
        check_role(tensors, role)
    vision_file, panda_file, anomaly_file = sources
    vision = read_vision_config(vision_file)
    llama_config, llama_tensors = open_llama(vicuna)
    learner = read_learner_config(anomaly_file)
    config = AnomalyGPTConfig(vision, learner, llama_config)
    lora = read_lora(panda_file, llama_config)
    check_fit(config, panda_file, anomaly_file)
    llama = LlamaSource(vicuna, llama_config, llama_tensors, lora)
    return Checkpoints(config, vision_file, llama, panda_file, anomaly_file)


def load_model(checkpoints: Checkpoints, *, with_llama: bool = True) -> AnomalyGPT:
    """The torch model, float32, LoRA merged; without the language model its weights stay unallocated."""
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
    """Open a folder written by ``models.nano.save.save_checkpoint``."""
    return open_checkpoints(
        folder / "imagebind.safetensors",
        folder / "vicuna",
        folder / "pandagpt.safetensors",
        folder / "anomalygpt.safetensors",
        folder / "text_features.npz",
    )


def check_role(tensors: Tensors, role: str) -> None:
    """Refuse a file that is one of the other three (the usual mistake: two downloads are both called
    ``pytorch_model.pt``)."""
    found = identify(tensors)
    if found is None:
        raise CheckpointError(
            f"{tensors.path} is no {role} checkpoint: its keys ({name_some(tensors)}) are not that model's"
        )
    if found != role:
        raise CheckpointError(
            f"{tensors.path} is the {found} checkpoint, but it was given as {role}'s: swap the two options"
        )


def identify(tensors: Tensors) -> str | None:
    """Which of the four checkpoints these keys belong to."""
    if any(key.startswith(("image_decoder.", "prompt_learner.")) for key in tensors):
        return "AnomalyGPT"
    if any(IMAGEBIND_KEY.match(key) for key in tensors):
        return "ImageBind"
    if any(key.startswith("llama_proj.") or LORA_KEY.search(key) for key in tensors):
        return "PandaGPT"
    if "model.embed_tokens.weight" in tensors:
        return "Vicuna"
    return None


# -- ImageBind -----------------------------------------------------------------------------------------------


def read_vision_config(tensors: Tensors) -> VisionConfig:
    """Dimensions from the shapes; heads and taps from the file's metadata or else ImageBind-Huge's."""
    cls = shape_of(tensors, original_vision_name("cls_token"), dims=3)
    kernel = shape_of(tensors, PATCH_KERNEL, dims=5)
    positions = shape_of(tensors, original_vision_name("pos_embed"), dims=3)
    head = shape_of(tensors, original_vision_name("head.weight"), dims=2)
    mlp = shape_of(tensors, original_vision_name("blocks.0.mlp.fc1.weight"), dims=2)
    grid = round((positions[1] - 1) ** 0.5)
    if grid * grid + 1 != positions[1]:
        raise CheckpointError(f"{tensors.path}: {positions[1]} positions are no square grid and a CLS token")
    huge = VisionConfig()
    config = VisionConfig(
        image_size=grid * kernel[-1],
        patch_size=kernel[-1],
        width=cls[-1],
        depth=count_layers(tensors, re.escape(original_vision_name("blocks."))),
        heads=int(read_metadata(tensors, "heads", huge.heads)),
        mlp_width=mlp[0],
        embed_dim=head[0],
        tap_layers=tuple(read_metadata(tensors, "tap_layers", huge.tap_layers)),
        neighbourhood=float(read_metadata(tensors, "neighbourhood", huge.neighbourhood)),
    )
    check_vision_config(config, tensors)
    vision_keys = {key: shape for key, shape in tensors.shapes.items() if VISION_KEY.match(key)}
    foreign = [key for key in tensors if not IMAGEBIND_KEY.match(key)]
    check_keys(
        tensors.path,
        {**vision_keys, **{key: tensors.shapes[key] for key in foreign}},
        vision_shapes(config),
        "the file is not the unmodified imagebind_huge.pth",
    )
    return config


def check_vision_config(config: VisionConfig, tensors: Tensors) -> None:
    if config.heads < 1 or config.width % config.heads:
        raise CheckpointError(
            f"{tensors.path}: width {config.width} does not divide into {config.heads} heads: "
            "a tower other than ImageBind-Huge needs its 'heads' in the file's metadata"
        )
    if not config.tap_layers or max(config.tap_layers) >= config.depth or min(config.tap_layers) < 0:
        raise CheckpointError(
            f"{tensors.path} has {config.depth} blocks but taps {list(config.tap_layers)}: blocks are missing, "
            "or a tower other than ImageBind-Huge needs its 'tap_layers' in the file's metadata"
        )
    if not 0 <= config.neighbourhood <= 1:
        raise CheckpointError(
            f"{tensors.path}: 'neighbourhood' in the file's metadata is a share, 0 to 1, not {config.neighbourhood}"
        )


def vision_shapes(config: VisionConfig) -> dict[str, Shape]:
    """ImageBind's vision keys and shapes for these dimensions."""
    shapes = {
        original_vision_name(name): shape for name, shape in module_shapes(VisionEncoder, config).items()
    }
    width, channels, *patch = shapes[PATCH_KERNEL]
    shapes[PATCH_KERNEL] = (width, channels, FRAMES, *patch)
    return shapes


def read_text_config(tensors: Tensors, embed_dim: int) -> TextConfig:
    """Dimensions of the text tower from the shapes; its heads from the file's metadata or else ImageBind-Huge's.

    Raises:
        CheckpointError: no text tower, an incomplete one, or one that is not ImageBind's.
    """
    if not has_text_tower(tensors):
        raise CheckpointError(f"{tensors.path} holds no text tower: give --text-features as well")
    rows, width = shape_of(tensors, original_text_name("token_embedding.weight"), dims=2)
    positions = shape_of(tensors, original_text_name("pos_embed"), dims=3)
    head = shape_of(tensors, original_text_name("head.weight"), dims=2)
    mlp = shape_of(tensors, original_text_name("blocks.0.mlp.fc1.weight"), dims=2)
    config = TextConfig(
        vocab_size=rows,
        context_length=positions[1],
        width=width,
        depth=count_layers(tensors, re.escape(original_text_name("blocks."))),
        heads=int(read_metadata(tensors, "text_heads", TextConfig.heads)),
        mlp_width=mlp[0],
        embed_dim=head[0],
    )
    if config.heads < 1 or width % config.heads:
        raise CheckpointError(
            f"{tensors.path}: text width {width} does not divide into {config.heads} heads: "
            "a tower other than ImageBind-Huge needs its 'text_heads' in the file's metadata"
        )
    if config.embed_dim != embed_dim:
        raise CheckpointError(
            f"{tensors.path}: text embeddings are {config.embed_dim} wide but image embeddings {embed_dim}: "
            "the towers are of different models"
        )
    present = {key: shape for key, shape in tensors.shapes.items() if TEXT_KEY.match(key)}
    expected = text_shapes(config)
    buffers = {TEXT_MASK: (positions[1], positions[1]), TEXT_SCALE: ()}
    expected |= {key: shape for key, shape in buffers.items() if key in present}
    check_keys(tensors.path, present, expected, "the file is not the unmodified imagebind_huge.pth")
    return config


def has_text_tower(tensors: Tensors) -> bool:
    """Whether any weight of it is there (its buffers alone are none)."""
    return any(TEXT_KEY.match(key) and key not in (TEXT_MASK, TEXT_SCALE) for key in tensors)


def text_shapes(config: TextConfig) -> dict[str, Shape]:
    """ImageBind's text keys and shapes for these dimensions."""
    return {original_text_name(name): shape for name, shape in module_shapes(TextEncoder, config).items()}


# -- the language model --------------------------------------------------------------------------------------


def open_llama(folder: Path) -> tuple[LlamaConfig, Tensors]:
    """config.json and the weights; the vocabulary is what the embedding has rows for, whatever config.json
    says (Vicuna v0 has 32001 rows and 32000 pieces)."""
    tensors = open_tensor_folder(folder)
    settings = read_json(folder / "config.json")
    vocab_size, width = shape_of(tensors, "model.embed_tokens.weight", dims=2)
    config = parse_llama_config(settings, folder, vocab_size)
    if width != config.hidden_size:
        raise CheckpointError(
            f"{folder}: config.json says hidden_size {config.hidden_size} but the weights are {width} wide: "
            "config.json and weights are of different models"
        )
    present = {key: shape for key, shape in tensors.shapes.items() if not IGNORED_LLAMA_KEY.match(key)}
    hint = "the folder is not a complete merged LLaMA (Vicuna) in Hugging Face's format"
    check_keys(folder, present, module_shapes(Llama, config), hint)
    if tensors["model.norm.weight"].float().abs().mean() < DELTA_NORM:
        raise CheckpointError(
            f"{folder} holds the differences to LLaMA that Vicuna v0 is published as, not Vicuna: "
            "add LLaMA's weights to them first (fastchat.model.apply_delta) and give the result"
        )
    return config, tensors


def parse_llama_config(settings: dict, folder: Path, vocab_size: int) -> LlamaConfig:
    """Refuses what the LLaMA of the original is not, instead of computing something else."""
    if settings.get("model_type", "llama") != "llama" or settings.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder}/config.json is not of a LLaMA: give the Vicuna v0 folder")
    if settings.get("rope_scaling"):
        raise CheckpointError(
            f"{folder}/config.json asks for rope_scaling, which Vicuna v0 has not: give Vicuna v0"
        )
    try:
        heads = int(settings["num_attention_heads"])
        if int(settings.get("num_key_value_heads", heads)) != heads:
            raise CheckpointError(f"{folder}/config.json asks for grouped key/value heads: give Vicuna v0")
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=int(settings["hidden_size"]),
            intermediate_size=int(settings["intermediate_size"]),
            num_hidden_layers=int(settings["num_hidden_layers"]),
            num_attention_heads=heads,
            max_position_embeddings=int(settings.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
            rope_theta=float(settings.get("rope_theta", 10000.0)),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json lacks {error}: copy the whole model folder") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json holds a value that is no number ({error})") from error
    if min(config.num_hidden_layers, heads) < 1 or config.hidden_size % (2 * heads):
        raise CheckpointError(
            f"{folder}/config.json: width {config.hidden_size} does not divide into {heads} heads"
        )
    return config


# -- PandaGPT's delta ----------------------------------------------------------------------------------------


def read_lora(tensors: Tensors, llama: LlamaConfig) -> Lora | None:
    """Check every LoRA pair of q, k, v, o in every layer; None when the file says that it has none.

    A delta without LoRA and without ``{"lora": "none"}`` is an error: leaving it out gives nonsense answers.
    """
    factors: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := LORA_KEY.search(key):
            name = f"model.layers.{match['layer']}.self_attn.{match['proj']}.weight"
            factors.setdefault(name, {})[match["side"]] = key
        elif not key.startswith("llama_proj."):
            raise CheckpointError(
                f"{tensors.path}: unexpected key {key}: this is not a PandaGPT delta as published"
            )
    if not factors:
        if tensors.metadata.get("lora") == "none":
            return None
        raise CheckpointError(
            f"{tensors.path} holds no LoRA weights (lora_A, lora_B): give PandaGPT's own pytorch_model.pt, "
            "not a file that was stripped or merged"
        )
    rank = check_lora_shapes(tensors, factors, llama)
    pairs = {name: (sides["A"], sides["B"]) for name, sides in factors.items()}
    alpha = float(read_metadata(tensors, "lora_alpha", LORA_ALPHA))
    return Lora(pairs, alpha / rank, tensors)


def check_lora_shapes(tensors: Tensors, factors: dict[str, dict[str, str]], llama: LlamaConfig) -> int:
    """The rank that all pairs share; an error names the layer, side or shape that is wrong."""
    layers = 1 + max(int(name.split(".")[2]) for name in factors)
    if layers != llama.num_hidden_layers:
        delta, model = layers_name(layers), layers_name(llama.num_hidden_layers)
        raise CheckpointError(
            f"{tensors.path} has LoRA for {layers} layers{delta} but the language model has "
            f"{llama.num_hidden_layers}{model}: give the delta and the Vicuna of the same size"
        )
    for layer in range(layers):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            if missing := sorted({"A", "B"} - factors.get(name, {}).keys()):
                raise CheckpointError(
                    f"{tensors.path} lacks lora_{missing[0]} of {name.removesuffix('.weight')}: "
                    "the file is incomplete; download it again"
                )
    ranks = {tensors.shapes[sides["A"]][0] for sides in factors.values()}
    rank, width = ranks.pop(), llama.hidden_size
    for sides in factors.values():
        for side, expected in (("A", (rank, width)), ("B", (width, rank))):
            if tensors.shapes[sides[side]] != expected:
                raise CheckpointError(
                    f"{tensors.path}: {sides[side]} is {tensors.shapes[sides[side]]} instead of {expected}: "
                    f"this delta is not for a language model of width {width}{size_name(width)}"
                )
    return rank


# -- AnomalyGPT's delta --------------------------------------------------------------------------------------


def read_learner_config(tensors: Tensors) -> PromptLearnerConfig:
    """The prompt learner's channels and the width it was trained for, from the shapes."""
    kernels = [
        shape_of(tensors, f"prompt_learner.meta_net.{3 * i}.weight", dims=4) for i in range(NUM_META_CONVS)
    ]
    first, second, third, fourth, fifth, last = (kernel[0] for kernel in kernels)
    return PromptLearnerConfig(channels=(first, second, third, fourth, fifth), llm_width=last)


def check_fit(config: AnomalyGPTConfig, pandagpt: Tensors, anomalygpt: Tensors) -> None:
    """The deltas against the two models they belong to."""
    width, vision = config.llama.hidden_size, config.vision
    for tensors, found, what in (
        (pandagpt, shape_of(pandagpt, "llama_proj.weight", dims=2)[0], "PandaGPT"),
        (anomalygpt, config.prompt_learner.llm_width, "AnomalyGPT"),
    ):
        if found != width:
            raise CheckpointError(
                f"{tensors.path} is a {what} delta for width {found}{size_name(found)}, but the language "
                f"model is {width} wide{size_name(width)}: give the delta and the Vicuna of the same size"
            )
    projection = {"llama_proj.weight": (width, vision.embed_dim), "llama_proj.bias": (width,)}
    present = {key: shape for key, shape in pandagpt.shapes.items() if not LORA_KEY.search(key)}
    check_keys(pandagpt.path, present, projection, "it does not belong to this ImageBind")
    decoder = module_shapes(ImageDecoder, vision.width, vision.embed_dim, len(vision.tap_layers))
    learner = module_shapes(PromptLearner, config.prompt_learner)
    expected = {f"image_decoder.{name}": shape for name, shape in decoder.items()}
    expected |= {f"prompt_learner.{name}": shape for name, shape in learner.items()}
    cause = "it is no AnomalyGPT delta as published, or not for this ImageBind"
    check_keys(anomalygpt.path, anomalygpt.shapes, expected, cause)


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


# -- shared --------------------------------------------------------------------------------------------------


def module_shapes(kind: type[nn.Module], *args: object) -> dict[str, Shape]:
    """Parameter names and shapes of a module, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in kind(*args).state_dict().items()}


def check_keys(path: Path, present: Mapping[str, Shape], expected: Mapping[str, Shape], cause: str) -> None:
    """Name every kind of difference between the keys a file has and those it must have."""
    wrong = [key for key in expected if key in present and present[key] != expected[key]]
    findings = []
    if missing := [key for key in expected if key not in present]:
        findings.append(f"lacks {name_some(missing)}")
    if extra := [key for key in present if key not in expected]:
        findings.append(f"has unexpected {name_some(extra)}")
    if wrong:
        key = wrong[0]
        findings.append(
            f"has {name_some(wrong)} of another shape ({present[key]} instead of {expected[key]})"
        )
    if findings:
        raise CheckpointError(f"{path} {' and '.join(findings)}: {cause}")


def name_some(keys: Iterable[str]) -> str:
    """The first keys, and how many more."""
    names = list(keys)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def shape_of(tensors: Tensors, key: str, dims: int) -> Shape:
    """Shape of a tensor that must be there with this many axes."""
    if key not in tensors.shapes:
        raise CheckpointError(
            f"{tensors.path} lacks {key}: it is incomplete, its keys were renamed, or it is another model's"
        )
    shape = tensors.shapes[key]
    if len(shape) != dims or min(shape) < 1:
        raise CheckpointError(f"{tensors.path}: {key} is {shape}, not a tensor of {dims} axes")
    return shape


def count_layers(tensors: Tensors, prefix: str) -> int:
    """1 + the highest block index under a prefix (a gap shows up as missing keys)."""
    pattern = re.compile(prefix + r"(\d+)\.")
    return 1 + max((int(match[1]) for key in tensors if (match := pattern.match(key))), default=-1)


def read_metadata(tensors: Tensors, key: str, default: Any) -> Any:
    """A JSON value of the file's metadata."""
    if key not in tensors.metadata:
        return default
    try:
        return json.loads(tensors.metadata[key])
    except ValueError as error:
        raise CheckpointError(
            f"{tensors.path}: metadata {key!r} is not JSON: save the checkpoint again"
        ) from error


def size_name(width: int) -> str:
    """A space and the size in brackets for a width that users know by name, else nothing."""
    return f" ({SIZES[width]})" if width in SIZES else ""


def layers_name(layers: int) -> str:
    """ " (13B)" for 40 layers, nothing for a number that is neither size's."""
    return next((f" ({size})" for size, known in SIZE_LAYERS.items() if known == layers), "")

"""ImageBind's file: reads the dimensions of its vision and text towers from the shapes and checks every key."""

from __future__ import annotations

import re

from ..models.imagebind import VisionConfig, VisionEncoder
from ..models.original_names import (
    FRAMES,
    IMAGEBIND_KEY,
    PATCH_KERNEL,
    TEXT_KEY,
    TEXT_MASK,
    TEXT_SCALE,
    VISION_KEY,
    original_text_name,
    original_vision_name,
)
from ..models.text_tower import TextConfig, TextEncoder
from .keys import check_keys, count_layers, module_shapes, read_metadata, shape_of
from .tensor_files import CheckpointError, Shape, Tensors


def read_vision_config(tensors: Tensors) -> VisionConfig:
    """Dimensions from the shapes; heads, taps, neighbourhood and shifts from the file's metadata, with
    ImageBind-Huge's as default.

    Raises:
        CheckpointError: keys are missing, unexpected or of the wrong shape, or a value is invalid.
    """
    cls = shape_of(tensors, original_vision_name("cls_token"), dims=3)
    kernel = shape_of(tensors, PATCH_KERNEL, dims=5)
    positions = shape_of(tensors, original_vision_name("pos_embed"), dims=3)
    head = shape_of(tensors, original_vision_name("head.weight"), dims=2)
    mlp = shape_of(tensors, original_vision_name("blocks.0.mlp.fc1.weight"), dims=2)
    tokens = round((positions[1] - 1) ** 0.5)
    if tokens * tokens + 1 != positions[1]:
        raise CheckpointError(
            f"{tensors.path}: {positions[1]} positions are not a square grid plus a CLS token"
        )
    huge = VisionConfig()
    config = VisionConfig(
        image_size=tokens * kernel[-1],
        patch_size=kernel[-1],
        width=cls[-1],
        depth=count_layers(tensors, re.escape(original_vision_name("blocks."))),
        heads=int(read_metadata(tensors, "heads", huge.heads)),
        mlp_width=mlp[0],
        embed_dim=head[0],
        tap_layers=tuple(read_metadata(tensors, "tap_layers", huge.tap_layers)),
        neighbourhood=float(read_metadata(tensors, "neighbourhood", huge.neighbourhood)),
        shifts=int(read_metadata(tensors, "shifts", huge.shifts)),
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
            f"{tensors.path} has {config.depth} blocks but tap layers {list(config.tap_layers)}: blocks are missing, "
            "or a tower other than ImageBind-Huge needs its 'tap_layers' in the file's metadata"
        )
    if config.shifts < 1 or config.patch_size % config.shifts:
        raise CheckpointError(
            f"{tensors.path}: 'shifts' in the file's metadata is {config.shifts}, which does not divide the patch size "
            f"of {config.patch_size} pixels"
        )
    if not 0 <= config.neighbourhood <= 1:
        raise CheckpointError(
            f"{tensors.path}: 'neighbourhood' in the file's metadata must be a share, 0 to 1, not "
            f"{config.neighbourhood}"
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
    """Dimensions of the text tower from the shapes; its heads from the file's metadata, by default ImageBind-Huge's.

    Raises:
        CheckpointError: there is no text tower, or it is incomplete or not ImageBind's.
    """
    if not has_text_tower(tensors):
        raise CheckpointError(f"{tensors.path} contains no text tower: give --text-features as well")
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
            f"{tensors.path}: text embeddings have width {config.embed_dim} but image embeddings {embed_dim}: "
            "the towers belong to different models; download the file again"
        )
    present = {key: shape for key, shape in tensors.shapes.items() if TEXT_KEY.match(key)}
    expected = text_shapes(config)
    buffers = {TEXT_MASK: (positions[1], positions[1]), TEXT_SCALE: ()}
    expected |= {key: shape for key, shape in buffers.items() if key in present}
    check_keys(tensors.path, present, expected, "the file is not the unmodified imagebind_huge.pth")
    return config


def has_text_tower(tensors: Tensors) -> bool:
    """Whether the file contains any weight of the text tower (its buffers are not weights)."""
    return any(TEXT_KEY.match(key) and key not in (TEXT_MASK, TEXT_SCALE) for key in tensors)


def text_shapes(config: TextConfig) -> dict[str, Shape]:
    """ImageBind's text keys and shapes for these dimensions."""
    return {original_text_name(name): shape for name, shape in module_shapes(TextEncoder, config).items()}

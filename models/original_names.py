"""The original checkpoints' key names, and their mapping to this project's modules.

Source: ImageBind (``imagebind_huge.pth``), PandaGPT and AnomalyGPT (``pytorch_model.pt``). LLaMA, the image
decoder, the prompt learner and ``llama_proj`` have the same names on both sides; only ImageBind's differ.
"""

from __future__ import annotations

import re

PATCH_KERNEL = "modality_preprocessors.vision.rgbt_stem.proj.1.weight"  # Conv3d [V, 3, 2, p, p]
FRAMES = 2  # the original repeats the image this many times and convolves over time

# (original prefix, VisionEncoder's prefix); none is a prefix of another.
VISION_PREFIXES = (
    ("modality_preprocessors.vision.cls_token", "cls_token"),
    (PATCH_KERNEL, "patch_embedding.weight"),
    ("modality_preprocessors.vision.pos_embedding_helper.pos_embed", "pos_embed"),
    ("modality_trunks.vision.pre_transformer_layer.0.", "pre_norm."),
    ("modality_trunks.vision.blocks.", "blocks."),
    ("modality_heads.vision.0.", "head_norm."),
    ("modality_heads.vision.2.", "head."),
)

# The same for TextEncoder.
TEXT_PREFIXES = (
    ("modality_preprocessors.text.token_embedding.", "token_embedding."),
    ("modality_preprocessors.text.pos_embed", "pos_embed"),
    ("modality_trunks.text.blocks.", "blocks."),
    ("modality_heads.text.proj.0.", "head_norm."),
    ("modality_heads.text.proj.1.", "head."),
)
TEXT_MASK = "modality_preprocessors.text.mask"  # a buffer: 0, and -inf above the diagonal
TEXT_SCALE = (
    "modality_postprocessors.text.1.log_logit_scale"  # a common factor of all sentences, which cancels
)

VISION_KEY = re.compile(r"modality_(preprocessors|trunks|heads|postprocessors)\.vision\.")
TEXT_KEY = re.compile(r"modality_(preprocessors|trunks|heads|postprocessors)\.text\.")
IMAGEBIND_KEY = re.compile(r"modality_(preprocessors|trunks|heads|postprocessors)\.\w+\.")
LORA_KEY = re.compile(  # peft writes ".default" or not, depending on its version
    r"layers\.(?P<layer>\d+)\.self_attn\.(?P<proj>[qkvo]_proj)\.lora_(?P<side>[AB])(\.default)?\.weight$"
)
LORA_ALPHA = 32  # PandaGPT's and AnomalyGPT's configuration; the scaling is alpha / rank = 1


def original_vision_name(name: str) -> str:
    """VisionEncoder's parameter name → ImageBind's key."""
    return _original_name(name, VISION_PREFIXES)


def original_text_name(name: str) -> str:
    """TextEncoder's parameter name → ImageBind's key."""
    return _original_name(name, TEXT_PREFIXES)


def _original_name(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for original, ours in prefixes:
        if name.startswith(ours):
            return original + name[len(ours) :]
    raise KeyError(name)

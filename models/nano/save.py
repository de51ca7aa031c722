"""Saves a trained nano model as checkpoints in the original's formats and key names.

``agpt export`` converts these files to a bundle in the same way as ImageBind's, Vicuna's, PandaGPT's and AnomalyGPT's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..anomalygpt import AnomalyGPT
from ..imagebind import VisionEncoder
from ..llama import Llama, LlamaConfig
from ..original_names import FRAMES, PATCH_KERNEL, original_vision_name

NOTICES = ("Nano: trained from scratch on generated images only; weights under Apache-2.0.",)


def save_checkpoint(
    model: AnomalyGPT,
    tokenizer_model: Path,
    text_features: Mapping[str, np.ndarray],
    region_level: Mapping[str, float | None],
    folder: Path,
    *,
    name: str = "nano",
    notices: Iterable[str] = NOTICES,
    augmentation: str = "none",
    questions: Iterable[str] = (),
) -> None:
    """Write the four checkpoints, the text features and ``model.json`` into ``folder``.

    Args:
        model: the trained model; the language model is rounded to float16, everything else stays float32.
        tokenizer_model: the sentencepiece model file that the language model was trained with.
        text_features: class name → float32 [2, E], unit norm, row 0 normal and row 1 abnormal.
        region_level: ``{"few_shot": …, "zero_shot": …}``, the map level from which on a pixel belongs to a region,
            or None.
        folder: created if missing; files of an earlier checkpoint are overwritten.
        name: of the model.
        notices: licence notices.
        augmentation: of the normal samples in memory banks ("none", "moved", "turned", "both").
        questions: one of each kind that the model was trained to answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vision = folder / "imagebind.safetensors"
    encoder = cast(VisionEncoder, model.encoder)
    save_file(vision_tensors(encoder), vision, vision_metadata(encoder))
    sort_metadata(vision)
    about = {
        "name": name,
        "notices": list(notices),
        "region_level": dict(region_level),
        "augmentation": augmentation,
        "classes": list(text_features),
        "questions": list(questions),
    }
    save_second_half(model, tokenizer_model, text_features, about, folder)


def save_second_half(
    model: AnomalyGPT,
    tokenizer_model: Path,
    text_features: Mapping[str, np.ndarray],
    about: Mapping[str, object],
    folder: Path,
) -> None:
    """Write everything but the encoder, arguments as of ``save_checkpoint``; ``about`` is ``model.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_llama(model.llama, tokenizer_model, folder / "vicuna")
    save_file(named_tensors(llama_proj=model.llama_proj), folder / "pandagpt.safetensors", {"lora": "none"})
    delta = named_tensors(image_decoder=model.image_decoder, prompt_learner=model.prompt_learner)
    units = model.config.prompt_learner.map_units
    save_file(delta, folder / "anomalygpt.safetensors", None if units == "raw" else {"map_units": json.dumps(units)})
    features = {key: np.asarray(value, np.float32) for key, value in text_features.items()}
    np.savez(folder / "text_features.npz", **features)  # type: ignore[arg-type]
    write_json(folder / "model.json", about)


def vision_tensors(encoder: VisionEncoder) -> dict[str, Tensor]:
    """The encoder's tensors under ImageBind's keys; the patch kernel is divided between the original's two frames."""
    tensors = {original_vision_name(name): plain(t) for name, t in encoder.state_dict().items()}
    kernel = tensors[PATCH_KERNEL] / FRAMES
    tensors[PATCH_KERNEL] = kernel[:, :, None].repeat(1, 1, FRAMES, 1, 1)
    return tensors


def vision_metadata(encoder: VisionEncoder) -> dict[str, str]:
    """Settings that the tensors' shapes do not determine, as JSON strings."""
    config = encoder.config
    settings = {
        "heads": config.heads,
        "tap_layers": list(config.tap_layers),
        "neighbourhood": config.neighbourhood,
        "shifts": config.shifts,
    }
    return {name: json.dumps(value) for name, value in settings.items()}


def sort_metadata(path: Path) -> None:
    """Order a safetensors file's metadata by name, in place.

    ``save_file`` writes them in random order, so the same weights would give different files. The header is JSON
    behind its length (8 bytes, little-endian), padded with spaces: https://github.com/huggingface/safetensors#format

    Raises:
        ValueError: the header became longer and would overwrite the tensors; nothing is written then.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(content) > size:
            raise ValueError(f"{path}: the sorted header is longer than before; check the file's format")
        file.seek(8)
        file.write(content.ljust(size))


def save_llama(llama: Llama, tokenizer_model: Path, folder: Path) -> None:
    """Write a Hugging Face LLaMA folder, float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: plain(t).half() for name, t in llama.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", llama_config_json(llama.config))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")


def llama_config_json(config: LlamaConfig) -> dict[str, object]:
    """Hugging Face's config.json for these dimensions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": config.vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def named_tensors(**modules: nn.Module) -> dict[str, Tensor]:
    """``prefix.name`` → tensor, for all modules."""
    return {
        f"{prefix}.{name}": plain(t) for prefix, m in modules.items() for name, t in m.state_dict().items()
    }


def plain(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy outside autograd (safetensors refuses views that share storage)."""
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

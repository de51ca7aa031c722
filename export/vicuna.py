"""Reads Vicuna's folder and PandaGPT's LoRA, which is merged into it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..models.llama import Llama, LlamaConfig
from ..models.original_names import LORA_ALPHA, LORA_KEY
from .keys import check_keys, module_shapes, read_metadata, shape_of
from .tensor_files import CheckpointError, Tensors, open_tensor_folder, read_json

SIZES = {4096: "7B", 5120: "13B"}  # LLaMA's width → its usual name
SIZE_LAYERS = {"7B": 32, "13B": 40}
DELTA_NORM = 0.1  # mean weight of the final norm: about 1 in a LLaMA, near 0 in the difference of two
IGNORED_LLAMA_KEY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


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


def open_llama(folder: Path) -> tuple[LlamaConfig, Tensors]:
    """The configuration of config.json and the weights. The vocabulary size is the embedding's number of rows, not
    config.json's value (Vicuna v0 has 32001 rows and 32000 pieces).

    Raises:
        CheckpointError: the folder is incomplete, damaged, or not a merged LLaMA.
    """
    tensors = open_tensor_folder(folder)
    settings = read_json(folder / "config.json")
    vocab_size, width = shape_of(tensors, "model.embed_tokens.weight", dims=2)
    config = parse_llama_config(settings, folder, vocab_size)
    if width != config.hidden_size:
        raise CheckpointError(
            f"{folder}: config.json has hidden_size {config.hidden_size} but the weights have width {width}: "
            "copy config.json and the weights from the same model"
        )
    present = {key: shape for key, shape in tensors.shapes.items() if not IGNORED_LLAMA_KEY.match(key)}
    hint = "the folder is not a complete merged LLaMA (Vicuna) in Hugging Face's format"
    check_keys(folder, present, module_shapes(Llama, config), hint)
    if tensors["model.norm.weight"].float().abs().mean() < DELTA_NORM:
        raise CheckpointError(
            f"{folder} contains the differences to LLaMA that Vicuna v0 is published as, not Vicuna itself: "
            "add LLaMA's weights to them (fastchat.model.apply_delta) and give the result"
        )
    return config, tensors


def parse_llama_config(settings: dict, folder: Path, vocab_size: int) -> LlamaConfig:
    """Parse config.json. Variants of LLaMA that the original does not use are refused.

    Raises:
        CheckpointError: a value is missing, invalid, or of such a variant.
    """
    if settings.get("model_type", "llama") != "llama" or settings.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{folder}/config.json does not describe a LLaMA: give the Vicuna v0 folder")
    if settings.get("rope_scaling"):
        raise CheckpointError(
            f"{folder}/config.json has rope_scaling, which Vicuna v0 does not have: give the Vicuna v0 folder"
        )
    try:
        heads = int(settings["num_attention_heads"])
        if int(settings.get("num_key_value_heads", heads)) != heads:
            raise CheckpointError(
                f"{folder}/config.json has grouped key/value heads, which Vicuna v0 does not have: give the Vicuna v0 "
                "folder"
            )
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
        raise CheckpointError(
            f"{folder}/config.json contains a value that is not a number ({error}): copy the whole model folder"
        ) from error
    if min(config.num_hidden_layers, heads) < 1 or config.hidden_size % (2 * heads):
        raise CheckpointError(
            f"{folder}/config.json: width {config.hidden_size} does not divide into {heads} heads: copy the whole "
            "model folder"
        )
    return config


def read_lora(tensors: Tensors, llama: LlamaConfig) -> Lora | None:
    """Check every LoRA pair of q, k, v, o in every layer.

    Returns:
        The LoRA; None if the file's metadata contain ``{"lora": "none"}``.

    Raises:
        CheckpointError: the pairs are incomplete or do not fit the language model; or there are none, without that
            metadata: without its LoRA a model gives nonsense answers.
    """
    factors: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := LORA_KEY.search(key):
            name = f"model.layers.{match['layer']}.self_attn.{match['proj']}.weight"
            factors.setdefault(name, {})[match["side"]] = key
        elif not key.startswith("llama_proj."):
            raise CheckpointError(
                f"{tensors.path} has the unexpected key {key}: give PandaGPT's delta as published"
            )
    if not factors:
        if tensors.metadata.get("lora") == "none":
            return None
        raise CheckpointError(
            f"{tensors.path} contains no LoRA weights (lora_A, lora_B): give PandaGPT's own pytorch_model.pt, "
            "not a stripped or merged file"
        )
    rank = check_lora_shapes(tensors, factors, llama)
    pairs = {name: (sides["A"], sides["B"]) for name, sides in factors.items()}
    alpha = float(read_metadata(tensors, "lora_alpha", LORA_ALPHA))
    return Lora(pairs, alpha / rank, tensors)


def check_lora_shapes(tensors: Tensors, factors: dict[str, dict[str, str]], llama: LlamaConfig) -> int:
    """The rank that all pairs share.

    Raises:
        CheckpointError: a layer, a side of a pair, or a shape is wrong.
    """
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


def size_name(width: int) -> str:
    """ " (7B)" or " (13B)" for the width of that size, "" for others."""
    return f" ({SIZES[width]})" if width in SIZES else ""


def layers_name(layers: int) -> str:
    """ " (7B)" or " (13B)" for the number of layers of that size, "" for others."""
    return next((f" ({size})" for size, known in SIZE_LAYERS.items() if known == layers), "")

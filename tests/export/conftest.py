"""Small random checkpoints: nano's safetensors, and the original's pickles with LoRA."""

from __future__ import annotations

import io
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor, nn

from anomalygpt_edge.export import pipeline
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import Report, export_bundle
from anomalygpt_edge.models import prompts
from anomalygpt_edge.models.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.llama import LlamaConfig
from anomalygpt_edge.models.nano.save import llama_config_json, save_checkpoint, vision_tensors
from anomalygpt_edge.models.prompt_learner import PromptLearnerConfig
from anomalygpt_edge.runtime.bundles.bundle import Component

LORA_RANK = 8
NUM_PIECES = 400


@dataclass(frozen=True)
class Originals:
    """Paths of one set of checkpoints, in the order of ``open_checkpoints``."""

    imagebind: Path
    vicuna: Path
    pandagpt: Path
    anomalygpt: Path
    text_features: Path
    config: AnomalyGPTConfig

    @property
    def paths(self) -> tuple[Path, Path, Path, Path, Path]:
        return self.imagebind, self.vicuna, self.pandagpt, self.anomalygpt, self.text_features


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like sentencepiece BPE: byte fallback, dummy prefix, ids 0, 1, 2 = unk, bos, eos."""
    sentences = [
        prompts.PIECE_BEFORE_IMAGE, prompts.PIECE_AFTER_IMAGE, prompts.DEFAULT_QUESTION,
        "### Assistant:", "x##y",
        *(prompts.answer([place]) for place in prompts.PLACES), prompts.answer([]),
        *(f"a photo of the {name} without flaw, scratch or damage" for name in prompts.CLASS_NAMES),
    ]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20), model_writer=model, model_type="bpe", vocab_size=NUM_PIECES,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def vocab_size(tokenizer_model: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).get_piece_size()


def random_model(config: AnomalyGPTConfig, seed: int = 0) -> AnomalyGPT:
    """Every parameter nonzero and different: a transposed, swapped or dropped one changes the result."""
    torch.manual_seed(seed)
    model = AnomalyGPT(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("cls_token", "pos_embed")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def random_text_features(
    width: int, classes: tuple[str, ...] = ("object", "metal nut")
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    features = {name: rng.standard_normal((2, width)).astype(np.float32) for name in classes}
    return {name: value / np.linalg.norm(value, axis=1, keepdims=True) for name, value in features.items()}


@pytest.fixture(scope="session")
def nano_config(vocab_size: int) -> AnomalyGPTConfig:
    """Nano's topology."""
    return AnomalyGPTConfig(
        VisionConfig(width=64, depth=4, heads=2, mlp_width=128, embed_dim=32, tap_layers=(0, 1, 2, 3)),
        PromptLearnerConfig(channels=(4, 8, 8, 16, 16), llm_width=64),
        LlamaConfig(
            vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        ),
    )


@pytest.fixture(scope="session")
def nano_model(nano_config: AnomalyGPTConfig) -> AnomalyGPT:
    return random_model(nano_config)


@pytest.fixture(scope="session")
def nano_folder(
    nano_model: AnomalyGPT, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What nano's training saves. Shared: tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("nano") / "checkpoint"
    level = {"few_shot": 0.3, "zero_shot": None}
    save_checkpoint(nano_model, tokenizer_model, random_text_features(32), level, folder)
    return folder


@pytest.fixture(scope="session")
def originals(tokenizer_model: Path, vocab_size: int, tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """The original's formats: pickles, shards, flat fp16 storage, LoRA, Vicuna v0's row without a piece."""
    config = AnomalyGPTConfig(
        VisionConfig(width=64, depth=32, heads=16, mlp_width=96, embed_dim=32),
        PromptLearnerConfig(channels=(4, 8, 8, 16, 16), llm_width=64),
        LlamaConfig(
            vocab_size + 1, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
        ),
    )
    folder = tmp_path_factory.mktemp("originals")
    return write_originals(random_model(config, seed=3), tokenizer_model, folder)


@pytest.fixture(scope="session")
def small(originals: Originals, nano_folder: Path, nano_config: AnomalyGPTConfig) -> Originals:
    """The originals on nano's shallow tower: everything that can go wrong in a merge, quick to export."""
    config = replace(originals.config, vision=nano_config.vision)
    return replace(originals, imagebind=nano_folder / "imagebind.safetensors", config=config)


@pytest.fixture(scope="session")
def exported(small: Originals, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A published bundle of ``small``; tests must not change it."""
    return export_bundle(ExportOptions(*small.paths, out=tmp_path_factory.mktemp("exported") / "bundle"))


@pytest.fixture
def exported_networks(exported: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ONNX files from the session's bundle: tests of the pipeline need not trace again."""

    def copy(reference: object, folder: Path, step: object) -> dict[str, Component]:
        components = {k: v for k, v in exported.manifest.components.items() if k != "language_model"}
        for component in components.values():
            shutil.copy(exported.bundle / component.file, folder)
        return components

    monkeypatch.setattr(pipeline, "export_networks", copy)


@pytest.fixture
def copy_of() -> Callable[[Originals, Path], Originals]:
    """A copy of a set whose files a test may damage."""

    def copy(source: Originals, folder: Path) -> Originals:
        root = source.imagebind.parent
        target = folder / "copy"
        shutil.copytree(root, target)
        return Originals(*(target / path.relative_to(root) for path in source.paths), source.config)

    return copy


def write_originals(model: AnomalyGPT, tokenizer_model: Path, folder: Path) -> Originals:
    """Save a model as ``imagebind_huge.pth``, a sharded Vicuna folder and the two fp16 deltas."""
    config = model.config
    imagebind = OrderedDict(vision_tensors(model.encoder))
    imagebind["modality_preprocessors.text.mask"] = torch.full((77, 77), float("-inf")).triu_(1)
    torch.save(imagebind, folder / "imagebind_huge.pth")
    write_vicuna(model, tokenizer_model, folder / "vicuna")
    panda = OrderedDict(random_lora(config.llama))
    panda |= {f"llama_proj.{name}": t for name, t in model.llama_proj.state_dict().items()}
    save_delta(panda, folder / "pandagpt.pt")
    delta = OrderedDict((f"image_decoder.{name}", t) for name, t in model.image_decoder.state_dict().items())
    delta |= {f"prompt_learner.{name}": t for name, t in model.prompt_learner.state_dict().items()}
    save_delta(delta, folder / "anomalygpt.pt")
    features = random_text_features(config.vision.embed_dim)
    np.savez(folder / "text_features.npz", **features)  # type: ignore[arg-type]
    names = ("imagebind_huge.pth", "vicuna", "pandagpt.pt", "anomalygpt.pt", "text_features.npz")
    return Originals(*(folder / name for name in names), config)


def write_vicuna(model: AnomalyGPT, tokenizer_model: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    settings = llama_config_json(model.config.llama) | {"pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(settings))
    shards: list[OrderedDict[str, Tensor]] = [OrderedDict(), OrderedDict()]
    for name, tensor in model.llama.state_dict().items():
        shards[name.startswith(("lm_head", "model.norm"))][name] = tensor.half()
    shards[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    files = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    weight_map = {}
    for file, shard in zip(files, shards, strict=True):
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def random_lora(config: LlamaConfig) -> dict[str, Tensor]:
    """Updates about as large as the weights: leaving them out changes every answer."""
    torch.manual_seed(9)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            prefix = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{projection}."
            tensors[prefix + "lora_A.default.weight"] = torch.randn(LORA_RANK, config.hidden_size) * 0.05
            tensors[prefix + "lora_B.default.weight"] = torch.randn(config.hidden_size, LORA_RANK) * 0.05
    return tensors


def save_delta(tensors: OrderedDict[str, Tensor], path: Path) -> None:
    """fp16 parameters that are views into one flat storage, as DeepSpeed leaves them."""
    flat = torch.cat([t.reshape(-1) for t in tensors.values()]).half()
    saved, offset = OrderedDict(), 0
    for name, tensor in tensors.items():
        view = flat[offset : offset + tensor.numel()].view(tensor.shape)
        saved[name] = nn.Parameter(view)
        offset += tensor.numel()
    torch.save(saved, path)

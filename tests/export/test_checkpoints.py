"""Readers: what was saved is what is read, and every kind of wrong file is one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalygpt_edge.export.checkpoints import (
    check_fit,
    load_model,
    open_checkpoint_folder,
    open_checkpoints,
)
from anomalygpt_edge.export.gguf_llm import read_vocabulary
from anomalygpt_edge.export.imagebind import read_vision_config, vision_shapes
from anomalygpt_edge.export.keys import module_shapes
from anomalygpt_edge.export.tensor_files import CheckpointError, Tensors, open_tensors
from anomalygpt_edge.export.vicuna import read_lora
from anomalygpt_edge.models.anomalygpt import AnomalyGPTConfig
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.llama import LlamaConfig
from anomalygpt_edge.models.prompt_learner import PromptLearner, PromptLearnerConfig


def failure(paths) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoints(*paths))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_pickle(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    changed = change(content)
    torch.save(changed if isinstance(changed, OrderedDict) else content, path)


def test_nano_round_trip_is_identical(nano_model, nano_folder):
    loaded = load_model(open_checkpoint_folder(nano_folder))
    saved = nano_model.state_dict()
    assert loaded.config == nano_model.config
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        rounded = saved[name].half().float() if name.startswith("llama.") else saved[name]
        assert torch.equal(tensor, rounded), name


def test_nano_about_and_features(nano_folder):
    about = json.loads((nano_folder / "model.json").read_text())
    assert about["region_level"] == {"few_shot": 0.3, "zero_shot": None}
    assert about["classes"] == ["object", "metal nut"]
    features = open_checkpoint_folder(nano_folder).text_features
    assert list(features) == about["classes"]
    assert features["metal nut"].shape == (2, 32)


def test_originals_dimensions_are_read(originals):
    checkpoints = open_checkpoints(*originals.paths)
    assert checkpoints.config == originals.config
    assert checkpoints.llama.lora is not None
    assert checkpoints.llama.lora.scaling == 4.0  # alpha 32 over rank 8
    assert len(checkpoints.llama.lora.factors) == 4 * originals.config.llama.num_hidden_layers


def test_lora_is_merged_in_float32(originals):
    llama = open_checkpoints(*originals.paths).llama
    name = "model.layers.1.self_attn.k_proj.weight"
    delta = torch.load(originals.pandagpt, weights_only=True)
    prefix = "llama_model.base_model.model." + name.removesuffix("weight")
    a, b = (delta[f"{prefix}lora_{side}.default.weight"].double() for side in "AB")
    expected = llama.tensors[name].double() + 4.0 * b @ a
    assert torch.allclose(llama.merged(name).double(), expected, atol=1e-6)
    assert not torch.allclose(llama.merged(name), llama.tensors[name].float(), atol=1e-2)
    other = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(llama.merged(other), llama.tensors[other].float())


def test_peft_names_without_default(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    edit_pickle(copied.pandagpt, lambda d: OrderedDict((k.replace(".default", ""), v) for k, v in d.items()))
    assert open_checkpoints(*copied.paths).llama.lora is not None


@pytest.mark.parametrize("role", ["imagebind", "pandagpt", "anomalygpt"])
def test_truncated(originals, tmp_path, copy_of, role):
    copied = copy_of(originals, tmp_path)
    path = getattr(copied, role)
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert "truncated" in failure(copied.paths)
    assert str(path) in failure(copied.paths)


def test_truncated_shard_and_safetensors(originals, nano_folder, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    os.truncate(copied.vicuna / "pytorch_model-00002-of-00002.bin", 900)
    assert "pytorch_model-00002-of-00002.bin is truncated" in failure(copied.paths)
    cut = tmp_path / "imagebind.safetensors"
    cut.write_bytes((nano_folder / "imagebind.safetensors").read_bytes()[:5000])
    assert "truncated" in failure((cut, *copied.paths[1:]))


def test_empty_file_missing_file_missing_shard(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    (copied.vicuna / "pytorch_model-00001-of-00002.bin").unlink()
    assert "pytorch_model-00001-of-00002.bin does not exist" in failure(copied.paths)
    copied.anomalygpt.write_bytes(b"")
    assert "truncated or not a torch checkpoint" in failure(copied.paths)
    copied.imagebind.unlink()
    assert "imagebind_huge.pth does not exist" in failure(copied.paths)


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\noid sha256:1"]
)
def test_what_was_downloaded_instead_of_the_file(originals, tmp_path, copy_of, text):
    copied = copy_of(originals, tmp_path)
    copied.anomalygpt.write_text(text)
    assert "is not a torch checkpoint (it may be a web page or a Git LFS pointer" in failure(copied.paths)


@pytest.mark.parametrize("name", ["other.safetensors", "other.pt"])
def test_a_file_of_another_model(originals, tmp_path, name):
    other = tmp_path / name
    save = save_file if other.suffix == ".safetensors" else torch.save
    save({"resnet.weight": torch.ones(2)}, other)
    imagebind, vicuna, pandagpt, _, features = originals.paths
    message = failure((imagebind, vicuna, pandagpt, other, features))
    assert f"{other} is not the AnomalyGPT checkpoint: its keys (resnet.weight) belong to another model" in message


class Payload:
    def __reduce__(self):
        return os.system, ("touch poisoned",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("role", ["imagebind", "vicuna", "pandagpt", "anomalygpt"])
def test_pickle_with_code_is_refused(originals, tmp_path, copy_of, role, save, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied = copy_of(originals, tmp_path)
    path = getattr(copied, role)
    path = path / "pytorch_model-00002-of-00002.bin" if role == "vicuna" else path
    save(OrderedDict({"llama_proj.weight": Payload()}), path)
    message = failure(copied.paths)
    assert "contains code besides tensors" in message
    assert str(path) in message
    assert not (tmp_path / "poisoned").exists()


def test_not_a_state_dict(tmp_path):
    path = tmp_path / "training.pt"
    torch.save({"model": {"a": torch.ones(2)}, "step": 3}, path)
    with pytest.raises(CheckpointError, match="entry 'model' is a dict, not a tensor"):
        open_tensors(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match="contains a Tensor, not named tensors"):
        open_tensors(path)


def test_renamed_missing_and_extra_keys(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    key = "modality_trunks.vision.blocks.5.norm_1.weight"
    edit_pickle(copied.imagebind, lambda d: d.__setitem__(key + "_renamed", d.pop(key)))
    message = failure(copied.paths)
    assert f"lacks {key}" in message
    assert f"unexpected {key}_renamed" in message


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("vicuna/pytorch_model-00002-of-00002.bin", None),  # not in the index: nobody reads it
        ("pandagpt.pt", "has the unexpected key extra.weight: give PandaGPT's delta as published"),
        ("anomalygpt.pt", "has unexpected extra.weight"),
        (
            "imagebind_huge.pth",
            "has unexpected extra.weight: the file is not the unmodified imagebind_huge.pth",
        ),
    ],
)
def test_extra_keys_are_named(originals, tmp_path, copy_of, file, words):
    copied = copy_of(originals, tmp_path)
    edit_pickle(copied.imagebind.parent / file, lambda d: d.__setitem__("extra.weight", torch.ones(2)))
    if words is None:
        open_checkpoints(*copied.paths)
    else:
        assert words in failure(copied.paths)


def test_swapped_files_are_named(originals):
    imagebind, vicuna, panda, anomaly, features = originals.paths
    message = failure((imagebind, vicuna, anomaly, panda, features))
    assert "is the AnomalyGPT checkpoint, but it was given as PandaGPT's" in message
    assert "is the PandaGPT checkpoint" in failure((panda, vicuna, imagebind, anomaly, features))


def test_delta_of_another_size(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)

    def widen(delta):
        return OrderedDict(
            (k, torch.zeros(96, 32) if k == "llama_proj.weight" else v) for k, v in delta.items()
        )

    edit_pickle(copied.pandagpt, widen)
    message = failure(copied.paths)
    assert "PandaGPT delta for width 96" in message
    assert "width 64" in message


def test_lora_missing_or_incomplete(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    key = "llama_model.base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight"
    edit_pickle(copied.pandagpt, lambda d: d.pop(key))
    assert "lacks lora_B of model.layers.1.self_attn.o_proj" in failure(copied.paths)
    edit_pickle(copied.pandagpt, lambda d: OrderedDict((k, v) for k, v in d.items() if "lora" not in k))
    assert "contains no LoRA weights" in failure(copied.paths)


def test_lora_of_fewer_layers(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    edit_pickle(copied.pandagpt, lambda d: OrderedDict((k, v) for k, v in d.items() if ".layers.2." not in k))
    assert "LoRA for 2 layers but the language model has 3" in failure(copied.paths)


def test_wrong_shape_is_named(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    key = "image_decoder.fc.1.weight"
    edit_pickle(copied.anomalygpt, lambda d: d.__setitem__(key, torch.zeros(32, 63)))
    message = failure(copied.paths)
    assert key in message
    assert "(32, 63) instead of (32, 64)" in message


LORA_B = "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("imagebind_huge.pth", "modality_trunks.vision.blocks.31.mlp.fc2.bias"),
        ("vicuna/pytorch_model-00001-of-00002.bin", "model.layers.0.mlp.up_proj.weight"),
        ("pandagpt.pt", LORA_B),
        ("pandagpt.pt", "llama_proj.bias"),
        ("anomalygpt.pt", "image_decoder.fc.3.weight"),
        ("anomalygpt.pt", "prompt_learner.base_prompts"),
    ],
)
def test_a_value_that_is_no_number_is_named(originals, tmp_path, copy_of, file, key, value):
    copied = copy_of(originals, tmp_path)
    path = copied.imagebind.parent / file
    edit_pickle(path, lambda d: d[key].detach().view(-1).__setitem__(-1, float(value)))
    message = failure(copied.paths)
    assert f"{key} contains NaN or infinite values" in message
    assert str(path.parent if "vicuna" in file else path) in message


def test_config_of_another_model(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    path = copied.vicuna / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"hidden_size": 128}))
    assert "hidden_size 128 but the weights have width 64" in failure(copied.paths)
    path.write_text(json.dumps(settings | {"rope_scaling": {"type": "linear", "factor": 8}}))
    assert "rope_scaling" in failure(copied.paths)
    path.write_text("{")
    assert "config.json is not readable JSON" in failure(copied.paths)


def test_shard_index_cannot_leave_the_folder(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    path = copied.vicuna / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../pandagpt.pt"
    path.write_text(json.dumps(index))
    assert "not a plain file name" in failure(copied.paths)


def test_text_features_are_checked(originals, tmp_path):
    path = tmp_path / "features.npz"
    for arrays, words in (
        ({"object": np.ones((2, 16), np.float32)}, "instead of (2, 32)"),
        ({"object": np.ones((2, 32), np.float32)}, "does not have unit norm"),
        ({"object": np.array([{}], dtype=object)}, "not a readable npz"),
    ):
        np.savez(path, **arrays)
        assert words in failure((*originals.paths[:4], path))


def test_small_tower_needs_its_metadata(nano_folder, tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(nano_folder, folder)
    file = folder / "imagebind.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="'tap_layers' in the file's metadata"):
        open_checkpoint_folder(folder)


def test_share_of_neighbours_is_a_share(nano_folder, tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(nano_folder, folder)
    file = folder / "imagebind.safetensors"
    told = {"heads": "2", "tap_layers": "[0, 1, 2, 3]"}
    save_file(load_file(file), file, {**told, "neighbourhood": "0.4"})
    assert open_checkpoint_folder(folder).config.vision.neighbourhood == 0.4
    save_file(load_file(file), file, {**told, "neighbourhood": "40"})
    with pytest.raises(CheckpointError, match="must be a share, 0 to 1, not 40"):
        open_checkpoint_folder(folder)


def test_units_of_maps_are_known_ones(nano_folder, tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(nano_folder, folder)
    file = folder / "anomalygpt.safetensors"
    assert open_checkpoint_folder(folder).config.prompt_learner.map_units == "raw"
    save_file(load_file(file), file, {"map_units": '"normal variation"'})
    assert open_checkpoint_folder(folder).config.prompt_learner.map_units == "normal variation"
    save_file(load_file(file), file, {"map_units": '"metres"'})
    with pytest.raises(CheckpointError, match="'metres' of its anomaly maps is not one of raw, normal variation"):
        open_checkpoint_folder(folder)


def header_only(name: str, shapes) -> Tensors:
    """A checkpoint of any size of which only names and shapes are looked at."""
    return Tensors(Path(name), shapes, lambda key: pytest.fail(f"{key} was read"))


def lora_shapes(layers: int, width: int, rank: int = 32):
    names = [f"model.layers.{i}.self_attn.{p}_proj." for i in range(layers) for p in "qkvo"]
    a = {f"llama_model.base_model.model.{name}lora_A.default.weight": (rank, width) for name in names}
    b = {f"llama_model.base_model.model.{name}lora_B.default.weight": (width, rank) for name in names}
    return {**a, **b, "llama_proj.weight": (width, 1024), "llama_proj.bias": (width,)}


def test_imagebind_huge_is_recognised_by_its_shapes():
    others = {"modality_preprocessors.text.mask": (77, 77), "modality_heads.audio.0.weight": (768,)}
    tensors = header_only("imagebind_huge.pth", vision_shapes(VisionConfig()) | others)
    assert read_vision_config(tensors) == VisionConfig()


def test_13b_delta_on_a_7b_vicuna_is_named():
    panda = header_only("pandagpt.pt", lora_shapes(layers=40, width=5120))
    with pytest.raises(
        CheckpointError, match=r"LoRA for 40 layers \(13B\) but the language model has 32 \(7B\)"
    ):
        read_lora(panda, LlamaConfig())
    lora = read_lora(header_only("pandagpt.pt", lora_shapes(layers=32, width=4096)), LlamaConfig())
    assert lora is not None
    assert lora.scaling == 1.0
    learner = {
        f"prompt_learner.{k}": v for k, v in module_shapes(PromptLearner, PromptLearnerConfig()).items()
    }
    with pytest.raises(CheckpointError, match=r"PandaGPT delta for width 5120 \(13B\).* width 4096 \(7B\)"):
        check_fit(AnomalyGPTConfig(), panda, header_only("anomalygpt.pt", learner))


@pytest.mark.parametrize("extra_rows", [0, 1])
def test_sharded_safetensors_and_any_number_of_rows(nano_folder, tmp_path, extra_rows):
    """LLaMA has as many rows as pieces, Vicuna v0 one more; shards come as .bin or as safetensors."""
    folder = tmp_path / "nano"
    shutil.copytree(nano_folder, folder)
    vicuna = folder / "vicuna"
    tensors = load_file(vicuna / "model.safetensors")
    (vicuna / "model.safetensors").unlink()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.cat([tensors[key], tensors[key][:extra_rows]])
    halves = [
        {k: t for k, t in tensors.items() if k.startswith("model.layers.0.") == half} for half in (0, 1)
    ]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, vicuna / file)
    weight_map = {key: file for file, half in zip(files, halves, strict=True) for key in half}
    (vicuna / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoints = open_checkpoint_folder(folder)
    rows = len(tensors["lm_head.weight"])
    assert checkpoints.config.llama.vocab_size == rows  # whatever config.json says
    assert torch.equal(checkpoints.llama.merged("lm_head.weight"), tensors["lm_head.weight"].float())
    whole = read_vocabulary(vicuna / "tokenizer.model", rows)
    assert len(whole.pieces) == rows
    assert whole.pieces[-1].startswith(b"[PAD") == bool(extra_rows)


def test_rows_of_embedding_and_head_must_agree(nano_folder, tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(nano_folder, folder)
    file = folder / "vicuna" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.ones(1, 64)])
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight of another shape .* not a complete merged LLaMA"
    ):
        open_checkpoint_folder(folder)

"""Text features at export: read from ImageBind's text tower, computed once, equal to the original's ensemble."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from anomalygpt_edge.export import pipeline
from anomalygpt_edge.export.checkpoints import open_checkpoints
from anomalygpt_edge.export.imagebind import (
    read_text_config,
    read_vision_config,
    text_shapes,
    vision_shapes,
)
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.tensor_files import CheckpointError, Tensors, open_tensors
from anomalygpt_edge.export.text_tower import add_text_features
from anomalygpt_edge.models.clip_tokens import ClipTokenizer
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.original_names import TEXT_MASK, TEXT_SCALE, original_text_name
from anomalygpt_edge.models.prompts import ENSEMBLE_CLASSES, ensemble
from anomalygpt_edge.models.text_tower import TextConfig, TextEncoder
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.common.errors import ConfigError

TOWER = TextConfig(vocab_size=514, width=64, depth=2, heads=16, mlp_width=96, embed_dim=32)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(6)
    encoder = TextEncoder(TOWER)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def letters() -> ClipTokenizer:
    """Every byte its own token: the sentences of a class still fit in 77."""
    return ClipTokenizer([])


@pytest.fixture
def with_text(small, encoder, tmp_path) -> Path:
    """``small``'s ImageBind file with a text tower, its buffer and its scale."""
    tensors = load_file(small.imagebind)
    metadata = dict(open_tensors(small.imagebind).metadata)
    tensors |= {original_text_name(name): t.contiguous() for name, t in encoder.state_dict().items()}
    tensors[TEXT_MASK] = torch.full((77, 77), float("-inf")).triu_(1)
    tensors[TEXT_SCALE] = torch.tensor(4.6)
    path = tmp_path / "imagebind.safetensors"
    save_file(tensors, path, metadata)
    return path


def expected_features(encoder: TextEncoder, letters: ClipTokenizer, name: str) -> np.ndarray:
    """One sentence at a time, nothing padded, in float64."""
    double = TextEncoder(TOWER).double()
    double.load_state_dict(encoder.state_dict())
    means = []
    for sentences in ensemble(name):
        ids = [[512, *letters.encode(sentence), 513] for sentence in sentences]
        means.append(torch.cat([double(torch.tensor([row])) for row in ids]).mean(dim=0))
    return F.normalize(torch.stack(means), dim=-1).detach().numpy()


def edit(path: Path, change) -> None:
    metadata = dict(open_tensors(path).metadata)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_features_are_the_original_ensemble(small, with_text, encoder, letters):
    checkpoints = open_checkpoints(with_text, *small.paths[1:4])
    assert checkpoints.text == TOWER
    seen: list[str] = []
    features = add_text_features(checkpoints, letters, ["metal nut", "bracket"], seen.append).text_features
    assert seen == list(features) == ["metal nut", "bracket"]
    for name, value in features.items():
        assert value.dtype == np.float32
        assert np.allclose(value, expected_features(encoder, letters, name), atol=1e-5)


def test_bundle_carries_features_but_no_text_tower(
    small, with_text, encoder, letters, exported_networks, monkeypatch, tmp_path
):
    monkeypatch.setattr(pipeline, "open_tokenizer", lambda: letters)
    options = ExportOptions(with_text, *small.paths[1:4], text_features=None, out=tmp_path / "bundle")
    bundle = open_bundle(export_bundle(options).bundle)
    assert tuple(bundle.manifest.classes) == ENSEMBLE_CLASSES
    assert bundle.manifest.default_class == "object"
    assert np.allclose(bundle.text_features("pcb"), expected_features(encoder, letters, "pcb"), atol=1e-5)
    assert not any(source.startswith("text_features/") for source in bundle.manifest.sources)
    assert {"encoder.onnx", "decoder.onnx", "prompt_learner.onnx", "text_features.npz", "llm.gguf"} == set(
        bundle.manifest.files
    )
    chosen = replace(options, classes=("bracket", "pcb"), out=tmp_path / "chosen")
    assert open_bundle(export_bundle(chosen).bundle).manifest.classes == ["bracket", "pcb"]


def test_without_text_tower_the_file_is_asked_for(small):
    with pytest.raises(CheckpointError, match="no text tower: give --text-features"):
        open_checkpoints(*small.paths[:4])


def test_given_features_need_no_text_tower(small):
    assert open_checkpoints(*small.paths).text is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop(original_text_name("blocks.1.mlp.fc1.bias")),
            "lacks modality_trunks.text.blocks.1.mlp.fc1",
        ),
        (
            lambda t: t.update({"modality_heads.text.proj.2.weight": torch.ones(3)}),
            "unexpected modality_heads",
        ),
        (
            lambda t: t.update({original_text_name("head.weight"): torch.ones(48, 64)}),
            "text embeddings have width 48 but image embeddings 32",
        ),
        (
            lambda t: t.update({original_text_name("pos_embed"): torch.ones(1, 77, 32)}),
            r"\(1, 77, 32\) instead of \(1, 77, 64\)",
        ),
        (lambda t: t.update({TEXT_MASK: torch.zeros(5, 5)}), r"\(5, 5\) instead of \(77, 77\)"),
    ],
)
def test_damaged_text_tower_is_named(small, with_text, change, words):
    edit(with_text, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoints(with_text, *small.paths[1:4])


def test_poisoned_or_foreign_text_tower(small, with_text, letters):
    edit(with_text, lambda t: t[original_text_name("head.weight")].view(-1).__setitem__(3, float("nan")))
    checkpoints = open_checkpoints(with_text, *small.paths[1:4])
    with pytest.raises(CheckpointError, match=r"modality_heads\.text\.proj\.1\.weight contains NaN"):
        add_text_features(checkpoints, letters, ["pcb"])
    rows = {original_text_name("token_embedding.weight"): torch.ones(500, 64)}
    edit(with_text, lambda t: t.update(rows | {original_text_name("head.weight"): torch.ones(32, 64)}))
    checkpoints = open_checkpoints(with_text, *small.paths[1:4])
    with pytest.raises(CheckpointError, match="500 token embeddings but CLIP's vocabulary 514"):
        add_text_features(checkpoints, letters, ["pcb"])


def test_imagebind_huge_is_recognised_by_its_shapes():
    buffers = {TEXT_MASK: (77, 77), TEXT_SCALE: ()}
    shapes = vision_shapes(VisionConfig()) | text_shapes(TextConfig()) | buffers
    tensors = Tensors(Path("imagebind_huge.pth"), shapes, lambda key: pytest.fail(f"{key} was read"))
    assert read_text_config(tensors, read_vision_config(tensors).embed_dim) == TextConfig()


def test_heads_of_another_tower_come_from_its_metadata(small, with_text):
    tensors = load_file(with_text)
    metadata = dict(open_tensors(with_text).metadata)
    save_file(tensors, with_text, metadata | {"text_heads": json.dumps(4)})
    assert open_checkpoints(with_text, *small.paths[1:4]).text == replace(TOWER, heads=4)
    save_file(tensors, with_text, metadata | {"text_heads": json.dumps(5)})
    with pytest.raises(CheckpointError, match="'text_heads' in the file's metadata"):
        open_checkpoints(with_text, *small.paths[1:4])


def test_original_pickle_keeps_its_scale(originals, encoder, tmp_path, copy_of, letters):
    """The .pth holds an infinite mask and a 0-d scale, neither of which is read."""
    copied = copy_of(originals, tmp_path)
    tensors = torch.load(copied.imagebind, weights_only=True)
    tensors |= {original_text_name(name): t for name, t in encoder.state_dict().items()}
    tensors[TEXT_SCALE] = torch.tensor(4.6)
    torch.save(OrderedDict(tensors), copied.imagebind)
    checkpoints = add_text_features(open_checkpoints(*copied.paths[:4]), letters, ["pill"])
    assert np.allclose(
        checkpoints.text_features["pill"], expected_features(encoder, letters, "pill"), atol=1e-5
    )


@pytest.mark.parametrize("name", ["a/b", "a\\b", "line\nbreak", "x" * 65])
def test_class_names_are_plain_words(small, tmp_path, name):
    with pytest.raises(ConfigError, match="is not a class name"):
        ExportOptions(*small.paths, out=tmp_path / "bundle", classes=(name,))

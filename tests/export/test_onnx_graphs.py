"""The ONNX graphs: named tensors, dynamic batch, equal to torch, nothing of training or machine inside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from anomalygpt_edge.export import onnx_graphs
from anomalygpt_edge.export.checkpoints import load_model, open_checkpoints
from anomalygpt_edge.export.onnx_graphs import export_graph, graphs
from anomalygpt_edge.kernels import localise
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.runtime.vision.engines import open_engine

TAPS, PATCHES, WIDTH, EMBED, LLM = 4, 256, 64, 32, 64


@pytest.fixture(scope="module")
def model(small) -> AnomalyGPT:
    """What was exported, in torch."""
    return load_model(open_checkpoints(*small.paths), with_llama=False)


@pytest.fixture(scope="module")
def networks(exported):
    """The session's bundle: its folder and its three ONNX components."""
    components = exported.manifest.components
    return exported.bundle, {name: c for name, c in components.items() if name != "language_model"}


def shapes(specs):
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def test_tensors_are_named_and_batched(networks):
    _, components = networks
    encoder, decoder, learner = (components[name] for name in ("encoder", "decoder", "prompt_learner"))
    assert shapes(encoder.inputs) == {"pixels": ("float32", ["B", 3, 224, 224])}
    assert shapes(encoder.outputs) == {
        "image_embedding": ("float32", ["B", LLM]),
        "patch_features": ("float32", ["B", TAPS, PATCHES, WIDTH]),
    }
    assert shapes(decoder.inputs) == {
        "patch_features": ("float32", ["B", TAPS, PATCHES, WIDTH]),
        "text_features": ("float32", [2, EMBED]),
    }
    assert shapes(decoder.outputs) == {"patch_logits": ("float32", ["B", TAPS, PATCHES, 2])}
    assert shapes(learner.inputs) == {"anomaly_map": ("float32", ["B", 224, 224])}
    assert shapes(learner.outputs) == {"prompt_embeddings": ("float32", ["B", 18, LLM])}


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_to_torch_at_any_batch(networks, model, batch):
    folder, components = networks
    run = {name: open_engine(folder / c.file, c) for name, c in components.items()}
    rng = np.random.default_rng(batch)
    pixels = rng.standard_normal((batch, 3, 224, 224), dtype=np.float32)
    text = rng.standard_normal((2, EMBED), dtype=np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    encoded = run["encoder"].run(pixels=pixels)
    embedding, features = model.encode(torch.from_numpy(pixels))
    assert np.allclose(encoded["image_embedding"], embedding.numpy(), atol=1e-5)
    assert np.allclose(encoded["patch_features"], features.numpy(), atol=5e-5)
    logits = run["decoder"].run(patch_features=features.numpy(), text_features=text)["patch_logits"]
    expected_map = model.image_decoder(features, torch.from_numpy(text))
    assert np.allclose(localise(logits, 224), expected_map.numpy(), atol=1e-4)
    prompts = run["prompt_learner"].run(anomaly_map=expected_map.numpy())["prompt_embeddings"]
    assert np.allclose(prompts, model.prompt_learner(expected_map).numpy(), atol=1e-5)


def test_no_residue(networks):
    folder, components = networks
    for component in components.values():
        model = onnx.load(folder / component.file)
        assert model.opset_import[0].version == onnx_graphs.OPSET
        assert not model.functions
        assert not {node.op_type for node in model.graph.node} & {"Dropout", "Identity", "Cast", "Constant"}
        for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input):
            assert not part.metadata_props
        text = (folder / component.file).read_bytes()
        for word in (b".py", b"stack_trace", b"anomalygpt_edge"):
            assert word not in text


def test_same_model_same_bytes(networks, model, tmp_path):
    folder, _ = networks
    export_graph(graphs(model)[2], tmp_path)
    assert (tmp_path / "prompt_learner.onnx").read_bytes() == (folder / "prompt_learner.onnx").read_bytes()


def test_large_weights_lie_in_one_file_beside(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "EXTERNAL_DATA_BYTES", 10_000)
    component = export_graph(graphs(model)[2], tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["prompt_learner.onnx", "prompt_learner.onnx.data"]
    assert (tmp_path / "prompt_learner.onnx").stat().st_size < 30_000
    anomaly_map = np.full((1, 224, 224), 0.5, np.float32)
    outputs = open_engine(tmp_path / component.file, component).run(anomaly_map=anomaly_map)
    expected = model.prompt_learner(torch.from_numpy(anomaly_map)).numpy()
    assert np.allclose(outputs["prompt_embeddings"], expected, atol=1e-5)

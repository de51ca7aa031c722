"""The ONNX graphs: named tensors, dynamic batch, equal to torch, nothing of training or machine inside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from anomalygpt_edge.export import onnx_graphs
from anomalygpt_edge.export.onnx_graphs import export_graph, graphs
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.runtime.engines import open_engine

TAPS, PATCHES, WIDTH, EMBED, LLM = 4, 256, 64, 32, 64


@pytest.fixture(scope="module")
def exported(nano_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return folder, {graph.name: export_graph(graph, folder) for graph in graphs(nano_model)}


def shapes(specs):
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def test_tensors_are_named_and_batched(exported):
    _, components = exported
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
    assert shapes(decoder.outputs) == {"anomaly_map": ("float32", ["B", 224, 224])}
    assert shapes(learner.inputs) == {"anomaly_map": ("float32", ["B", 224, 224])}
    assert shapes(learner.outputs) == {"prompt_embeddings": ("float32", ["B", 18, LLM])}


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_to_torch_at_any_batch(exported, nano_model: AnomalyGPT, batch):
    folder, components = exported
    run = {name: open_engine(folder / c.file, c) for name, c in components.items()}
    rng = np.random.default_rng(batch)
    pixels = rng.standard_normal((batch, 3, 224, 224), dtype=np.float32)
    text = rng.standard_normal((2, EMBED), dtype=np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    encoded = run["encoder"].run(pixels=pixels)
    embedding, features = nano_model.encode(torch.from_numpy(pixels))
    assert np.allclose(encoded["image_embedding"], embedding.numpy(), atol=1e-5)
    assert np.allclose(encoded["patch_features"], features.numpy(), atol=5e-5)
    anomaly_map = run["decoder"].run(patch_features=features.numpy(), text_features=text)["anomaly_map"]
    expected_map = nano_model.image_decoder(features, torch.from_numpy(text))
    assert np.allclose(anomaly_map, expected_map.numpy(), atol=1e-4)
    prompts = run["prompt_learner"].run(anomaly_map=expected_map.numpy())["prompt_embeddings"]
    assert np.allclose(prompts, nano_model.prompt_learner(expected_map).numpy(), atol=1e-5)


def test_no_residue(exported):
    folder, components = exported
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


def test_same_model_same_bytes(exported, nano_model, tmp_path):
    folder, _ = exported
    graph = graphs(nano_model)[2]
    export_graph(graph, tmp_path)
    assert (tmp_path / "prompt_learner.onnx").read_bytes() == (folder / "prompt_learner.onnx").read_bytes()


def test_large_weights_lie_in_one_file_beside(nano_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "EXTERNAL_DATA_BYTES", 10_000)
    component = export_graph(graphs(nano_model)[0], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    assert (tmp_path / "encoder.onnx").stat().st_size < 100_000
    pixels = np.ones((1, 3, 224, 224), np.float32)
    outputs = open_engine(tmp_path / component.file, component).run(pixels=pixels)
    expected = nano_model.encode(torch.from_numpy(pixels))[0].numpy()
    assert np.allclose(outputs["image_embedding"], expected, atol=1e-5)

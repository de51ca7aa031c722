"""fp16 graphs: as good as the float32 ones, and nothing overflows that those can hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16

from anomalygpt_edge.export import onnx_graphs
from anomalygpt_edge.export.float16 import export_float16
from anomalygpt_edge.export.onnx_graphs import export_graph, graphs
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, Component, open_bundle
from anomalygpt_edge.runtime.vision.engines import open_engine

HALF_MAX = 65504


@pytest.fixture(scope="module")
def halved(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Component]]:
    folder = tmp_path_factory.mktemp("float16")
    bundle = open_bundle(tiny_bundle)
    return {
        name: (folder / f"{name}.onnx", export_float16(bundle.component_file(name), folder / f"{name}.onnx"))
        for name in NETWORKS
    }


def inputs(name: str, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    text = rng.normal(size=(2, 16)).astype(np.float32)
    return {
        "encoder": {"pixels": rng.normal(size=(batch, 3, 224, 224)).astype(np.float32)},
        "decoder": {
            "patch_features": rng.normal(size=(batch, 4, 256, 32)).astype(np.float32),
            "text_features": text / np.linalg.norm(text, axis=1, keepdims=True),
        },
        "prompt_learner": {"anomaly_map": rng.random((batch, 224, 224)).astype(np.float32)},
    }[name]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_as_good_as_float32(tiny_bundle: Path, halved, name: str, batch: int) -> None:
    bundle = open_bundle(tiny_bundle)
    expected = open_engine(bundle.component_file(name), bundle.manifest.components[name])
    for output, whole in expected.run(**inputs(name, batch)).items():
        half = open_engine(*halved[name]).run(**inputs(name, batch))[output]
        error = np.abs(half - whole).max() / np.abs(whole).max()
        assert 0 < error < 2e-3, (
            output
        )  # float16's rounding is 5e-4; no error would mean nothing was converted


def test_inputs_and_outputs_stay(tiny_bundle: Path, halved) -> None:
    components = open_bundle(tiny_bundle).manifest.components
    for name, (_, component) in halved.items():
        assert (component.inputs, component.outputs) == (components[name].inputs, components[name].outputs)
        assert component.precision == "fp16"
    assert halved["encoder"][0].stat().st_size < 0.7 * (tiny_bundle / "encoder.onnx").stat().st_size


def test_products_are_in_float16_and_the_rest_is_not(halved) -> None:
    """Read from the types that strongly typed builders infer."""
    model = onnx.shape_inference.infer_shapes(onnx.load(halved["encoder"][0]), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    found = Counter((node.op_type, types[node.output[0]]) for node in model.graph.node)
    depth = 4
    assert found["Conv", half] == 1
    assert found["MatMul", half] == 6 * depth  # qkv, scores, values, out, fc1, fc2
    assert found["Gemm", full] == 2  # head and llama_proj: one row
    assert found["LayerNormalization", full] == 2 * depth + 2
    assert found["Softmax", full] == depth
    for operation in ("LayerNormalization", "Softmax", "Gelu", "Add", "ReduceL2", "Div"):
        assert not found[operation, half]


@pytest.fixture(scope="module")
def loud(tiny_model: AnomalyGPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of a model whose residual stream goes far beyond float16: one channel by a bias, one by a product."""
    folder = tmp_path_factory.mktemp("loud")
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    block = tiny_model.encoder.blocks[0]
    try:
        with torch.no_grad():
            block.attn.out_proj.bias[3] = 2e5
            block.mlp.fc1.bias += 1
            block.mlp.fc2.weight[5] = 1e4
            for graph in graphs(tiny_model)[:2]:
                export_graph(graph, folder)
    finally:
        tiny_model.load_state_dict(state)
    return folder


def evaluate(path: Path, **given: np.ndarray) -> dict[str, np.ndarray]:
    """Every node in its own type, as a strongly typed engine runs it: onnxruntime's CPU would use float32."""
    evaluator = ReferenceEvaluator(str(path))
    with np.errstate(over="ignore", invalid="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True))


def run_both(folder: Path, suffix: str) -> dict[str, np.ndarray]:
    """Encoder, and the decoder on the taps as the encoder gives them."""
    found = evaluate(folder / f"encoder{suffix}.onnx", **inputs("encoder", 1))
    given = inputs("decoder", 1) | {"patch_features": found["patch_features"]}
    return found | evaluate(folder / f"decoder{suffix}.onnx", **given)


def test_activations_beyond_float16_survive(loud: Path) -> None:
    for name in ("encoder", "decoder"):
        export_float16(loud / f"{name}.onnx", loud / f"{name}.half.onnx")
    whole, half = run_both(loud, ""), run_both(loud, ".half")
    channels = np.abs(whole["patch_features"]).max(axis=(0, 1, 2))
    assert (channels > HALF_MAX).sum() == 2
    for output in ("image_embedding", "patch_features", "patch_logits"):
        error = np.abs(half[output] - whole[output]).max()
        assert error < 5e-3 * np.abs(whole[output]).max(), output


def test_the_usual_conversion_does_not_survive(loud: Path) -> None:
    """That the test above can fail: everything in float16, as TensorRT's FP16 flag allowed, gives no number."""
    model = convert_float_to_float16(onnx.load(loud / "encoder.onnx"), keep_io_types=False)
    onnx.save(model, loud / "usual.onnx")
    pixels = inputs("encoder", 1)["pixels"].astype(np.float16)
    features = evaluate(loud / "usual.onnx", pixels=pixels)["patch_features"]
    assert not np.isfinite(features).all()


def test_a_weight_beyond_float16_keeps_its_product_in_float32(tiny_model: AnomalyGPT, tmp_path: Path) -> None:
    weight = tiny_model.image_decoder.fc[0].weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight[0, 0] = 1e5
        export_graph(graphs(tiny_model)[1], tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    component = export_float16(tmp_path / "decoder.onnx", tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    assert sum(weight.data_type == onnx.TensorProto.FLOAT16 for weight in model.graph.initializer) == 3
    result = open_engine(tmp_path / "half.onnx", component).run(**inputs("decoder", 1))
    assert np.isfinite(result["patch_logits"]).all()


def test_weights_beside_the_graph_stay_beside_it(
    tiny_model: AnomalyGPT, halved, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(onnx_graphs, "EXTERNAL_DATA_BYTES", 10_000)
    export_graph(graphs(tiny_model)[0], tmp_path)
    (tmp_path / "half").mkdir()
    path = tmp_path / "half" / "encoder.onnx"
    component = export_float16(tmp_path / "encoder.onnx", path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    assert path.stat().st_size < 100_000
    one = open_engine(path, component).run(**inputs("encoder", 1))
    other = open_engine(*halved["encoder"]).run(**inputs("encoder", 1))
    np.testing.assert_array_equal(one["patch_features"], other["patch_features"])

"""INT8 graphs: close to float32 where channels are alike and where some are outliers, and worse when told wrongly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from anomalygpt_edge.export import quantize
from anomalygpt_edge.export.calibration import MAX_IMAGES, calibration_images, calibration_pixels
from anomalygpt_edge.export.onnx_graphs import Graph, export_graph
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.parity import draw_part
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.quantize import to_int8
from anomalygpt_edge.models.imagebind import Block
from anomalygpt_edge.runtime.bundle import Preprocess, open_bundle
from anomalygpt_edge.runtime.errors import ConfigError
from anomalygpt_edge.runtime.inspector import Inspector

WIDTH, TOKENS = 64, 33
SETTINGS = Preprocess(224, "crop", [0.5, 0.5, 0.5], [0.25, 0.25, 0.25])


class Blocks(nn.Module):
    """Two transformer blocks; ``outlier`` is the scale of a few channels behind every LayerNorm."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(Block(WIDTH, 4, 4 * WIDTH) for _ in range(2)))
        for block in self.blocks:
            for norm in (block.norm_1, block.norm_2):
                norm.weight.data[::16] = outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def graph_of(outlier: float, folder: Path) -> Path:
    module = Blocks(outlier).eval().requires_grad_(False)
    component = export_graph(Graph("blocks", module, {"x": torch.zeros(2, TOKENS, WIDTH)}, ("y",)), folder)
    return folder / component.file


def batches(seed: int, count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def error(source: Path, target: Path) -> float:
    """Relative (RMS), on tokens that calibration did not see, three at a time."""
    x = np.concatenate([batch["x"] for batch in batches(seed=9, count=3)])
    exact = run(source, x)
    return float(np.linalg.norm(run(target, x) - exact) / np.linalg.norm(exact))


def test_every_linear_layer_is_int8_and_the_result_stays(tmp_path):
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    component = to_int8(source, target, batches(0))
    graph = onnx.load(target).graph
    int8 = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(int8) == 8
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 8
    zeros = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".zero")]
    assert zeros
    assert not any(zero.any() for zero in zeros)  # symmetric: TensorRT takes nothing else
    assert (component.precision, component.file) == ("int8", "int8.onnx")
    assert component.inputs[0].shape == ["B", TOKENS, WIDTH]
    assert 1e-4 < error(source, target) < 0.02


def test_outlier_channels_are_equalised(tmp_path, monkeypatch):
    source = graph_of(60.0, tmp_path)
    to_int8(source, tmp_path / "equalised.onnx", batches(0))
    monkeypatch.setattr(quantize, "STRENGTHS", (0.0,))
    monkeypatch.setattr(quantize, "MAX_ERROR", 1.0)
    to_int8(source, tmp_path / "plain.onnx", batches(0))
    assert error(source, tmp_path / "equalised.onnx") < error(source, tmp_path / "plain.onnx") / 2


def test_a_layer_that_int8_ruins_stays_float(tmp_path, monkeypatch):
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    monkeypatch.setattr(quantize, "MAX_ERROR", 0.0)
    to_int8(source, target, batches(0))
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(target).graph.node)
    assert error(source, target) < 1e-6


def test_scales_come_from_the_images(tmp_path):
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    faint = [{"x": 1e-6 * batch["x"]} for batch in batches(0)]  # LayerNorm's eps then flattens everything
    to_int8(source, target, faint)
    assert error(source, target) > 0.1


def test_calibration_images_are_spread_over_the_folder(tmp_path):
    for index in range(3 * MAX_IMAGES):
        cv2.imwrite(str(tmp_path / f"{index:03d}.png"), np.full((8, 8, 3), index, np.uint8))
    images = calibration_images(tmp_path)
    assert len(images) == MAX_IMAGES
    assert (images[0].name, images[-1].name) == ("000.png", f"{3 * MAX_IMAGES - 1:03d}.png")
    assert calibration_images(None) == []
    for empty in (tmp_path / "000.png", tmp_path / "none"):
        with pytest.raises(ConfigError, match="holds no image"):
            calibration_images(empty)


def test_generated_images_are_varied():
    pixels = np.concatenate(list(calibration_pixels([], SETTINGS)))
    assert pixels.shape[1:] == (3, 224, 224)
    assert len(pixels) > 10
    assert pixels.std(axis=0).mean() > 0.5


def test_export_to_int8_passes_its_gate_and_inspects(small, tmp_path, exported_networks):
    normals = tmp_path / "normals"
    normals.mkdir()
    for seed in range(4):
        cv2.imwrite(str(normals / f"{seed}.png"), draw_part(50 + seed, scratched=False))
    options = ExportOptions(
        *small.paths, out=tmp_path / "bundle", precision="int8", calibration=normals, llm_quant="q8_0"
    )
    report = export_bundle(options)
    manifest = open_bundle(options.out).manifest
    stages = [result.stage for result in report.parity]
    assert (
        stages.index("zero_shot_map") < stages.index("answer_logits f16") < stages.index("few_shot_map int8")
    )
    assert stages[-1] == "answer_tokens int8 + q8_0"
    assert manifest.components["encoder"].precision == "int8"
    assert manifest.components["decoder"].precision == "fp32"
    assert "calibration/0.png" in manifest.sources
    assert not (options.out / "encoder.onnx").exists()
    with Inspector.open(options.out, threads=1) as inspector:
        assert np.isfinite(inspector.inspect(draw_part(seed=7, scratched=True)).anomaly_map).all()


def test_calibration_without_int8_is_a_mistake(small, tmp_path):
    with pytest.raises(ConfigError, match="--calibration serves --precision int8"):
        replace(ExportOptions(*small.paths, out=tmp_path / "bundle"), calibration=tmp_path)

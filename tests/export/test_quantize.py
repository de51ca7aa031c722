"""INT8 graphs: close to float32 where channels are alike and where some are outliers, and worse when told wrongly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import nn

from anomalygpt_edge.export import int8_graph, rounding
from anomalygpt_edge.export.calibration import MAX_IMAGES, calibration_images, calibration_pixels
from anomalygpt_edge.export.onnx_graphs import Graph, export_graph
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.quantize import to_int8
from anomalygpt_edge.export.samples import draw_part
from anomalygpt_edge.models.imagebind import Block
from anomalygpt_edge.runtime.bundles.bundle import Component, Preprocess, open_bundle
from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision.engines import Engine, open_engine
from anomalygpt_edge.runtime.vision.engines.onnxruntime import open_session

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
    return open_session(path, "cpu", 1).run(None, {"x": x})[0]


def count(path: Path, op: str) -> int:
    return sum(node.op_type == op for node in onnx.load(path, load_external_data=False).graph.node)


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
    zero = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "int8.zero")
    assert zero == 0  # symmetric: TensorRT takes nothing else
    assert (component.precision, component.file) == ("int8", "int8.onnx")
    assert component.inputs[0].shape == ["B", TOKENS, WIDTH]
    assert 1e-4 < error(source, target) < 0.02


def test_outlier_channels_are_equalised(tmp_path, monkeypatch):
    source = graph_of(60.0, tmp_path)
    to_int8(source, tmp_path / "equalised.onnx", batches(0))
    monkeypatch.setattr(rounding, "STRENGTHS", (0.0,))
    to_int8(source, tmp_path / "plain.onnx", batches(0))
    assert error(source, tmp_path / "equalised.onnx") < 0.7 * error(source, tmp_path / "plain.onnx")


class Limited:
    """Accepts what is nearer than ``limit`` (RMS, relative) on tokens that calibration did not see."""

    def __init__(self, source: Path, limit: float) -> None:
        self.limit = np.sign(limit) * limit**2
        self._folder = source.parent
        self._x = np.concatenate([batch["x"] for batch in batches(seed=9, count=3)])
        self._exact = run(source, self._x)

    def open(self, component: Component) -> Engine:
        return open_engine(self._folder / component.file, component)

    def errors(self, engine: Engine, quick: bool = False) -> np.ndarray:
        found = engine.run(x=self._x)["y"]
        return np.array([np.square(found - self._exact).sum() / np.square(self._exact).sum()])


def test_as_many_products_as_are_asked_for(tmp_path):
    """One pass, two for so many layers, float32 for so many: the least that is accepted."""
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    to_int8(source, target, batches(0))
    plain = error(source, target)
    roundings = []
    for share in (1.1, 0.8, 0.5, 0.2, 0.05):
        to_int8(source, target, batches(0), Limited(source, share * plain))
        assert error(source, target) <= share * plain
        roundings.append(count(target, "QuantizeLinear"))
    assert roundings[0] == 8  # of eight layers
    assert 8 < roundings[1] < roundings[2] <= 16  # some are rounded twice
    assert 0 <= roundings[4] < 16  # some are float32
    to_int8(source, target, batches(0), Limited(source, -1.0))
    assert count(target, "QuantizeLinear") == 0
    assert error(source, target) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks.onnx", "int8.onnx", "int8.onnx.data"]


def test_what_costs_most_gets_its_second_pass_first(tmp_path):
    """A layer whose output hardly counts stays in one pass."""
    torch.manual_seed(0)
    faint, loud = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 80, bias=False)
    faint.weight.data *= 1e-3

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.faint, self.loud = faint, loud

        def forward(self, x):
            return torch.cat([self.faint(torch.tanh(x)), self.loud(torch.sin(x))], dim=-1)

    two = Graph("two", Two().eval().requires_grad_(False), {"x": torch.zeros(2, TOKENS, WIDTH)}, ("y",))
    source, target = tmp_path / export_graph(two, tmp_path).file, tmp_path / "int8.onnx"
    to_int8(source, target, batches(0))
    to_int8(source, tmp_path / "better.onnx", batches(0), Limited(source, 0.85 * error(source, target)))
    graph = onnx.load(tmp_path / "better.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}
    (split,) = (node for node in graph.node if node.op_type == "Split")
    weight = made_by[made_by[split.input[0]].input[1]].input[0]
    assert [list(t.dims) for t in graph.initializer if t.name == weight] == [[WIDTH, 80]]


def test_weights_make_up_for_each_others_rounding(tmp_path, monkeypatch):
    """On tokens that are alike, as a network's are; measured on others of the same kind."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((8, WIDTH)) + 0.05 * rng.standard_normal((8, WIDTH))
    tokens, others = (
        (rng.standard_normal((400, 8)) @ mixing + 0.02 * rng.standard_normal((400, WIDTH))).astype(np.float32)
        for _ in range(2)
    )
    weight = (30 * rng.standard_normal((WIDTH, 50))).astype(np.float32)

    def error_of(rounded):
        return np.linalg.norm(others @ (rounded - weight))

    assert error_of(rounding.round_weights(weight, tokens)) < 0.3 * error_of(np.rint(weight))
    monkeypatch.setattr(rounding, "MAX_CHANNELS", WIDTH // 2)
    assert error_of(rounding.round_weights(weight, tokens)) < 0.6 * error_of(np.rint(weight))


def test_one_sided_tokens_use_the_whole_range():
    rng = np.random.default_rng(0)
    x = torch.nn.functional.gelu(torch.from_numpy(rng.standard_normal((40, 256)))).numpy()
    plain, skewed = (
        rounding.Coding(np.zeros(256), np.ones(256), skew).rounded(x) - x for skew in rounding.SKEWS
    )
    assert np.square(skewed).sum() < 0.35 * np.square(plain).sum()
    deep = -x  # where they are not one-sided, nothing is clipped
    step = 16 * np.abs(deep).max(axis=1) / rounding.LEVELS
    assert (
        np.abs(rounding.Coding(np.zeros(256), np.ones(256), 16.0).rounded(deep) - deep).max(axis=1) < step
    ).all()


def test_images_unlike_the_calibrations_are_not_clipped(tmp_path):
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    faint = [{"x": 1e-6 * batch["x"]} for batch in batches(0)]  # LayerNorm's eps then flattens everything
    to_int8(source, target, faint)
    assert error(source, target) < 0.05


def test_a_token_of_zeros_stays_finite(tmp_path):
    source, target = graph_of(1.0, tmp_path), tmp_path / "int8.onnx"
    to_int8(source, target, batches(0))
    assert np.isfinite(run(target, np.zeros((1, TOKENS, WIDTH), np.float32))).all()


@pytest.mark.parametrize(
    ("image", "kernel", "padding", "unfolded"),
    [((7, 7), (5, 5), 0, True), ((4, 9), (3, 2), 0, True), ((7, 7), (5, 5), 1, False)],
)
def test_convolutions_over_few_positions_become_products(tmp_path, image, kernel, padding, unfolded):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(96, 160, kernel, padding=padding), nn.ReLU()).eval()
    module.requires_grad_(False)
    component = export_graph(Graph("net", module, {"x": torch.zeros(2, 96, *image)}, ("y",)), tmp_path)
    model = int8_graph.load(tmp_path / component.file)
    assert any(node.op_type == "MatMul" for node in model.graph) == unfolded
    onnx_ir.save(model, tmp_path / "unfolded.onnx")
    onnx.checker.check_model(str(tmp_path / "unfolded.onnx"), full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 96, *image)).astype(np.float32)
    exact = run(tmp_path / component.file, x)
    np.testing.assert_allclose(run(tmp_path / "unfolded.onnx", x), exact, atol=1e-4)
    to_int8(tmp_path / component.file, tmp_path / "int8.onnx", [{"x": x}])
    assert count(tmp_path / "int8.onnx", "QuantizeLinear") == unfolded
    assert np.abs(run(tmp_path / "int8.onnx", x) - exact).max() < 0.02 * np.abs(exact).max()


def test_calibration_images_are_spread_over_the_folder(tmp_path):
    for index in range(3 * MAX_IMAGES):
        cv2.imwrite(str(tmp_path / f"{index:03d}.png"), np.full((8, 8, 3), index, np.uint8))
    images = calibration_images(tmp_path)
    assert len(images) == MAX_IMAGES
    assert (images[0].name, images[-1].name) == ("000.png", f"{3 * MAX_IMAGES - 1:03d}.png")
    assert calibration_images(None) == []
    for empty in (tmp_path / "000.png", tmp_path / "none"):
        with pytest.raises(ConfigError, match="contains no image"):
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
    with pytest.raises(ConfigError, match="--calibration needs --precision int8"):
        replace(ExportOptions(*small.paths, out=tmp_path / "bundle"), calibration=tmp_path)

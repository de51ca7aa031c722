"""A prompt learner that reads evidence and looks at the picture beside the map, from its checkpoint to graphs of every
precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalygpt_edge.export import precision
from anomalygpt_edge.export.checkpoints import load_model, open_checkpoint_folder
from anomalygpt_edge.export.float16 import export_float16
from anomalygpt_edge.export.int8_graph import linears, load
from anomalygpt_edge.export.onnx_graphs import Graph, export_graph, graphs
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.parity import Parity, sample_cases
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.quantize import to_int8
from anomalygpt_edge.export.reference import Reference
from anomalygpt_edge.export.samples import draw_part
from anomalygpt_edge.export.survey import describe_anomalygpt, needs_of
from anomalygpt_edge.export.tensor_files import CheckpointError, open_tensors
from anomalygpt_edge.kernels import preprocess
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.models.evidence import NUM_FIGURES
from anomalygpt_edge.models.prompt_learner import PromptLearner, PromptLearnerConfig
from anomalygpt_edge.runtime.bundles.bundle import Bundle, TensorSpec, open_bundle
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision.engines import open_engine

MAP = TensorSpec("anomaly_map", "float32", ["B", 224, 224])
NUM_SAMPLES = TensorSpec("num_samples", "float32", ["B"])
PIXELS = TensorSpec("pixels", "float32", ["B", 3, 224, 224])
EVIDENCE_NET = tuple(f"evidence_net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))
LOOK_KERNELS = tuple(f"look_net.convs.{i}.weight" for i in range(3))


@pytest.fixture(scope="module")
def checkpoint(seeing_options: ExportOptions) -> Path:
    return seeing_options.imagebind.parent


@pytest.fixture(scope="module")
def bundle(seeing_bundle: Path) -> Bundle:
    return open_bundle(seeing_bundle)


def pixels_of(bundle: Bundle, frame: np.ndarray) -> np.ndarray:
    spec = bundle.manifest.preprocess
    return preprocess(frame, spec.size, spec.resize, spec.mean, spec.std)


def differ(one: np.ndarray | Tensor, other: np.ndarray | Tensor) -> float:
    """Relative to the largest value."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / np.abs(one).max())


# -- checkpoints --------------------------------------------------------------------------------


def changed(checkpoint: Path, folder: Path, **tensors: Tensor | None) -> Path:
    """A copy with other tensors of the prompt learner; None removes one."""
    copied = shutil.copytree(checkpoint, folder / "checkpoint")
    stored = load_file(copied / "anomalygpt.safetensors")
    for name, tensor in tensors.items():
        key = f"prompt_learner.{name}"
        del stored[key]
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, copied / "anomalygpt.safetensors")
    return copied


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint_folder(checkpoint)
    message = str(caught.value)
    assert str(checkpoint / "anomalygpt.safetensors") in message
    assert "\n" not in message
    return message


def test_the_width_of_evidence_is_read_from_the_shapes(
    checkpoint: Path, seeing_model: AnomalyGPT, tiny_bundle: Path
) -> None:
    loaded = load_model(open_checkpoint_folder(checkpoint))
    assert loaded.config == seeing_model.config
    assert loaded.config.prompt_learner.evidence_width == 16
    for name, tensor in seeing_model.prompt_learner.state_dict().items():
        assert torch.equal(loaded.prompt_learner.state_dict()[name], tensor)
    plain = open_checkpoint_folder(tiny_bundle.parent / "checkpoint").config
    assert plain.prompt_learner.evidence_width == 0


def test_a_learner_without_these_keys_reads_the_map_alone(
    checkpoint: Path, seeing_model: AnomalyGPT, tmp_path: Path
) -> None:
    keys = [key for key in seeing_model.prompt_learner.state_dict() if key.startswith(("evidence_", "look_"))]
    config = open_checkpoint_folder(changed(checkpoint, tmp_path, **dict.fromkeys(keys))).config
    assert config.prompt_learner.inputs == ("anomaly_map",)


@pytest.mark.parametrize("kind", ["evidence", "look"])
def test_a_learner_reads_what_it_has_a_network_for(
    checkpoint: Path, seeing_model: AnomalyGPT, tmp_path: Path, kind: str
) -> None:
    keys = [key for key in seeing_model.prompt_learner.state_dict() if key.startswith(kind)]
    config = open_checkpoint_folder(changed(checkpoint, tmp_path, **dict.fromkeys(keys))).config
    left = {"evidence": "pixels", "look": "num_samples"}[kind]
    assert config.prompt_learner.inputs == ("anomaly_map", left)


@pytest.mark.parametrize("name", LOOK_KERNELS)
def test_a_look_that_is_incomplete_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    message = refusal(changed(checkpoint, tmp_path, **{name: None}))
    assert f"lacks prompt_learner.{name}, of the network that looks at the picture" in message
    assert "whole checkpoint again" in message


@pytest.mark.parametrize("name", ["look_net.head.0.weight", "look_words.2.bias", "look_net.convs.1.bias"])
def test_a_look_of_another_shape_or_without_a_layer_is_refused(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    message = refusal(changed(checkpoint, tmp_path / "other", **{name: torch.ones(7)}))
    assert f"has prompt_learner.{name} of another shape ((7,) instead of" in message
    message = refusal(changed(checkpoint, tmp_path / "none", **{name: None}))
    assert f"lacks prompt_learner.{name}" in message


@pytest.mark.parametrize("more", [-1, 1])
def test_evidence_of_another_version_is_refused(checkpoint: Path, tmp_path: Path, more: int) -> None:
    figures = NUM_FIGURES + more
    message = refusal(changed(checkpoint, tmp_path, **{EVIDENCE_NET[0]: torch.ones(16, figures)}))
    assert f"reads {figures} figures of evidence, and this program computes {NUM_FIGURES}: use the" in message


@pytest.mark.parametrize("name", EVIDENCE_NET)
def test_evidence_that_is_incomplete_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    message = refusal(changed(checkpoint, tmp_path, **{name: None}))
    assert f"lacks prompt_learner.{name}, of the network that reads evidence" in message
    assert "whole checkpoint again" in message


@pytest.mark.parametrize("name", EVIDENCE_NET[1:])
def test_evidence_of_another_shape_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    message = refusal(changed(checkpoint, tmp_path, **{name: torch.ones(7)}))
    assert f"has prompt_learner.{name} of another shape ((7,) instead of" in message


def test_the_survey_says_so_and_counts_its_weights(
    checkpoint: Path, tiny_model: AnomalyGPT, seeing_model: AnomalyGPT
) -> None:
    said = describe_anomalygpt(open_tensors(checkpoint / "anomalygpt.safetensors"))
    assert "its prompt learner reads evidence and the picture beside the map; setup: unknown" in said
    config = open_checkpoint_folder(checkpoint).config
    learner = seeing_model.prompt_learner
    beside = (learner.evidence_net, learner.look_net, learner.look_words)
    weights = sum(parameter.numel() for network in beside for parameter in network.parameters())
    assert needs_of(config).networks - needs_of(tiny_model.config).networks == 4 * weights


# -- graphs -------------------------------------------------------------------------------------


def test_inputs_are_declared(bundle: Bundle, tiny_bundle: Path) -> None:
    components = bundle.manifest.components
    assert components["prompt_learner"].inputs == [MAP, NUM_SAMPLES, PIXELS]
    assert open_bundle(tiny_bundle).manifest.components["prompt_learner"].inputs == [MAP]


def spot(size: float, row: int = 60, column: int = 150) -> np.ndarray:
    """float32 [S, S], 1 at its peak."""
    rows, columns = np.mgrid[:224, :224]
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2 / size**2).astype(np.float32)


MAPS = {
    "noise": np.random.default_rng(0).random((3, 224, 224), dtype=np.float32),
    "spots": np.stack([spot(5), 0.3 * spot(20), spot(4, 210, 10) + spot(4, 10, 210)]),
    "line": np.stack([np.exp(-((np.arange(224)[:, None] - np.arange(224)) ** 2) / 8).astype(np.float32)] * 3),
    "nothing": np.zeros((3, 224, 224), np.float32),  # a part that is in the bank
    "below nothing": np.full((3, 224, 224), -1e-7, np.float32),  # its distances are not exactly 0
}


PICTURES = np.random.default_rng(1).normal(size=(3, 3, 224, 224)).astype(np.float32)
PICTURES[1] = PICTURES[1, :, ::56, ::56].repeat(56, 1).repeat(56, 2)  # a dark and a bright corner
PICTURES[2] = 0  # nothing to see


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equal_to_torch_at_any_batch(
    bundle: Bundle, seeing_model: AnomalyGPT, tmp_path: Path, kind: str, batch: int, precision: str
) -> None:
    learner, path = bundle.manifest.components["prompt_learner"], bundle.component_file("prompt_learner")
    if precision == "fp16":
        learner = export_float16(path, tmp_path / "half.onnx")
        path = tmp_path / "half.onnx"
    given = {"anomaly_map": MAPS[kind], "num_samples": np.array([0, 1, 4], np.float32), "pixels": PICTURES}
    given = {name: array[:batch] for name, array in given.items()}
    found = open_engine(path, learner).run(**given)["prompt_embeddings"]
    expected = seeing_model.prompt_learner(*map(torch.from_numpy, given.values()))
    assert differ(expected, found) < (1e-5 if precision == "fp32" else 1e-3)


def test_a_graph_takes_all(bundle: Bundle) -> None:
    learner = bundle.manifest.components["prompt_learner"]
    engine = open_engine(bundle.component_file("prompt_learner"), learner)
    one = np.zeros((1, 224, 224), np.float32)
    with pytest.raises(ValueError, match=r"inputs are \['anomaly_map'\], not"):
        engine.run(anomaly_map=one)
    with pytest.raises(ValueError, match="num_samples is float32"):
        engine.run(anomaly_map=one, num_samples=np.zeros(2, np.float32), pixels=PICTURES[:1])
    with pytest.raises(ValueError, match="num_samples is int64"):
        engine.run(anomaly_map=one, num_samples=np.zeros(1, np.int64), pixels=PICTURES[:1])
    with pytest.raises(ValueError, match="pixels is float32"):
        engine.run(anomaly_map=one, num_samples=np.zeros(1, np.float32), pixels=PICTURES[:2])


def test_what_tensorrt_cannot_parse_is_not_in_the_graph(bundle: Bundle) -> None:
    nodes = onnx.load(bundle.component_file("prompt_learner"), load_external_data=False).graph.node
    kinds = {node.op_type for node in nodes}
    assert not kinds & {"NonZero", "Loop", "If", "Scan", "Range", "Sort", "Unique", "CumSum"}
    assert sum(node.op_type == "TopK" for node in nodes) == 1


def test_evidence_stays_float32_in_float16(bundle: Bundle, tmp_path: Path) -> None:
    source = bundle.component_file("prompt_learner")
    export_float16(source, tmp_path / "half.onnx")
    graph = onnx.load(tmp_path / "half.onnx").graph
    halves = {node.output[0] for node in graph.node if is_cast_to(node, onnx.TensorProto.FLOAT16)}
    readers = [node.op_type for node in graph.node if halves & set(node.input)]
    assert readers == ["Conv"] * 9  # of the map and of the picture


def test_evidence_stays_float32_in_int8(tmp_path: Path) -> None:
    """Its layers are large enough here that int8 would take them; of the last convolution it does."""
    torch.manual_seed(0)
    config = PromptLearnerConfig((4, 4, 8, 8, 64), llm_width=64, evidence_width=64, look_channels=(16, 64, 64))
    learner = PromptLearner(config).eval().requires_grad_(False)
    example = {
        "anomaly_map": torch.zeros(2, 224, 224),
        "num_samples": torch.zeros(2),
        "pixels": torch.zeros(2, 3, 224, 224),
    }
    graph = Graph("prompt_learner", learner, example, ("prompt_embeddings",))
    source = tmp_path / export_graph(graph, tmp_path).file
    quantised = [node for nodes in linears(load(source).graph).values() for node in nodes]
    assert ["meta_net.15" in str(node.inputs[1].name) for node in quantised] == [True]
    counts = np.array([0, 4], np.float32)
    given = {"anomaly_map": MAPS["spots"][:2], "num_samples": counts, "pixels": PICTURES[:2]}
    component = to_int8(source, tmp_path / "int8.onnx", [{n: each[:1] for n, each in given.items()}])
    assert component.inputs == [MAP, NUM_SAMPLES, PIXELS]
    found = open_engine(tmp_path / "int8.onnx", component).run(**given)["prompt_embeddings"]
    expected = learner(*map(torch.from_numpy, given.values()))
    assert differ(expected[:, :9], found[:, :9]) < 1e-5
    assert 1e-5 < differ(expected[:, 9:], found[:, 9:]) < 0.02


def is_cast_to(node: onnx.NodeProto, dtype: int) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == dtype


# -- the gate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(open_checkpoint_folder(checkpoint))


def rows_of(model: AnomalyGPT, anomaly_map: Tensor, num_samples: int, pixels: np.ndarray) -> Tensor:
    """torch's prompt embeddings, [B, 18, D]."""
    counts = torch.full((len(anomaly_map),), float(num_samples))
    return model.prompt_learner(anomaly_map, counts, torch.from_numpy(pixels))


def test_both_sides_of_the_gate_see_each_cases_own_evidence(
    bundle: Bundle, reference: Reference, seeing_model: AnomalyGPT
) -> None:
    cases = sample_cases()
    parity = Parity(reference, bundle.folder, bundle.manifest, cases)
    maps = {kind: iter(parity.bundle[kind]) for kind in ("zero_shot_map", "few_shot_map")}
    rows = zip(cases, parity.bundle["prompt_embeddings"], parity.expected["prompt_embeddings"], strict=True)
    for case, found, expected in rows:
        anomaly_map = torch.from_numpy(next(maps["few_shot_map" if case.normals else "zero_shot_map"]))
        number = len(case.normals)
        own, miscounted = (
            rows_of(seeing_model, anomaly_map, count, pixels_of(bundle, case.frame))
            for count in (number, 0 if number else 1)
        )
        other = rows_of(seeing_model, anomaly_map, number, -pixels_of(bundle, case.frame))
        assert differ(own, found) < 1e-4
        assert differ(own, expected) < 1e-4
        assert differ(own, miscounted) > 1e-3
        assert differ(own, other) > 1e-3


@pytest.mark.parametrize("name", ["evidence_net.2.weight", "look_words.2.weight"])
def test_a_graph_that_does_not_read_all_fails(
    bundle: Bundle, checkpoint: Path, reference: Reference, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    blind = load_model(open_checkpoint_folder(checkpoint), with_llama=False)
    blind.prompt_learner.state_dict()[name].zero_()
    export_graph(graphs(blind)[2], folder)
    results = Parity(reference, folder, bundle.manifest, sample_cases()[:1]).networks()
    assert [result.stage for result in results if not result.passed] == ["prompt_embeddings"]


# -- precisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_a_bundle_of_another_precision_passes_its_gate_and_inspects(
    seeing_options: ExportOptions, tmp_path: Path, name: str
) -> None:
    normals = tmp_path / "normals"
    normals.mkdir()
    cv2.imwrite(str(normals / "0.png"), draw_part(50, scratched=False))
    calibration = normals if name == "int8" else None
    options = replace(seeing_options, out=tmp_path / "bundle", precision=name, calibration=calibration)
    stages = {result.stage: result for result in export_bundle(options).parity}
    assert 0 < stages[f"prompt_embeddings {name}"].error <= stages[f"prompt_embeddings {name}"].limit
    learner = open_bundle(options.out).manifest.components["prompt_learner"]
    assert (learner.precision, learner.inputs) == (name, [MAP, NUM_SAMPLES, PIXELS])
    with Inspector.open(options.out, threads=1) as inspector:
        verdict = inspector.inspect(draw_part(seed=7, scratched=True))
    assert verdict.sentence == "Yes, at the top left."


def test_int8_is_calibrated_on_each_map_with_its_evidence(
    bundle: Bundle, seeing_model: AnomalyGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def keep(source: Path, target: Path, batches: list[dict[str, np.ndarray]], *_: object) -> object:
        seen[target.name] = batches
        return bundle.manifest.components["encoder"]

    monkeypatch.setattr(precision, "to_int8", keep)
    samples = [pixels_of(bundle, draw_part(seed, scratched=True)) for seed in range(3)]
    precision.convert(bundle.folder, bundle.manifest, "int8", samples, samples)
    batches = seen["prompt_learner.int8.onnx"]
    assert len(batches) == 2 * len(samples)
    text = torch.from_numpy(bundle.text_features())
    for pixels, batch in zip(samples, batches, strict=False):
        _, features = seeing_model.encode(torch.from_numpy(pixels))
        np.testing.assert_allclose(
            batch["anomaly_map"], seeing_model.image_decoder(features, text), atol=1e-4
        )
    assert [batch["num_samples"].tolist() for batch in batches] == [[0.0]] * 3 + [[1.0]] * 3
    for batch, pixels in zip(batches, samples * 2, strict=True):
        np.testing.assert_array_equal(batch["pixels"], pixels)


def test_samples_are_judged_by_their_own_evidence(bundle: Bundle, seeing_model: AnomalyGPT) -> None:
    pixels = [pixels_of(bundle, draw_part(seed, scratched=True)) for seed in range(2)]
    for shown, stages in zip(pixels, precision.Samples(bundle, pixels).expected, strict=True):
        for number, kind in enumerate(("zero_shot_map", "few_shot_map")):
            anomaly_map, found = torch.from_numpy(stages[kind]), stages["prompt_embeddings"][number]
            assert differ(rows_of(seeing_model, anomaly_map, number, shown)[0], found) < 1e-4
            assert differ(rows_of(seeing_model, anomaly_map, 1 - number, shown)[0], found) > 1e-3

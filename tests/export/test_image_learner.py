"""A prompt learner that reads the image beside the map, from its checkpoint to graphs of every precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalygpt_edge.export import precision
from anomalygpt_edge.export.checkpoints import load_model, open_checkpoint_folder
from anomalygpt_edge.export.onnx_graphs import export_graph, graphs
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.parity import Parity, sample_cases
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.reference import Reference
from anomalygpt_edge.export.samples import draw_part
from anomalygpt_edge.export.survey import describe_anomalygpt, needs_of
from anomalygpt_edge.export.tensor_files import CheckpointError, open_tensors
from anomalygpt_edge.kernels import preprocess
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.runtime.bundle import Bundle, TensorSpec, open_bundle
from anomalygpt_edge.runtime.engines import open_engine
from anomalygpt_edge.runtime.inspector import Inspector

MAP = TensorSpec("anomaly_map", "float32", ["B", 224, 224])
PIXELS = TensorSpec("pixels", "float32", ["B", 3, 224, 224])
FIRST_KERNEL = "prompt_learner.meta_net.0.weight"


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


def with_channels(checkpoint: Path, folder: Path, channels: int) -> Path:
    """A copy whose learner's first convolution reads so many channels."""
    copied = shutil.copytree(checkpoint, folder / "checkpoint")
    tensors = load_file(copied / "anomalygpt.safetensors")
    outputs, _, *kernel = tensors[FIRST_KERNEL].shape
    tensors[FIRST_KERNEL] = torch.ones(outputs, channels, *kernel)
    save_file(tensors, copied / "anomalygpt.safetensors")
    return copied


def test_what_it_reads_is_read_from_the_kernel(checkpoint: Path, seeing_model: AnomalyGPT) -> None:
    loaded = load_model(open_checkpoint_folder(checkpoint))
    assert loaded.config == seeing_model.config
    assert loaded.config.prompt_learner.reads_image
    kernel = loaded.prompt_learner.state_dict()["meta_net.0.weight"]
    assert torch.equal(kernel, seeing_model.prompt_learner.state_dict()["meta_net.0.weight"])


def test_one_channel_is_the_map_alone(checkpoint: Path, tmp_path: Path) -> None:
    config = open_checkpoint_folder(with_channels(checkpoint, tmp_path, 1)).config
    assert not config.prompt_learner.reads_image


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_other_channels_are_refused(checkpoint: Path, tmp_path: Path, channels: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint_folder(with_channels(checkpoint, tmp_path, channels))
    message = str(caught.value)
    assert f"anomalygpt.safetensors: its prompt learner reads {channels} channels" in message
    assert "1, the anomaly map, or 4, map and image" in message
    assert "\n" not in message


def test_the_survey_says_so_and_counts_its_weights(checkpoint: Path, tiny_model: AnomalyGPT) -> None:
    said = describe_anomalygpt(open_tensors(checkpoint / "anomalygpt.safetensors"))
    assert "its prompt learner reads the image too; setup: unknown" in said
    config = open_checkpoint_folder(checkpoint).config
    outputs = config.prompt_learner.channels[0]
    assert needs_of(config).networks - needs_of(tiny_model.config).networks == 4 * outputs * 3 * 9


# -- graphs -------------------------------------------------------------------------------------


def test_inputs_are_declared(bundle: Bundle, tiny_bundle: Path) -> None:
    components = bundle.manifest.components
    assert components["prompt_learner"].inputs == [MAP, PIXELS]
    assert components["encoder"].inputs == [PIXELS]
    assert open_bundle(tiny_bundle).manifest.components["prompt_learner"].inputs == [MAP]


@pytest.mark.parametrize("batch", [1, 3])
def test_equal_to_torch_at_any_batch(bundle: Bundle, seeing_model: AnomalyGPT, batch: int) -> None:
    learner = bundle.manifest.components["prompt_learner"]
    rng = np.random.default_rng(batch)
    anomaly_map = rng.random((batch, 224, 224), dtype=np.float32)
    pixels = rng.standard_normal((batch, 3, 224, 224), dtype=np.float32)
    engine = open_engine(bundle.component_file("prompt_learner"), learner)
    found = engine.run(anomaly_map=anomaly_map, pixels=pixels)["prompt_embeddings"]
    expected = seeing_model.prompt_learner(torch.from_numpy(anomaly_map), torch.from_numpy(pixels))
    assert differ(expected, found) < 1e-5
    with pytest.raises(ValueError, match=r"inputs are \['anomaly_map'\], not"):
        engine.run(anomaly_map=anomaly_map)
    with pytest.raises(ValueError, match="pixels is float32"):
        engine.run(anomaly_map=anomaly_map, pixels=np.concatenate([pixels, pixels]))


# -- the gate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(open_checkpoint_folder(checkpoint))


def test_both_sides_of_the_gate_see_each_cases_own_image(
    bundle: Bundle, reference: Reference, seeing_model: AnomalyGPT
) -> None:
    cases = sample_cases()
    parity = Parity(reference, bundle.folder, bundle.manifest, cases)
    maps = {kind: iter(parity.bundle[kind]) for kind in ("zero_shot_map", "few_shot_map")}
    rows = zip(cases, parity.bundle["prompt_embeddings"], parity.expected["prompt_embeddings"], strict=True)
    for case, found, expected in rows:
        anomaly_map = torch.from_numpy(next(maps["few_shot_map" if case.normals else "zero_shot_map"]))
        own, *others = (
            seeing_model.prompt_learner(anomaly_map, torch.from_numpy(pixels_of(bundle, frame)))
            for frame in (case.frame, *case.normals)
        )
        assert differ(own, found) < 1e-4
        assert differ(own, expected) < 1e-4
        assert all(differ(own, other) > 1e-2 for other in others)


def test_a_graph_that_does_not_look_at_the_image_fails(
    bundle: Bundle, checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    blind = load_model(open_checkpoint_folder(checkpoint), with_llama=False)
    kernel = blind.prompt_learner.state_dict()["meta_net.0.weight"]
    kernel[:, 1:] = 0
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
    assert (learner.precision, learner.inputs) == (name, [MAP, PIXELS])
    with Inspector.open(options.out, threads=1) as inspector:
        verdict = inspector.inspect(draw_part(seed=7, scratched=True))
    assert verdict.sentence == "Yes, at the top left."


def test_int8_is_calibrated_on_each_map_with_its_image(
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
    for pixels, batch in zip(2 * samples, batches, strict=True):
        np.testing.assert_array_equal(batch["pixels"], pixels)


def test_samples_are_judged_by_their_own_image(bundle: Bundle, seeing_model: AnomalyGPT) -> None:
    pixels = [pixels_of(bundle, draw_part(seed, scratched=True)) for seed in range(2)]
    samples = precision.Samples(bundle, pixels)
    for own, other, stages in zip(pixels, pixels[::-1], samples.expected, strict=True):
        for row, kind in enumerate(("zero_shot_map", "few_shot_map")):
            anomaly_map = torch.from_numpy(stages[kind])
            expected = seeing_model.prompt_learner(anomaly_map, torch.from_numpy(own))[0]
            swapped = seeing_model.prompt_learner(anomaly_map, torch.from_numpy(other))[0]
            assert differ(expected, stages["prompt_embeddings"][row]) < 1e-4
            assert differ(swapped, stages["prompt_embeddings"][row]) > 1e-2

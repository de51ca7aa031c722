"""A prompt learner with more inputs than the map gets the number of normal samples and the encoder's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalygpt_edge.kernels import preprocess
from anomalygpt_edge.models.anomalygpt import AnomalyGPT
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.common.errors import BundleError
from anomalygpt_edge.runtime.evaluation.trace import trace_inspection
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status
from anomalygpt_edge.runtime.vision.engines import learner_inputs, open_networks
from anomalygpt_edge.runtime.vision.engines.agreement import compare_with_cpu
from anomalygpt_edge.runtime.vision.views import WHOLE, FrameSize, Layout, RegionOfInterest, Tiles

INPUTS = ["anomaly_map", "num_samples", "pixels"]
SIZE = FrameSize(width=160, height=120)
LAYOUTS = {
    "whole": WHOLE,
    "tiles": Layout(frame=SIZE, tiles=Tiles(rows=2, columns=3, overlap=0.2)),
    "regions": Layout(
        frame=SIZE,
        regions=(RegionOfInterest("screw", 0, 10, 60, 50), RegionOfInterest("label", 70, 40, 64, 48, 30.0)),
    ),
}
WAYS = {
    "inspect": lambda inspector: inspector.inspect(frame()),
    "trace": lambda inspector: trace_inspection(inspector, frame()),
    "ask": lambda inspector: inspector.ask(frame(), ""),
    "dialogue": lambda inspector: inspector.dialogue(frame()),
}


def frame(seed: int = 0) -> np.ndarray:
    """A frame of large blocks, in which no two tiles look the same."""
    corners = np.random.default_rng(seed).integers(0, 256, (4, 5, 3))
    return corners.repeat(30, 0).repeat(32, 1).astype(np.uint8)


def rows_of(model: AnomalyGPT, anomaly_map: np.ndarray, num_samples: int, pixels: np.ndarray) -> np.ndarray:
    """torch's prompt embeddings [18, D] of one view's map [S, S] and pixels [3, S, S]."""
    counts = torch.full((1,), float(num_samples))
    return model.prompt_learner(torch.tensor(anomaly_map)[None], counts, torch.tensor(pixels)[None])[
        0
    ].numpy()


def pixels_of(inspector: Inspector) -> np.ndarray:
    """The encoder's input for ``frame()`` in the current layout, float32 [views, 3, S, S]."""
    spec, product = inspector.bundle.manifest.preprocess, inspector.product
    boxes = [view.box for view in product.layout.views(frame().shape[:2])]
    return preprocess(frame(), spec.size, product.resize, spec.mean, spec.std, boxes=boxes)


@pytest.fixture(scope="module")
def opened(seeing_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(seeing_bundle, threads=1) as inspector:
        yield inspector


@pytest.fixture
def inspector(opened: Inspector) -> Inspector:
    opened.use(None)
    return opened


def use_layout(inspector: Inspector, layout: str, few_shot: bool) -> None:
    """Set the inspector's layout, with or without normal samples."""
    resize = "crop" if layout == "whole" else "stretch"
    inspector.use(replace(inspector.product, layout=LAYOUTS[layout], resize=resize))
    if few_shot:
        inspector.use(inspector.make_bank([frame(1), frame(2)]))


@pytest.mark.parametrize("few_shot", [False, True], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prompts_of_a_view_depend_on_its_map_its_pixels_and_the_number_of_samples(
    inspector: Inspector, seeing_model: AnomalyGPT, layout: str, few_shot: bool
) -> None:
    use_layout(inspector, layout, few_shot)
    vision, product = inspector.vision, inspector.product
    maps = vision.localise(vision.encode_frame(frame(), product), product).prompt_maps
    parts = inspector.parts(frame())
    assert len(parts) == LAYOUTS[layout].num_views
    right, wrong = (2, 0) if few_shot else (0, 2)
    shown = pixels_of(inspector)
    for index, (part, anomaly_map) in enumerate(zip(parts, maps, strict=True)):
        found, pixels = part.prompt_embeddings, shown[index]
        assert np.abs(found - rows_of(seeing_model, anomaly_map, right, pixels)).max() < 1e-4
        assert np.abs(found - rows_of(seeing_model, anomaly_map, wrong, pixels)).max() > 1e-3
        for other in (-pixels, *np.delete(shown, index, axis=0)):
            assert np.abs(found - rows_of(seeing_model, anomaly_map, right, other)).max() > 5e-4


@pytest.mark.parametrize("few_shot", [False, True], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("way", WAYS)
def test_every_call_passes_the_encoders_input_and_the_number_of_samples_to_the_learner(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, way: str, few_shot: bool
) -> None:
    layout = "whole" if way == "trace" else "tiles"
    use_layout(inspector, layout, few_shot)
    seen: dict[str, list[np.ndarray]] = {}
    counts: list[float] = []
    for name in ("encoder", "prompt_learner"):
        run = inspector.vision.networks[name].run

        def watched(name: str = name, run: Callable = run, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            seen.setdefault(name, []).append(inputs["pixels"])
            counts.extend(inputs.get("num_samples", ()))
            return run(**inputs)

        monkeypatch.setattr(inspector.vision.networks[name], "run", watched)
    WAYS[way](inspector)
    assert len(seen["encoder"]) == len(seen["prompt_learner"]) == 1
    assert seen["prompt_learner"][0] is seen["encoder"][0]
    assert counts == [2 if few_shot else 0] * LAYOUTS[layout].num_views


def test_a_trace_contains_the_inputs_of_its_prompts(inspector: Inspector, seeing_model: AnomalyGPT) -> None:
    trace = trace_inspection(inspector, frame())
    expected = rows_of(seeing_model, trace["anomaly_map"], 0, trace["pixels"][0])
    np.testing.assert_allclose(trace["prompt_embeddings"], expected, atol=1e-4)


def test_the_number_of_samples_is_that_of_the_bank(inspector: Inspector, seeing_model: AnomalyGPT) -> None:
    """The same frame several times: equal maps, different numbers of samples."""
    found = {}
    for count in (0, 1, 4):
        inspector.use(inspector.make_bank([frame(1)] * count, augmentation="none") if count else None)
        trace = trace_inspection(inspector, frame())
        found[count] = trace["prompt_embeddings"]
        expected = rows_of(seeing_model, trace["anomaly_map"], count, trace["pixels"][0])
        np.testing.assert_allclose(found[count], expected, atol=1e-4)
        part = inspector.part(frame())
        np.testing.assert_array_equal(part.prompt_embeddings, found[count])
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-2
    assert np.abs(found[4][0] - found[1][0]).max() > 1e-2
    np.testing.assert_allclose(found[4][1:], found[1][1:], atol=1e-4)


def test_the_number_of_samples_does_not_depend_on_the_number_of_patches(inspector: Inspector) -> None:
    inspector.use(inspector.make_bank([frame(1), frame(2)], max_patches=8, augmentation="moved"))
    inputs = []
    run = inspector.vision.networks["prompt_learner"].run
    inspector.vision.networks["prompt_learner"].run = lambda **given: inputs.append(given) or run(**given)
    try:
        inspector.part(frame())
    finally:
        inspector.vision.networks["prompt_learner"].run = run
    assert inputs[0]["num_samples"].tolist() == [2.0]


def test_a_missing_input_is_no_result(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspector.inspect(frame()).status is Status.FAIL
    monkeypatch.setattr(
        "anomalygpt_edge.runtime.vision.stages.learner_inputs",
        lambda learner, maps, *_: {"anomaly_map": maps},
    )
    verdict = inspector.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "inputs are ['anomaly_map'], not ['anomaly_map', 'num_samples', 'pixels']" in verdict.reason


def test_a_learner_gets_the_inputs_that_it_declares(seeing_bundle: Path, tiny_bundle: Path) -> None:
    anomaly_map, pixels = np.zeros((3, 224, 224), np.float32), np.zeros((3, 3, 224, 224), np.float32)
    for folder, names in ((tiny_bundle, INPUTS[:1]), (seeing_bundle, INPUTS)):
        learner = open_bundle(folder).manifest.components["prompt_learner"]
        given = learner_inputs(learner, anomaly_map, 4, pixels)
        assert list(given) == names
        assert given["anomaly_map"] is anomaly_map
    assert given["num_samples"].dtype == np.float32
    assert given["num_samples"].tolist() == [4, 4, 4]
    assert given["pixels"] is pixels


@pytest.mark.parametrize("wrong", ["pixels", "num_samples"])
def test_an_engine_that_gives_the_learner_other_inputs_is_refused(seeing_bundle: Path, wrong: str) -> None:
    bundle = open_bundle(seeing_bundle)
    networks = open_networks(bundle, "onnxruntime")
    assert all(error <= limit for _, error, limit in compare_with_cpu(bundle, "other", networks))
    right = networks["prompt_learner"]

    class Wrong:
        def run(self, **given: np.ndarray) -> dict[str, np.ndarray]:
            other = {"pixels": -given["pixels"], "num_samples": given["num_samples"] + 1}
            return right.run(**given | {wrong: other[wrong]})

        def close(self) -> None: ...

    networks["prompt_learner"] = Wrong()
    with pytest.raises(BundleError, match="prompt_embeddings differs by"):
        compare_with_cpu(bundle, "other", networks)


@pytest.mark.parametrize("few_shot", [False, True], ids=["zero-shot", "few-shot"])
def test_plans_with_a_smaller_batch_give_each_split_its_inputs(
    fakes, gpu_machine, inspector: Inspector, seeing_bundle: Path, tmp_path: Path, few_shot: bool
) -> None:
    """Six tiles, and plans for a batch of two."""
    bundle = fakes.with_plans(seeing_bundle, tmp_path / "bundle")
    with Inspector.open(bundle.folder, threads=1) as by_plans:
        assert by_plans.engine == "tensorrt"
        for each in (inspector, by_plans):
            use_layout(each, "tiles", few_shot)
        for found, expected in zip(by_plans.parts(frame()), inspector.parts(frame()), strict=True):
            np.testing.assert_allclose(found.prompt_embeddings, expected.prompt_embeddings, atol=1e-4)

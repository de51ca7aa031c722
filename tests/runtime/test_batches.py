"""Networks in batches of views: the same bits as of one batch, with bounded batches and progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Verdict
from anomalygpt_edge.runtime.recipes.recipe import Recipe
from anomalygpt_edge.runtime.vision import batches as module
from anomalygpt_edge.runtime.vision.batches import BATCH_VIEWS, LEAST_VIEWS, batches, run_in_batches
from anomalygpt_edge.runtime.vision.engines import AUTO, choose_engine, learner_inputs, open_networks
from anomalygpt_edge.runtime.vision.views import FrameSize, Tiles

FRAME = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
RECIPE = Recipe(
    name="tiled", frame=FrameSize(width=160, height=120), tiles=Tiles(rows=4, columns=6, overlap=0.1)
)


@given(st.integers(1, 300))
def test_batches_are_consecutive_and_bounded(num_views: int) -> None:
    parts = batches(num_views)
    assert [index for part in parts for index in range(num_views)[part]] == list(range(num_views))
    assert all(part.stop - part.start == BATCH_VIEWS for part in parts[:-1])
    last = parts[-1].stop - parts[-1].start
    assert min(num_views, LEAST_VIEWS) <= last < BATCH_VIEWS + LEAST_VIEWS


class Double:
    """A network that doubles its input, and notes the batches that it gets."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(inputs["views"]))
        return {"doubled": inputs["views"] * inputs["factor"]}


@given(st.integers(1, 60))
def test_outputs_keep_their_order_and_progress_reaches_the_end(num_views: int) -> None:
    engine, seen = Double(), []
    values = np.arange(3 * num_views, dtype=np.float32).reshape(num_views, 3)
    shared = {"factor": np.float32([2, 2, 2])}
    found = run_in_batches(
        engine, {"views": values}, shared, stage="encode", progress=lambda *step: seen.append(step)
    )
    np.testing.assert_array_equal(found["doubled"], 2 * values)
    assert max(engine.sizes) < BATCH_VIEWS + LEAST_VIEWS
    done = np.cumsum(engine.sizes).tolist()
    assert seen == [("encode", each, num_views) for each in done if len(done) > 1]


@pytest.mark.parametrize("num_views", [16, 19, 25, 29])
def test_the_networks_give_the_same_bits_as_in_one_batch(num_views: int) -> None:
    bundle = open_bundle(None)
    manifest = bundle.manifest
    networks = open_networks(bundle, choose_engine(bundle, AUTO), 1)
    rng = np.random.default_rng(num_views)
    side, map_size = manifest.preprocess.size, manifest.vision.map_size
    pixels = rng.normal(size=(num_views, 3, side, side)).astype(np.float32)
    text = {"text_features": bundle.text_features(manifest.default_class)}
    features = {"patch_features": networks["encoder"].run(pixels=pixels)["patch_features"]}
    maps = rng.random((num_views, map_size, map_size)).astype(np.float32)
    learner = learner_inputs(manifest.components["prompt_learner"], maps, 4, pixels)
    cases = (
        ("encoder", {"pixels": pixels}, {}),
        ("decoder", features, text),
        ("prompt_learner", learner, {}),
    )
    try:
        for name, views, shared in cases:
            whole = networks[name].run(**views, **shared)
            found = run_in_batches(networks[name], views, shared)
            assert found.keys() == whole.keys()
            for output in whole:
                np.testing.assert_array_equal(found[output], whole[output], err_msg=f"{name} {output}")
    finally:
        for network in networks.values():
            network.close()


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


def comparable(verdict: Verdict) -> dict:
    values = verdict.to_record()
    return {name: value for name, value in values.items() if name not in ("timings_ms", "costs_ms")}


@pytest.mark.parametrize("enrolled", [False, True])
def test_a_frame_of_many_tiles_is_judged_as_in_one_batch(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, enrolled: bool
) -> None:
    inspector.use(RECIPE)
    if enrolled:
        inspector.use(inspector.make_bank([FRAME[::-1].copy()]))
    steps: list[tuple[str, int, int]] = []
    inspector.watch(lambda *step: steps.append(step))
    found = inspector.inspect(FRAME)
    inspector.watch(None)
    stages = list(dict.fromkeys(step[0] for step in steps))
    assert [stage for stage in stages if stage != "judge"] == ["encode", *["localise"][enrolled:], "prompt"]
    assert all(total == 24 for _, _, total in steps)
    assert [done for stage, done, _ in steps if stage == "encode"] == [12, 24]
    monkeypatch.setattr(module, "BATCH_VIEWS", 1000)
    whole = inspector.inspect(FRAME)
    np.testing.assert_array_equal(found.maps, whole.maps)
    assert comparable(found) == comparable(whole)

"""The inspector with a small bundle, from frames to verdicts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from anomalygpt_edge.models.anomalygpt import AnomalyGPT, few_shot_distance, upsample_map
from anomalygpt_edge.runtime.bundles.bundle import Manifest, open_bundle, read_manifest, seal
from anomalygpt_edge.runtime.common.errors import (
    BundleError,
    ClosedError,
    ConfigError,
    ImageError,
    RecipeError,
)
from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status
from anomalygpt_edge.runtime.recipes.recipe import Recipe, load_recipe

STAGES = ["preprocess", "encode", "localise", "prompt", "judge", "decide"]


def frame(seed: int = 0, height: int = 120, width: int = 160) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(inspector: Inspector, image: np.ndarray) -> np.ndarray:
    vision, product = inspector.vision, inspector.product
    return vision.preprocess(image, vision.views(image, product), product)


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[Inspector]:
    with Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def zero_shot(inspector: Inspector) -> Inspector:
    inspector.use(None)
    return inspector


@pytest.fixture
def altered(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the bundle with a changed manifest, sealed again."""

    def alter(**changes: object) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(tiny_bundle, folder)
        seal(folder, msgspec.structs.replace(read_manifest(folder), **changes))
        return folder

    return alter


def swap_words(manifest: Manifest) -> object:
    words = manifest.prompt
    return msgspec.structs.replace(
        words, affirmative=words.negative, negative=words.affirmative, answers=None
    )


def test_an_inspection_gives_a_complete_verdict(zero_shot: Inspector) -> None:
    verdict = zero_shot.inspect(frame())
    assert verdict.status is Status.FAIL
    assert verdict.reason == "answered Yes"
    assert verdict.sentence == "Yes, at the top left."
    assert 0.5 < verdict.p_anomaly <= 1
    assert verdict.anomaly_map.shape == (224, 224)
    assert verdict.anomaly_map.dtype == np.float32
    assert verdict.peak == verdict.anomaly_map.max() >= verdict.score > 0
    assert list(verdict.timings_ms) == STAGES
    assert verdict.regions
    assert verdict.agreement is ({region.place for region in verdict.regions} == {"top left"})
    assert verdict.map_in_frame().shape == (120, 160)


def test_the_map_is_that_of_the_torch_model(zero_shot: Inspector, tiny_model: AnomalyGPT) -> None:
    pixels = pixels_of(zero_shot, frame())
    text = torch.tensor(zero_shot.product.text_features)
    with torch.no_grad():
        _, taps = tiny_model.encode(torch.tensor(pixels))
        expected = tiny_model.image_decoder(taps, text)[0].numpy()
    np.testing.assert_allclose(zero_shot.inspect(frame()).anomaly_map, expected, atol=1e-4)


def test_normal_samples_replace_the_text_map(zero_shot: Inspector, tiny_model: AnomalyGPT) -> None:
    normals = [frame(1), frame(2)]
    zero_shot.use(zero_shot.make_bank(normals))
    with torch.no_grad():
        _, query = tiny_model.encode(torch.tensor(pixels_of(zero_shot, frame(0))))
        banks = [tiny_model.encode(torch.tensor(pixels_of(zero_shot, normal)))[1] for normal in normals]
        distance = few_shot_distance(query, torch.cat(banks, dim=2))
        expected = upsample_map(distance)[0].numpy()
    vision, product = zero_shot.vision, zero_shot.product
    localised = vision.localise(vision.encode_frame(frame(0), product), product)
    np.testing.assert_allclose(localised.prompt_maps[0], expected, atol=1e-4)
    np.testing.assert_array_equal(localised.maps[0], zero_shot.inspect(frame(0)).anomaly_map)
    assert zero_shot.inspect(normals[1]).peak == pytest.approx(0, abs=1e-4)


def test_the_negative_answer_is_a_pass(altered: Callable[..., Path], tiny_bundle: Path) -> None:
    words = swap_words(read_manifest(tiny_bundle))
    with Inspector.open(altered(prompt=words), threads=1) as inspector:
        verdict = inspector.inspect(frame())
    assert verdict.status is Status.PASS
    assert verdict.p_anomaly < 0.5
    assert verdict.regions == ()
    assert verdict.agreement is None


def test_an_answer_that_is_neither_yes_nor_no_is_no_result(
    altered: Callable[..., Path], tiny_bundle: Path
) -> None:
    words = msgspec.structs.replace(
        read_manifest(tiny_bundle).prompt, affirmative="there", negative="image", answers=None
    )
    with Inspector.open(altered(prompt=words), threads=1) as inspector:
        verdict = inspector.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "neither" in verdict.reason
    assert verdict.anomaly_map is not None


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "frame.png",
        np.zeros((0, 10, 3), np.uint8),
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.uint16),
        np.full((10, 10, 3), np.nan),
        np.zeros((), np.uint8),
    ],
    ids=lambda bad: str(getattr(bad, "shape", bad)),
)
def test_an_invalid_frame_is_no_result(zero_shot: Inspector, bad: object) -> None:
    verdict = zero_shot.inspect(bad)  # type: ignore[arg-type]
    assert verdict.status is Status.NO_RESULT
    assert verdict.reason
    assert verdict.anomaly_map is None
    assert verdict.to_record()["status"] == "NO_RESULT"
    verdict.map_in_frame()
    with pytest.raises(ImageError):
        zero_shot.ask(bad, "What is it?")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(2, 3), (1, 500), (500, 1), (224, 224), (37, 1111)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_any_size_is_inspected(zero_shot: Inspector, size: tuple[int, int], resize: str) -> None:
    zero_shot.use(Recipe(name="part", resize=resize))  # type: ignore[arg-type]
    verdict = zero_shot.inspect(frame(0, *size))
    assert verdict.status is Status.FAIL, verdict.reason
    framed = verdict.map_in_frame(outside=-1)
    assert framed.shape == size
    for x, y, width, height in (region.box for region in verdict.regions):
        assert 0 <= x <= x + width <= size[1]
        assert 0 <= y <= y + height <= size[0]


@pytest.mark.parametrize("stage", ["encoder", "decoder", "prompt_learner"])
def test_a_failing_stage_is_no_result(
    zero_shot: Inspector, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    class Broken:
        def run(self, **_: np.ndarray) -> dict[str, np.ndarray]:
            raise MemoryError("out of memory")

    monkeypatch.setitem(zero_shot.vision.networks, stage, Broken())
    verdict = zero_shot.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "out of memory" in verdict.reason
    monkeypatch.undo()
    assert zero_shot.inspect(frame()).status is Status.FAIL


@pytest.mark.parametrize(
    ("stage", "output"),
    [("decoder", "patch_logits"), ("encoder", "image_embedding"), ("prompt_learner", None)],
)
def test_nan_from_a_network_is_no_result(
    zero_shot: Inspector, monkeypatch: pytest.MonkeyPatch, stage: str, output: str | None
) -> None:
    engine = zero_shot.vision.networks[stage]

    class Poisoned:
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            outputs = engine.run(**inputs)
            return {k: np.full_like(v, np.nan) if output in (k, None) else v for k, v in outputs.items()}

    monkeypatch.setitem(zero_shot.vision.networks, stage, Poisoned())
    verdict = zero_shot.inspect(frame())
    assert verdict.status is Status.NO_RESULT
    assert "finite" in verdict.reason
    assert verdict.status is not Status.PASS


def test_the_same_frame_gives_the_same_verdict(zero_shot: Inspector) -> None:
    first, second = zero_shot.inspect(frame()), zero_shot.inspect(frame())
    assert first.p_anomaly == second.p_anomaly
    np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)


def test_enrolment_gives_a_recipe_that_opens(zero_shot: Inspector, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "cap.toml"
    recipe = enroll(zero_shot, [frame(1)], out, name="cap", class_name="pcb", description="A cap.")
    assert zero_shot.product.bank is None, "enrolment restores the product"
    assert load_recipe(out) == recipe
    with Inspector.open(tiny_bundle, out, threads=1) as inspector:
        assert inspector.product.name == "cap"
        assert inspector.product.question == "A cap. Is there any anomaly in the image?"
        np.testing.assert_array_equal(
            inspector.product.text_features, open_bundle(tiny_bundle).text_features("pcb")
        )
        assert inspector.inspect(frame(1)).peak == pytest.approx(0, abs=1e-4)


def test_a_bank_of_another_encoder_is_refused(zero_shot: Inspector, tmp_path: Path) -> None:
    bank = zero_shot.make_bank([frame()])
    other = type(bank)(bank.features, 1, "0" * 64)
    with pytest.raises(RecipeError, match="another encoder"):
        zero_shot.use(other)


def test_invalid_classes_frames_and_recipes_are_refused(zero_shot: Inspector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown class name 'banana'"):
        zero_shot.prepare(class_name="banana")
    with pytest.raises(RecipeError, match="at least one"):
        zero_shot.make_bank([])
    with pytest.raises(ImageError):
        zero_shot.make_bank([np.zeros((4, 4), np.uint8)])
    recipe = enroll(zero_shot, [frame()], tmp_path / "r.toml", name="r")
    with pytest.raises(RecipeError, match="give the recipe's path"):
        zero_shot.use(recipe)


def test_asking_gives_the_answer(zero_shot: Inspector) -> None:
    answer = zero_shot.ask(frame(), "Is there any anomaly in the image?")
    assert answer.text == "Yes, at the top left."
    with pytest.raises(ConfigError, match="shorter question"):
        zero_shot.ask(frame(), "why " * 2000)
    assert zero_shot.inspect(frame()).status is Status.FAIL


def test_a_bundle_that_does_not_run_is_refused(altered: Callable[..., Path], tiny_bundle: Path) -> None:
    vision = msgspec.structs.replace(read_manifest(tiny_bundle).preprocess, size=210)
    with pytest.raises(BundleError, match="does not run"):
        Inspector.open(altered(preprocess=vision), threads=1)


@pytest.mark.parametrize("use", ["inspect", "ask", "dialogue", "earlier dialogue"])
def test_use_after_close_raises_closed_error(tiny_bundle: Path, use: str) -> None:
    inspector = Inspector.open(tiny_bundle, threads=1)
    earlier = inspector.dialogue(frame())
    inspector.close()
    inspector.close()
    calls = {
        "inspect": lambda: inspector.inspect(frame()),
        "ask": lambda: inspector.ask(frame(), "Is it good?"),
        "dialogue": lambda: inspector.dialogue(frame()).ask(),
        "earlier dialogue": lambda: earlier.ask(),
    }
    with pytest.raises(ClosedError, match="closed"):
        calls[use]()

"""The frame check: what is no picture of the enrolled product gets no verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.random import default_rng

from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status
from anomalygpt_edge.runtime.recipes.recipe import load_recipe
from anomalygpt_edge.runtime.synthetic.data import draw, held_out_families
from anomalygpt_edge.runtime.vision.frame_check import refuse_pixels

FAMILIES = held_out_families(6)


def good(family: int, count: int, seed: int) -> list[np.ndarray]:
    rng = default_rng([family, seed])
    return [draw(FAMILIES[family], rng, 0, variation=0.3).pixels for _ in range(count)]


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    with Inspector.open() as opened:
        yield opened


@pytest.fixture(scope="module", params=[0, 3])
def product(request: pytest.FixtureRequest, inspector: Inspector, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A product that is enrolled and in use."""
    path = tmp_path_factory.mktemp("recipe") / "part.toml"
    enroll(inspector, good(request.param, 4, 1), path, name="the part")
    assert load_recipe(path).frame_check is not None
    inspector.use(path)
    return int(request.param)


def made_up(part: np.ndarray) -> dict[str, np.ndarray]:
    width = part.shape[1]
    return {
        "black": part * 0,
        "white": part * 0 + 255,
        "grey": part * 0 + 128,
        "noise": default_rng(0).integers(0, 256, part.shape, np.uint8),
        "blurred": cv2.GaussianBlur(part, (0, 0), width / 8),
        "dark": part // 12,
    }


def test_frames_of_something_else_or_of_nothing_get_no_result(inspector: Inspector, product: int) -> None:
    others = {str(family): good(family, 1, 2)[0] for family in range(len(FAMILIES)) if family != product}
    for name, frame in {**made_up(good(product, 1, 2)[0]), **others}.items():
        verdict = inspector.inspect(frame)
        assert verdict.status is Status.NO_RESULT, name
        assert verdict.regions == ()
        assert any(word in verdict.reason for word in ("blank", "contrast", "dark", "bright", "does not look like"))


def test_parts_of_the_product_are_judged(inspector: Inspector, product: int) -> None:
    rng = default_rng(5)
    defective = [draw(FAMILIES[product], rng, 1, variation=0.3).pixels for _ in range(4)]
    lit = [np.clip(part * gain, 0, 255).astype(np.uint8) for part in good(product, 2, 3) for gain in (0.85, 1.15)]
    for frame in [*good(product, 4, 2), *defective, *lit]:
        verdict = inspector.inspect(frame)
        assert verdict.status is not Status.NO_RESULT, verdict.reason


def test_a_blank_frame_gets_no_result_without_normal_samples() -> None:
    part = good(0, 1, 1)[0]
    assert refuse_pixels(part, None) == ""
    for level in (0, 77, 255):
        assert "blank" in refuse_pixels(part * 0 + np.uint8(level), None)


def test_normal_samples_of_a_session_are_checked_too(tmp_path: Path) -> None:
    normals = good(0, 2, 1)
    with Inspector.open(normals=normals) as inspector:
        assert inspector.inspect(normals[0]).status is not Status.NO_RESULT
        assert inspector.inspect(np.zeros_like(normals[0])).status is Status.NO_RESULT

"""Enrolment checks all inputs before the encoder runs, and its errors name the input at fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import anomalygpt_edge as agpt
from anomalygpt_edge.runtime.enrolment.enroll import enroll
from anomalygpt_edge.runtime.enrolment.samples import Sample, identical_samples
from anomalygpt_edge.runtime.vision.views import RegionOfInterest, Tiles


def frame(seed: int = 0, height: int = 120, width: int = 160) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def inspector(tiny_bundle: Path) -> Iterator[agpt.Inspector]:
    with agpt.Inspector.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def idle(inspector: agpt.Inspector, monkeypatch: pytest.MonkeyPatch) -> agpt.Inspector:
    """An inspector whose encoder must not run."""

    def run(**_: np.ndarray) -> None:
        raise AssertionError("the encoder ran before everything was checked")

    monkeypatch.setattr(inspector.vision.networks["encoder"], "run", run)
    return inspector


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "--name is empty"),
        ({"name": "x" * 201}, "name"),
        ({"description": "x" * 501}, "description"),
        ({"storage": "float64"}, "--storage must be one of float32, float16, int8"),
        ({"max_patches": 0}, "--max-patches must be at least 1"),
        ({"augmentation": "twice"}, "--augmentation must be one of none, moved, turned, both"),
        ({"without_verdict": "pass"}, "--without-verdict must be no_result or map"),
        ({"class_name": "unicorn"}, "unicorn"),
        ({"tiles": Tiles(side=400)}, "--tiles 400 is larger than the frame of 160 x 120 pixels"),
        (
            {"regions": [RegionOfInterest(name="a", x=100, y=0, width=80, height=20)]},
            "does not lie in the frame",
        ),
        ({"false_reject_rate": 0.01}, "needs at least 99 good parts"),
        ({"held_out": [frame(7)]}, "--false-reject-rate"),
        (
            {"false_reject_rate": 0.5, "held_out": [frame(7), frame(1)]},
            "held-out image 2 has the same pixels as normal image 2",
        ),
    ],
)
def test_a_wrong_option_is_refused_before_the_encoder_runs(
    idle: agpt.Inspector, tmp_path: Path, changes: dict, message: str
) -> None:
    options = {"name": "part", **changes}
    with pytest.raises(agpt.AgptError, match=message):
        enroll(idle, [frame(0), frame(1)], tmp_path / "recipe.toml", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_path_that_cannot_be_written_is_refused(
    idle: agpt.Inspector, inspector: agpt.Inspector, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for out, message in ((tmp_path / "file" / "recipe.toml", "cannot write into"), (tmp_path, "is a folder")):
        with pytest.raises(agpt.ConfigError, match=message):
            enroll(idle, [frame()], out, name="part")


def test_the_recipes_folder_is_created(inspector: agpt.Inspector, tmp_path: Path) -> None:
    out = tmp_path / "recipes" / "gear" / "recipe.toml"
    enroll(inspector, [frame()], out, name="gear")
    assert {path.name for path in out.parent.iterdir()} == {"recipe.toml", "recipe.bank.npz"}
    inspector.use(out)
    assert inspector.inspect(frame()).status is not agpt.Status.NO_RESULT


def test_the_error_names_the_file_that_does_not_fit(idle: agpt.Inspector, tmp_path: Path) -> None:
    samples = [Sample("a.png", frame(0)), Sample("b.png", frame(1, width=200))]
    with pytest.raises(agpt.ImageError, match=r"b\.png has 200 x 120 pixels, but a\.png has 160 x 120"):
        enroll(idle, samples, tmp_path / "recipe.toml", name="part", tiles=Tiles(rows=2, columns=2))
    with pytest.raises(agpt.ImageError, match=r"c\.png: the frame has float32 pixels"):
        enroll(idle, [Sample("c.png", frame().astype(np.float32))], tmp_path / "recipe.toml", name="part")


def test_identical_samples_are_found_for_any_file_names() -> None:
    samples = [
        Sample("a.png", frame(0)),
        Sample("b.png", frame(1)),
        Sample("c.bmp", frame(0)),
        Sample("a.png", frame(0)),
    ]
    assert identical_samples(samples) == [("c.bmp", "a.png"), ("a.png", "a.png")]
    turned = Sample("d.png", frame(0).reshape(160, 120, 3))
    assert identical_samples([samples[0], turned]) == []


def test_enrolment_restores_the_product(inspector: agpt.Inspector, tmp_path: Path) -> None:
    inspector.use(None)
    before = inspector.product
    enroll(inspector, [frame()], tmp_path / "recipe.toml", name="part")
    assert inspector.product is before

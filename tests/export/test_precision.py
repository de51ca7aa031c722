"""Networks in int8 on the nano model: what is converted now passes the gate's limits, plain rounding does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.export import quantize, rounding
from anomalygpt_edge.export.calibration import calibration_pixels, sample_pixels
from anomalygpt_edge.export.parity import sample_cases
from anomalygpt_edge.export.precision import Samples, SamplesTrial, convert
from anomalygpt_edge.kernels import preprocess
from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, open_bundle

NANO = Path(__file__).parents[2] / "models" / "nano" / "bundle"


@pytest.fixture(scope="module")
def pixels():
    """Of calibration, of the samples, and of the images that the gate looks at."""
    settings = open_bundle(NANO).manifest.preprocess
    frames = {case.frame.tobytes(): case.frame for case in sample_cases()}.values()
    gate = [preprocess(f, settings.size, settings.resize, settings.mean, settings.std) for f in frames]
    return list(calibration_pixels([], settings)), list(sample_pixels([], settings)), gate


@pytest.fixture
def nano(tmp_path):
    """Nano's bundle to write beside, opened."""
    folder = shutil.copytree(NANO, tmp_path / "bundle")
    return open_bundle(folder)


def errors(bundle, component, gate) -> np.ndarray:
    """Of the gate's images, over the gate's limits."""
    samples = Samples(bundle, gate)
    return samples.errors("encoder", samples.open(component))


def test_int8_holds_on_images_that_it_was_not_fitted_to(nano, pixels):
    calibration, samples, gate = pixels
    shares: list[float] = []
    components = convert(nano.folder, nano.manifest, "int8", calibration, samples, shares.append)
    assert [components[name].precision for name in NETWORKS] == ["int8", "fp32", "int8"]
    assert (errors(nano, components["encoder"], gate) <= 1).all()
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert 0.9 < shares[-1] <= 1


def test_plain_rounding_fails_the_gate(nano, pixels, monkeypatch):
    """Every token and every weight rounded once to the nearest step, as before: the gate sees it."""
    calibration, _, gate = pixels
    source, target = nano.folder / "encoder.onnx", nano.folder / "plain.onnx"
    monkeypatch.setattr(rounding, "SKEWS", (1.0,))
    monkeypatch.setattr(rounding, "round_weights", lambda weight, tokens: np.rint(weight).astype(np.int8))
    component = quantize.to_int8(source, target, [{"pixels": each} for each in calibration])
    assert errors(nano, component, gate).max() > 1


def test_samples_are_neither_calibrations_nor_the_gates(pixels):
    groups = [{each.tobytes() for each in group} for group in pixels]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert SamplesTrial.limit < 1

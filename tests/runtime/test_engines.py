"""Engines: the file must be what the manifest describes, and so must every input."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anomalygpt_edge.runtime.bundle import Component, TensorSpec, open_bundle
from anomalygpt_edge.runtime.engines import open_engine
from anomalygpt_edge.runtime.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> tuple[Path, Component]:
    bundle = open_bundle(tiny_bundle)
    return bundle.component_file("decoder"), bundle.manifest.components["decoder"]


def inputs(batch: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "patch_features": rng.normal(size=(batch, 4, 256, 32)).astype(np.float32),
        "text_features": np.eye(2, 16, dtype=np.float32),
    }


def test_a_batch_is_the_single_runs(decoder: tuple[Path, Component]) -> None:
    engine = open_engine(*decoder)
    whole = inputs(3)
    maps = engine.run(**whole)["anomaly_map"]
    assert maps.shape == (3, 224, 224)
    single = engine.run(**whole | {"patch_features": whole["patch_features"][1:2]})["anomaly_map"]
    np.testing.assert_allclose(maps[1:2], single, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch_features": np.zeros((1, 4, 256, 31), np.float32)}, "patch_features is float32"),
        ({"patch_features": np.zeros((4, 256, 32), np.float32)}, "patch_features is float32"),
        ({"patch_features": np.zeros((1, 4, 256, 32))}, "patch_features is float64"),
        ({"pixels": np.zeros(1, np.float32)}, "inputs are"),
    ],
)
def test_other_inputs_are_refused(
    decoder: tuple[Path, Component], change: dict[str, np.ndarray], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        open_engine(*decoder).run(**inputs() | change)
    with pytest.raises(ValueError, match="inputs are"):
        open_engine(*decoder).run()


def test_a_file_that_is_another_network_is_refused(decoder: tuple[Path, Component]) -> None:
    path, component = decoder
    renamed = msgspec.structs.replace(component, outputs=[TensorSpec("map", "float32", ["B", 224, 224])])
    with pytest.raises(BundleError, match="the manifest says"):
        open_engine(path, renamed)
    resized = msgspec.structs.replace(
        component, outputs=[TensorSpec("anomaly_map", "float32", ["B", 224, 225])]
    )
    with pytest.raises(BundleError, match="the manifest says"):
        open_engine(path, resized)


def test_a_file_that_is_no_network_is_refused(decoder: tuple[Path, Component], tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no network")
    with pytest.raises(BundleError, match="onnxruntime cannot load"):
        open_engine(tmp_path / "decoder.onnx", decoder[1])


def test_unknown_engines_and_providers_are_refused(decoder: tuple[Path, Component], tmp_path: Path) -> None:
    other = shutil.copy(decoder[0], tmp_path / "decoder.mlmodel")
    with pytest.raises(BundleError, match="no engine runs"):
        open_engine(Path(other), decoder[1])
    with pytest.raises(ConfigError, match="choose one of cpu"):
        open_engine(*decoder, provider="abacus")

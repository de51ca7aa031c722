"""Engines: files and inputs must match the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, Bundle, Component, TensorSpec, open_bundle
from anomalygpt_edge.runtime.common.errors import BundleError, ConfigError
from anomalygpt_edge.runtime.vision.engines import (
    BACKENDS,
    Backend,
    choose_engine,
    open_engine,
    open_networks,
)
from anomalygpt_edge.runtime.vision.engines import onnxruntime as backend
from anomalygpt_edge.runtime.vision.engines.agreement import compare_with_cpu


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


def test_a_batch_gives_the_same_results_as_single_runs(decoder: tuple[Path, Component]) -> None:
    engine = open_engine(*decoder)
    whole = inputs(3)
    logits = engine.run(**whole)["patch_logits"]
    assert logits.shape == (3, 4, 256, 2)
    single = engine.run(**whole | {"patch_features": whole["patch_features"][1:2]})["patch_logits"]
    np.testing.assert_allclose(logits[1:2], single, atol=1e-4)


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


def test_a_file_with_other_outputs_than_the_manifest_is_refused(decoder: tuple[Path, Component]) -> None:
    path, component = decoder
    renamed = msgspec.structs.replace(component, outputs=[TensorSpec("logits", "float32", ["B", 4, 256, 2])])
    with pytest.raises(BundleError, match="but the manifest has"):
        open_engine(path, renamed)
    resized = msgspec.structs.replace(
        component, outputs=[TensorSpec("patch_logits", "float32", ["B", 4, 256, 3])]
    )
    with pytest.raises(BundleError, match="but the manifest has"):
        open_engine(path, resized)


def test_a_file_that_is_not_a_network_is_refused(decoder: tuple[Path, Component], tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no network")
    with pytest.raises(BundleError, match="onnxruntime cannot load"):
        open_engine(tmp_path / "decoder.onnx", decoder[1])


def test_a_file_of_another_kind_is_refused(decoder: tuple[Path, Component], tmp_path: Path) -> None:
    other = shutil.copy(decoder[0], tmp_path / "decoder.mlmodel")
    with pytest.raises(BundleError, match="no engine can run"):
        open_engine(Path(other), decoder[1])


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def test_without_a_gpu_the_cpu_is_chosen(bundle: Bundle) -> None:
    assert choose_engine(bundle) == "onnxruntime"
    assert choose_engine(bundle, "onnxruntime") == "onnxruntime"
    for engine in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"):
        with pytest.raises(ConfigError, match=f"--engine {engine} cannot run here: .*install"):
            choose_engine(bundle, engine)
    with pytest.raises(ConfigError, match="--engine 'abacus' is not known: choose one of auto, tensorrt"):
        choose_engine(bundle, "abacus")


def test_the_best_engine_that_can_run_is_chosen(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    can_run: set[str] = set()

    def unavailable_reason(self: Backend, _: Bundle | None) -> str:
        return "" if self in {BACKENDS[name] for name in can_run} else "not here: do something"

    monkeypatch.setattr(Backend, "unavailable_reason", unavailable_reason)
    for engine in ("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"):
        can_run |= {engine, "onnxruntime-tensorrt"}  # the last one is never chosen automatically
        assert choose_engine(bundle) == engine
    assert choose_engine(bundle, "onnxruntime-tensorrt") == "onnxruntime-tensorrt"


def test_providers_and_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGPT_CACHE", str(tmp_path / "cache"))
    assert backend.provider_options("cpu") == [("CPUExecutionProvider", {})]
    assert [name for name, _ in backend.provider_options("cuda")] == [
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    first, options = backend.provider_options("tensorrt")[0]
    assert first == "TensorrtExecutionProvider"
    assert Path(options["trt_engine_cache_path"]).is_dir()


def test_a_provider_that_does_not_start_is_refused(
    decoder: tuple[Path, Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime would run on the CPU instead, without an error."""
    monkeypatch.setattr(backend, "provider_options", lambda variant: [("CPUExecutionProvider", {})])
    with pytest.raises(ConfigError, match="CUDAExecutionProvider does not start here"):
        backend.open_graph(*decoder, "cuda", 1)


def test_buffers_on_a_device_are_allocated_once(
    decoder: tuple[Path, Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that binds device memory, its device being the CPU: the same results, and they stay."""
    path, component = decoder
    plain = open_engine(path, component)
    session = backend.open_session(path, "cpu", 1)
    engine = backend.DeviceEngine(session, component, device="cpu")
    first = engine.run(**inputs(2))["patch_logits"]
    kept = first.copy()
    monkeypatch.setattr(engine, "_allocate", None)  # a second allocation would fail
    other = {name: array[..., ::-1].copy() for name, array in inputs(2).items()}
    second = engine.run(**other)["patch_logits"]
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, plain.run(**inputs(2))["patch_logits"])
    np.testing.assert_array_equal(second, plain.run(**other)["patch_logits"])
    engine.close()


def test_an_engine_is_compared_with_the_cpu(bundle: Bundle) -> None:
    assert compare_with_cpu(bundle, "onnxruntime", {}) == []
    networks = open_networks(bundle, "onnxruntime")
    results = compare_with_cpu(bundle, "other", networks)
    assert [stage for stage, _, _ in results] == [
        "image_embedding", "patch_features", "zero_shot_map", "prompt_embeddings",
    ]  # fmt: skip
    assert all(error <= limit for _, error, limit in results)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_engine_that_computes_something_else_is_refused(bundle: Bundle, network: str) -> None:
    networks = open_networks(bundle, "onnxruntime")
    right = networks[network]

    class Wrong:
        def run(self, **given: np.ndarray) -> dict[str, np.ndarray]:
            return {name: array * 1.01 for name, array in right.run(**given).items()}

        def close(self) -> None: ...

    networks[network] = Wrong()
    with pytest.raises(BundleError, match=r"other computes other results for this bundle: .* from onnx"):
        compare_with_cpu(bundle, "other", networks)

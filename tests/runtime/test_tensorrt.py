"""Plans: which ones may be loaded, and how they run. GPU, pycuda and TensorRT are fakes that run the ONNX graphs."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle, read_manifest, seal
from anomalygpt_edge.runtime.common.errors import BundleError, ConfigError
from anomalygpt_edge.runtime.common.install import how_to_install
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision.engines import choose_engine, open_networks, tensorrt
from anomalygpt_edge.runtime.vision.engines.device import Device
from anomalygpt_edge.runtime.vision.engines.gpu import Gpu
from anomalygpt_edge.runtime.vision.engines.plans import misfit

ORIN = Gpu("Orin", "8.7", integrated=True)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", integrated=False)
RTX_4080 = Gpu("NVIDIA GeForce RTX 4080", "8.9", integrated=False)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "12.0", integrated=False)


@pytest.fixture
def bundle(fakes, tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return fakes.with_plans(tiny_bundle, tmp_path / "bundle")


def example(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    return {
        "patch_features": rng.normal(size=(batch, 4, 256, 32)).astype(np.float32),
        "text_features": np.eye(2, 16, dtype=np.float32),
    }


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_results_are_those_of_the_graph(gpu_machine, bundle: Bundle, batch: int) -> None:
    """Including batches that are split because they are larger than the plan's."""
    expected = open_networks(bundle, "onnxruntime")["decoder"].run(**example(batch))
    engine = open_networks(bundle, "tensorrt")["decoder"]
    for _ in range(2):
        np.testing.assert_allclose(
            engine.run(**example(batch))["patch_logits"], expected["patch_logits"], atol=1e-4
        )
    assert gpu_machine.cuda.depth == 0
    assert gpu_machine.apis["tensorrt"].deserialised[1].startswith(b"PLAN")


def test_buffers_are_allocated_once_and_results_stay(gpu_machine, bundle: Bundle) -> None:
    engine = open_networks(bundle, "tensorrt")["decoder"]
    first = engine.run(**example(1))["patch_logits"]
    kept, allocations = first.copy(), gpu_machine.cuda.allocations
    engine.run(**example(2))
    np.testing.assert_array_equal(first, kept)
    assert gpu_machine.cuda.allocations == allocations


def test_inputs_are_checked_before_native_code_runs(gpu_machine, bundle: Bundle) -> None:
    engine = open_networks(bundle, "tensorrt")["decoder"]
    with pytest.raises(ValueError, match="patch_features is float64"):
        engine.run(**example(1) | {"patch_features": np.zeros((1, 4, 256, 32))})
    assert not gpu_machine.cuda.copies


def test_an_engine_reads_another_engines_output_on_the_device(gpu_machine, bundle: Bundle) -> None:
    networks = open_networks(bundle, "tensorrt")
    encoder, decoder = networks["encoder"], networks["decoder"]
    decoder.share("patch_features", encoder.buffers["patch_features"])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    text = example(1)["text_features"]
    with Device(gpu_machine.cuda).current():
        encoder.buffers["pixels"].upload(pixels, encoder.stream)
        decoder.buffers["text_features"].upload(text, encoder.stream)
        encoder.enqueue(1, encoder.stream)
        decoder.enqueue(1, encoder.stream)
        found = decoder.buffers["patch_logits"].download((1, 4, 256, 2), encoder.stream)
        encoder.stream.synchronize()
    plain = open_networks(bundle, "onnxruntime")
    features = plain["encoder"].run(pixels=pixels)["patch_features"]
    expected = plain["decoder"].run(patch_features=features, text_features=text)["patch_logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_buffer_of_another_dtype_is_not_shared(gpu_machine, bundle: Bundle) -> None:
    decoder = open_networks(bundle, "tensorrt")["decoder"]
    with gpu_machine.device.current():
        half = gpu_machine.device.buffer((1, 4, 256, 32), "float16")
    with pytest.raises(
        BundleError, match=r"takes patch_features as float32 \[4, 256, 32\], but it is given as float16"
    ):
        decoder.share("patch_features", half)
    found = decoder.run(**example(1))["patch_logits"]
    expected = open_networks(bundle, "onnxruntime")["decoder"].run(**example(1))["patch_logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_buffer_for_a_smaller_batch_is_not_shared(gpu_machine, bundle: Bundle) -> None:
    decoder = open_networks(bundle, "tensorrt")["decoder"]
    with gpu_machine.device.current():
        small = gpu_machine.device.buffer((1, 4, 256, 32), "float32")
    with pytest.raises(BundleError, match="is for a larger batch than the plan that gives it patch_features"):
        decoder.share("patch_features", small)


@pytest.mark.filterwarnings("ignore:anomaly maps are made on the CPU:RuntimeWarning")
def test_the_inspector_takes_the_plans_by_itself(gpu_machine, bundle: Bundle, tiny_bundle: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (240, 240, 3), np.uint8)
    with Inspector.open(bundle.folder, threads=1) as ours, Inspector.open(tiny_bundle, threads=1) as plain:
        assert (ours.engine, plain.engine) == ("tensorrt", "onnxruntime")
        found, expected = ours.inspect(frame), plain.inspect(frame)
    assert found.sentence == expected.sentence
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-5)


def test_rtx_saves_its_compiled_kernels_in_the_cache_folder(
    fakes, gpu_machine, tiny_bundle: Path, tmp_path: Path
) -> None:
    gpu_machine.gpu = RTX_4090
    bundle = fakes.with_plans(tiny_bundle, tmp_path / "rtx", "tensorrt-rtx")
    api = gpu_machine.apis["tensorrt-rtx"]
    api.cache.content = b"compiled here"
    assert choose_engine(bundle) == "tensorrt-rtx"
    before = sorted(path.name for path in bundle.folder.iterdir())
    open_networks(bundle, "tensorrt-rtx")["decoder"].run(**example(1))
    files = list((tmp_path / "cache" / "tensorrt-rtx").iterdir())
    assert [file.read_bytes() for file in files] == [b"compiled here"]
    assert sorted(path.name for path in bundle.folder.iterdir()) == before
    assert api.cache.read == []
    open_networks(bundle, "tensorrt-rtx")
    assert api.cache.read == [b"compiled here"]
    assert api.configs[0].dynamic_shapes_kernel_specialization_strategy == "eager"


def test_a_full_cache_disk_costs_a_sentence_and_no_verdict(
    fakes, gpu_machine, tiny_bundle: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    gpu_machine.gpu = RTX_4090
    bundle = fakes.with_plans(tiny_bundle, tmp_path / "rtx", "tensorrt-rtx")
    gpu_machine.apis["tensorrt-rtx"].cache.content = b"compiled here"

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    decoder = open_networks(bundle, "tensorrt-rtx")["decoder"]
    for batch in (1, 2):
        assert decoder.run(**example(batch))
    said = capsys.readouterr().err
    assert said.startswith("agpt: compiled kernels are not kept")
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert list((tmp_path / "cache" / "tensorrt-rtx").iterdir()) == []


def test_a_cache_that_others_can_write_to_is_refused(
    fakes, gpu_machine, tiny_bundle: Path, tmp_path: Path
) -> None:
    gpu_machine.gpu = RTX_4090
    bundle = fakes.with_plans(tiny_bundle, tmp_path / "rtx", "tensorrt-rtx")
    folder = tmp_path / "cache" / "tensorrt-rtx"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others: chmod 700"):
        open_networks(bundle, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("changed", "gpu", "reason"),
    [
        ({"version": "10.3.1.1"}, ORIN, "TensorRT 10.3.1.1, .* this is TensorRT 10.3.0.30"),
        ({"version": "9.9.0.0", "flags": ["version_compatible"]}, ORIN, "this is TensorRT 10.3.0.30"),
        ({"version": "10.9.0.0", "flags": ["version_compatible"]}, ORIN, "this is TensorRT 10.3.0.30"),
        ({}, RTX_4090, "Orin, compute capability 8.7, .* this is NVIDIA GeForce RTX 4090"),
        (
            {"gpu": RTX_4090.name, "compute_capabilities": ["8.9"]},
            RTX_4080,
            "this is NVIDIA GeForce RTX 4080",
        ),
        (
            {"gpu": "", "compute_capabilities": ["12.0"], "flags": ["hardware_compatible"]},
            RTX_4090,
            "this is NV",
        ),
        ({"platform": "linux-sparc"}, ORIN, "linux-sparc, but this is linux-"),
        ({"graph_sha256": "0" * 64}, ORIN, "its graph was changed afterwards"),
    ],
)
def test_a_plan_of_another_machine_is_refused(
    fakes, gpu_machine, tiny_bundle: Path, tmp_path: Path, changed: dict, gpu: Gpu, reason: str
) -> None:
    """The message names the machines it was built for and the command; TensorRT does not read the plan."""
    gpu_machine.gpu = gpu
    bundle = fakes.with_plans(tiny_bundle, tmp_path / "bundle", **changed)
    command = f"agpt export --resume --engine tensorrt {bundle.folder}"
    with pytest.raises(
        ConfigError, match=f"--engine tensorrt cannot run here: .*built for.*{reason}.*{command}"
    ):
        choose_engine(bundle, "tensorrt")
    assert choose_engine(bundle) == "onnxruntime"
    assert not gpu_machine.apis["tensorrt"].deserialised


@pytest.mark.parametrize(
    ("changed", "gpu", "version"),
    [
        ({}, ORIN, "10.3.0.99"),  # another build of the same release
        ({"flags": ["version_compatible"]}, ORIN, "10.16.0.1"),
        (
            {"flags": ["hardware_compatible"], "gpu": "", "compute_capabilities": ["8.6"]},
            RTX_5090,
            "10.3.0.30",
        ),
        (
            {"flags": ["ahead_of_time"], "gpu": "", "compute_capabilities": ["8.6", "8.9"]},
            RTX_4080,
            "10.3.0.30",
        ),
    ],
)
def test_a_plan_that_also_fits_this_machine_is_accepted(
    fakes, tiny_bundle: Path, changed: dict, gpu: Gpu, version: str
) -> None:
    bundle = open_bundle(tiny_bundle)
    assert misfit(bundle, "encoder", fakes.plan_of(bundle, "encoder", **changed), gpu, version) == ""


def test_altered_bytes_are_refused_before_they_are_loaded(gpu_machine, bundle: Bundle) -> None:
    path = bundle.folder / "decoder.tensorrt.plan"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    rebuild = (
        "built for Orin, compute capability 8.7, TensorRT 10.3.0.30.*agpt export --resume --engine tensorrt"
    )
    with pytest.raises(BundleError, match=f"was altered.*{rebuild}"):
        open_bundle(bundle.folder)
    with pytest.raises(BundleError, match=f"was altered.*{rebuild}"):  # altered after the bundle was opened
        open_networks(bundle, "tensorrt")
    assert all(seen != bytes(data) for seen in gpu_machine.apis["tensorrt"].deserialised)
    assert open_bundle(bundle.folder, with_plans=False).manifest.plans == {}


def test_the_error_for_a_plan_that_tensorrt_cannot_load_is_one_sentence(gpu_machine, bundle: Bundle) -> None:
    (bundle.folder / "encoder.tensorrt.plan").write_bytes(b"no plan")
    seal(bundle.folder, read_manifest(bundle.folder))
    with pytest.raises(
        BundleError, match=r"TensorRT cannot load encoder.* \(Magic tag does not match\): .*--resume"
    ):
        open_networks(open_bundle(bundle.folder), "tensorrt")


def test_the_reason_names_what_is_missing(
    gpu_machine, bundle: Bundle, tiny_bundle: Path, monkeypatch
) -> None:
    def sentence(opened: Bundle | None = bundle) -> str:
        return tensorrt.unavailable_reason("tensorrt", opened)

    assert sentence() == sentence(None) == ""
    assert "no TensorRT plan of the encoder: agpt export --resume" in sentence(open_bundle(tiny_bundle))
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert f"pycuda is not installed: {how_to_install('tensorrt')}" in sentence()
    monkeypatch.setattr(tensorrt, "is_installed", lambda engine: False)
    assert "TensorRT is not installed: install JetPack's" in sentence()
    gpu_machine.gpu = None
    assert "no NVIDIA GPU that this process can use: install its driver" in sentence()


def test_version_compatible_plans_may_contain_their_runtime(
    fakes, gpu_machine, tiny_bundle: Path, tmp_path: Path
) -> None:
    open_networks(fakes.with_plans(tiny_bundle, tmp_path / "plain"), "tensorrt")
    assert not gpu_machine.apis["tensorrt"].host_code_allowed
    open_networks(
        fakes.with_plans(tiny_bundle, tmp_path / "compatible", flags=["version_compatible"]), "tensorrt"
    )
    assert gpu_machine.apis["tensorrt"].host_code_allowed

"""Plans from a bundle's graphs: built by TensorRT-RTX without a GPU, and by a fake TensorRT what it is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest

from anomalygpt_edge.export import int8_graph, quantize, rounding, tensorrt_plan
from anomalygpt_edge.export.float16 import export_float16
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.export.tensorrt_plan import PlanOptions, build, rebuild
from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, Bundle, open_bundle, read_manifest, seal
from anomalygpt_edge.runtime.cli.main import app
from anomalygpt_edge.runtime.common.errors import BundleError, ConfigError
from anomalygpt_edge.runtime.evaluation.verify import verify_bundle
from anomalygpt_edge.runtime.vision.engines import Backend, Engine, onnxruntime
from anomalygpt_edge.runtime.vision.engines.gpu import Gpu

rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (its wheels: x86-64 Linux with glibc 2.28 on, aarch64 with 2.35)",
)
RTX = PlanOptions("tensorrt-rtx", capabilities=("8.9",))
ORIN = Gpu("Orin", "8.7", integrated=True)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", integrated=False)


def nothing() -> None: ...


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def planned(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with TensorRT-RTX's plans. Shared: tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("planned") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    rebuild(folder, [RTX], nothing)
    return folder


@rtx
def test_plans_are_built_without_a_gpu(planned: Path, tiny_bundle: Path) -> None:
    manifest = open_bundle(planned).manifest
    before = read_manifest(tiny_bundle)
    assert {name: record for name, record in manifest.files.items() if "plan" not in name} == before.files
    for name in NETWORKS:
        (plan,) = manifest.plans[name]
        assert plan.compute_capabilities == ["8.9"]
        assert plan.flags == ["strongly_typed", "ahead_of_time"]
        assert plan.graph_sha256 == before.files[f"{name}.onnx"].sha256
        assert manifest.files[plan.file].bytes > before.files[f"{name}.onnx"].bytes / 4
    assert manifest.parity["engines"]["tensorrt-rtx"]["compared"] is False
    assert manifest.parity["stages"] == before.parity["stages"]
    assert sorted(path.name for path in planned.parent.iterdir()) == ["bundle"]


@rtx
def test_every_precision_builds(tiny_bundle: Path, tmp_path: Path) -> None:
    """Strongly typed, from the float16 graphs as well."""
    for name in NETWORKS:
        graph = tmp_path / f"{name}.onnx"
        component = export_float16(tiny_bundle / f"{name}.onnx", graph)
        build(graph, component, tmp_path / f"{name}.plan", RTX, ["8.9"])
        assert (tmp_path / f"{name}.plan").stat().st_size > graph.stat().st_size / 2


@rtx
def test_a_learner_that_reads_evidence_builds(seeing_bundle: Path, tmp_path: Path) -> None:
    graph = seeing_bundle / "prompt_learner.onnx"
    half = export_float16(graph, tmp_path / "half.onnx")
    component = read_manifest(seeing_bundle).components["prompt_learner"]
    for source, described in ((graph, component), (tmp_path / "half.onnx", half)):
        build(source, described, tmp_path / "learner.plan", replace(RTX, max_batch=4), ["8.9"])
        assert (tmp_path / "learner.plan").stat().st_size > graph.stat().st_size / 4


@rtx
@pytest.mark.parametrize("passes", [1, 2])
def test_int8_builds(tiny_bundle: Path, tmp_path: Path, passes: int) -> None:
    """The graphs of ``--precision int8`` as they are: Q/DQ with constant symmetric scales, tokens scaled around it."""
    size = read_manifest(tiny_bundle).preprocess.size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    source, target = tiny_bundle / "encoder.onnx", tmp_path / "encoder.onnx"
    shutil.copy(source, tmp_path / "source.onnx")
    (tmp_path / "tokens").mkdir()
    groups = quantize.calibrate(tmp_path / "source.onnx", [{"pixels": pixels}], tmp_path / "tokens")
    found = {
        group.input.name: rounding.quantise(tokens, group.weight, group.norm is not None)
        for group, tokens in groups
    }
    component = int8_graph.write(source, target, found, dict.fromkeys(found, passes))
    kinds = [node.op_type for node in onnx.load(target, load_external_data=False).graph.node]
    assert kinds.count("QuantizeLinear") == passes * len(found) > 0
    build(target, component, tmp_path / "encoder.plan", RTX, ["8.9"])
    assert (tmp_path / "encoder.plan").stat().st_size > source.stat().st_size / 4


@rtx
def test_verify_looks_at_plans_without_a_gpu(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_bundle(planned)
    printed = capsys.readouterr().out
    assert printed.count("compute capability 8.9, TensorRT-RTX") == 3
    assert printed.count("intact; cannot run here: there is no NVIDIA GPU") == 3
    assert "one inspection by onnxruntime " in printed


@rtx
def test_what_is_no_plan_is_found_without_a_gpu(planned: Path, tmp_path: Path) -> None:
    """The digest is right: somebody sealed something else under a plan's name."""
    folder = Path(shutil.copytree(planned, tmp_path / "bundle"))
    (folder / "encoder.tensorrt-rtx.plan").write_bytes(b"no plan at all " * 1000)
    seal(folder, read_manifest(folder))
    with pytest.raises(
        BundleError, match=r"encoder.* is not a TensorRT-RTX plan: it was built for .* --resume"
    ):
        verify_bundle(folder)


@rtx
def test_plans_of_another_graph_are_found(planned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "bundle"))
    shutil.copy(folder / "decoder.onnx", folder / "decoder.keep")
    component = export_float16(folder / "decoder.keep", folder / "decoder.onnx")
    (folder / "decoder.keep").unlink()
    manifest = read_manifest(folder)
    seal(folder, msgspec.structs.replace(manifest, components={**manifest.components, "decoder": component}))
    with pytest.raises(BundleError, match=r"decoder.tensorrt-rtx.plan was built from another graph"):
        verify_bundle(folder)


@rtx
@pytest.mark.parametrize("damage", ["altered", "missing", "left over"])
def test_damaged_plans_are_refused_and_built_again(planned: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "bundle"))
    path = folder / "encoder.tensorrt-rtx.plan"
    if damage == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif damage == "missing":
        path.unlink()
    else:  # an interrupted build's folder
        (folder.parent / f".{folder.name}.plans" / "old").mkdir(parents=True)
    if damage != "left over":
        with pytest.raises(
            BundleError, match=r"built for compute capability 8.9.*agpt export --resume --engine"
        ):
            open_bundle(folder)
    rebuild(folder, [RTX], nothing)
    verify_bundle(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle"]


@rtx
def test_command_needs_neither_checkpoints_nor_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    """In a process where torch, the checkpoints' readers and onnx cannot be imported, as on a device."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors', 'gguf'): sys.modules[name] = None\n"
        "from anomalygpt_edge.runtime.cli.main import main\n"
        f"sys.argv = ['agpt', 'export', '--resume', '--engine', 'tensorrt-rtx', {str(folder)!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not compared, there is no NVIDIA GPU" in " ".join(done.stdout.split())
    plan = open_bundle(folder).plan("encoder", "tensorrt-rtx")
    assert plan is not None
    assert plan.compute_capabilities == ["8.6", "8.9", "12.0"]


@rtx
def test_export_builds_plans_too(small, exported_networks, tmp_path: Path, capsys) -> None:
    roles = ("imagebind", "vicuna", "pandagpt", "anomalygpt", "text-features")
    pairs = [word for role, path in zip(roles, small.paths, strict=True) for word in (f"--{role}", str(path))]
    out = tmp_path / "bundle"
    engines = ["--engine", "onnx,tensorrt-rtx", "--compute-capability", "12.0"]
    app(args=["export", *pairs, "--out", str(out), *engines], standalone_mode=False)
    manifest = open_bundle(out).manifest
    assert [manifest.plans[name][0].compute_capabilities for name in NETWORKS] == [["12.0"]] * 3
    assert manifest.parity["engines"]["tensorrt-rtx"]["compared"] is False
    assert "run agpt verify on the device" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_one_sentence(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (["--resume", "--engine", "tensorrt"], "needs both --resume and a bundle"),
        ([str(bundle)], "needs both --resume and a bundle"),
        (["--resume", str(bundle)], "give --engine tensorrt or tensorrt-rtx"),
        (["--resume", "--engine", "tensorrt", "--out", "x", str(bundle)], "leave out --out"),
        (["--vicuna", "x"], "needs --imagebind, --pandagpt, --anomalygpt, --out"),
        (
            ["--resume", "--engine", "tensorrt", "--compute-capability", "8.9", str(bundle)],
            "is for tensorrt-rtx only",
        ),
        (["--resume", "--engine", "tensorrt-rtx", "--version-compatible", str(bundle)], "are for tensorrt only:"),
    ):
        with pytest.raises(ConfigError, match=words):
            app(args=["export", *arguments], standalone_mode=False)
    with pytest.raises(ConfigError, match="--max-batch 0"):
        PlanOptions("tensorrt", max_batch=0)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"TensorRT does not load .* install JetPack's"):
        rebuild(bundle, [PlanOptions("tensorrt")], nothing)
    open_bundle(bundle)


@rtx
def test_a_capability_that_rtx_does_not_know_is_refused(bundle: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"does not build for compute capability 8.7: choose among 7.5, 8.0"
    ):
        rebuild(bundle, [replace(RTX, capabilities=("8.7",))], nothing)


@rtx
def test_a_graph_that_cannot_be_read_leaves_the_bundle(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"no graph")
    seal(bundle, read_manifest(bundle))
    before = read_manifest(bundle)
    with pytest.raises(ConfigError, match=r"TensorRT-RTX 1\.\S+ cannot read decoder.onnx"):
        rebuild(bundle, [RTX], nothing)
    assert open_bundle(bundle).manifest == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_builder_that_dies_is_one_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plan, "check_can_build", lambda options: None)
    monkeypatch.setattr(tensorrt_plan, "open_api", lambda engine: SimpleNamespace(__version__="1.0"))
    monkeypatch.setattr(
        tensorrt_plan.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", "")
    )
    with pytest.raises(
        ConfigError, match=r"crashed while building encoder.* \(exit status -9\), usually because memory"
    ):
        rebuild(bundle, [RTX], nothing)
    open_bundle(bundle)


class FakeBuilderApi:
    """TensorRT's builder as far as ``build`` and ``configure`` call it; it writes down what it is told."""

    __version__ = "10.3.0.30"

    def __init__(self) -> None:
        self.told: dict[str, object] = {}
        told = self.told

        class Log:
            ERROR, INTERNAL_ERROR = 1, 0

        class Config:
            def clear_flag(self, flag: str) -> None:
                told[f"clear {flag}"] = True

            def set_flag(self, flag: str) -> None:
                told[f"set {flag}"] = True

            def add_optimization_profile(self, profile: dict) -> None:
                told["profile"] = profile

            def __setattr__(self, name: str, value: object) -> None:
                told[name] = value

        class Profile(dict):
            def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
                self[name] = shapes

        class Builder:
            def __init__(self, log: object) -> None: ...

            def create_network(self, flags: int) -> str:
                told["network"] = flags
                return "network"

            create_builder_config = staticmethod(Config)
            create_optimization_profile = staticmethod(Profile)

            def build_serialized_network(self, network: str, config: Config) -> bytes:
                return b"PLAN"

        class Parser:
            num_errors = 0

            def __init__(self, network: str, log: object) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                told["graph"] = path
                return True

        self.ILogger, self.Builder, self.OnnxParser = Log, Builder, Parser
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="version")
        self.HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere plus")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeBuilderApi:
    """TensorRT 10.3 on an RTX 4090, building in this process."""
    api = FakeBuilderApi()
    monkeypatch.setattr(tensorrt_plan, "open_api", lambda engine: api)
    monkeypatch.setattr(tensorrt_plan, "find_gpu", lambda: RTX_4090)

    def here(graph, component, target, options, plan) -> None:
        build(graph, component, target, options, plan.compute_capabilities)

    monkeypatch.setattr(tensorrt_plan, "build_apart", here)
    return api


def test_tensorrt_is_told_types_shapes_and_flags(api: FakeBuilderApi, bundle: Path) -> None:
    options = PlanOptions("tensorrt", max_batch=8, version_compatible=True, hardware_compatible=True)
    manifest = rebuild(bundle, [options], nothing)
    assert api.told["network"] == 1 << 1  # strongly typed
    assert api.told["clear tf32"]
    assert api.told["set version"]
    assert api.told["hardware_compatibility_level"] == "ampere plus"
    assert api.told["profile"] == {"anomaly_map": ((1, 224, 224), (1, 224, 224), (8, 224, 224))}
    plan = manifest.plans["prompt_learner"][0]
    assert (plan.gpu, plan.compute_capabilities) == ("", ["8.9"])
    assert plan.flags == ["strongly_typed", "version_compatible", "hardware_compatible"]
    plain = rebuild(bundle, [PlanOptions("tensorrt")], nothing).plans["encoder"]
    assert [(p.gpu, p.flags, p.version, p.max_batch) for p in plain] == [
        (RTX_4090.name, ["strongly_typed"], "10.3.0.30", 4)
    ]


def test_tensorrt_needs_the_gpu_it_builds_for(api: FakeBuilderApi, bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_plan, "find_gpu", lambda: ORIN)
    with pytest.raises(ConfigError, match="--hardware-compatible is not available on Orin: leave it out"):
        rebuild(bundle, [PlanOptions("tensorrt", hardware_compatible=True)], nothing)
    monkeypatch.setattr(tensorrt_plan, "find_gpu", lambda: None)
    with pytest.raises(ConfigError, match="needs the GPU that it builds for: there is no NVIDIA GPU"):
        rebuild(bundle, [PlanOptions("tensorrt")], nothing)


@rtx
def test_plans_of_the_other_engine_stay(planned: Path, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "bundle"))
    api = FakeBuilderApi()
    monkeypatch.setattr(tensorrt_plan, "open_api", lambda engine: api)
    monkeypatch.setattr(tensorrt_plan, "find_gpu", lambda: RTX_4090)
    monkeypatch.setattr(
        tensorrt_plan, "build_apart", lambda graph, component, target, *_: target.write_bytes(b"PLAN")
    )
    manifest = rebuild(folder, [PlanOptions("tensorrt")], nothing)
    assert [plan.engine for plan in manifest.plans["encoder"]] == ["tensorrt-rtx", "tensorrt"]
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {
        path.name for path in folder.iterdir() if path.name != "manifest.json"
    }


def test_an_engine_that_can_run_is_compared_before_it_is_published(
    api: FakeBuilderApi, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its networks are the CPU's here, right and wrong."""
    monkeypatch.setattr(Backend, "unavailable_reason", lambda self, opened: "")

    def load(self: Backend, opened: Bundle, name: str, threads: int) -> Engine:
        network = onnxruntime.load(opened, name, "cpu", threads)
        if self.module == "tensorrt" and name == wrong:
            run = network.run
            network.run = lambda **given: {key: np.zeros_like(value) for key, value in run(**given).items()}
        return network

    monkeypatch.setattr(Backend, "load", load)
    wrong = ""
    report = rebuild(bundle, [PlanOptions("tensorrt")], nothing).parity["engines"]["tensorrt"]
    assert report["passed"] is True
    assert set(report["stages"]) == {
        "image_embedding",
        "patch_features",
        "zero_shot_map",
        "prompt_embeddings",
    }
    before = read_manifest(bundle)
    wrong = "decoder"
    with pytest.raises(BundleError, match="tensorrt computes other results for this bundle: zero_shot_map"):
        rebuild(bundle, [PlanOptions("tensorrt")], nothing)
    assert open_bundle(bundle).manifest == before
    marked = rebuild(bundle, [PlanOptions("tensorrt")], nothing, allow_failure=True)
    assert marked.parity["engines"]["tensorrt"]["passed"] is False


def test_options_are_for_export_as_well(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be built is refused before the long work."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    options = ExportOptions(*small.paths, out=tmp_path / "bundle", engines=("onnx", "tensorrt"))
    with pytest.raises(ConfigError, match="TensorRT does not load"):
        export_bundle(replace(options, plans=(PlanOptions("tensorrt"),)))
    assert not (tmp_path / "bundle").exists()

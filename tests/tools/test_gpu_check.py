"""``make gpu-check`` without a GPU: what it skips and why; and what it finds on a GPU made of NumPy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError, ConfigError
from anomalygpt_edge.runtime.vision.engines import BACKENDS, open_networks
from anomalygpt_edge.runtime.vision.engines.agreement import run_chain, sample_pixels
from anomalygpt_edge.runtime.vision.engines.chain import Chain, few_shot, zero_shot
from anomalygpt_edge.runtime.vision.engines.gpu import Graph, find_gpu
from tools import gpu_check
from tools.cuda_shim import ShimDriver
from tools.gpu_check import CPU, Check, Report, Setting, run_checks

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")


@without_gpu
def test_a_machine_without_a_gpu_skips_everything_and_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gpu: there is no NVIDIA GPU")
    assert lines[-1] == f"0 passed, {len(gpu_check.checks())} skipped, 0 failed"
    for check, line in zip(gpu_check.checks(), lines[1:-1], strict=True):
        assert line.startswith(f"skip  {check.name}: ")
        assert len(line) > len(f"skip  {check.name}: ") + 20
    assert not list(tmp_path.iterdir())


def test_every_engine_is_checked() -> None:
    names = " ".join(check.name for check in gpu_check.checks())
    for engine in BACKENDS:
        assert engine == "onnxruntime" or f"{engine} against the CPU" in names
        assert engine == "onnxruntime" or f"{engine} against the golden vectors" in names


@pytest.fixture(scope="module")
def shim() -> Iterator[ShimDriver]:
    if shutil.which("g++") is None:
        pytest.skip("the shim is compiled with g++: install it")
    driver = ShimDriver()
    yield driver
    driver.close()


@pytest.fixture
def jetson(
    fakes, gpu_machine: SimpleNamespace, shim: ShimDriver, tmp_path: Path
) -> Callable[[Path], Setting]:
    """A Jetson with TensorRT's plans of a bundle."""
    driver = fakes.FakeDriver()
    driver.cuda = gpu_machine.cuda
    return lambda bundle: Setting(
        fakes.with_plans(bundle, tmp_path / "bundle"),
        make_graph=lambda: Graph(driver),
        open_device=lambda: gpu_machine.device,
        open_driver=lambda stream: fakes.KernelsOnShim(gpu_machine.cuda, stream, shim),
        runs=3,
    )


@pytest.fixture
def setting(jetson: Callable[[Path], Setting], tiny_bundle: Path) -> Setting:
    return jetson(tiny_bundle)


def chosen(*names: str) -> list[Check]:
    return [check for check in gpu_check.checks() if check.name in names]


def test_engines_and_graphs_are_checked_and_measured(setting: Setting, gpu_machine, capsys) -> None:
    names = ("tensorrt against the CPU", "tensorrt, latency", "tensorrt, zero-shot chain")
    report = run_checks(setting, chosen(*names))
    assert report.failed == {}
    assert tuple(report.figures) == names
    assert report.figures["tensorrt against the CPU"]["patch_features"]["error"] < 1e-4
    assert report.figures["tensorrt, latency"]["encoder"]["p50"] > 0
    chain = report.figures["tensorrt, zero-shot chain"]
    assert chain["graph"]["device_ms"]["p50"] > 0
    assert set(chain["stream"]) == {"device_ms", "host_to_host_ms"}
    assert capsys.readouterr().out.count("ok    ") == 3
    assert gpu_machine.cuda.depth == 0


def test_a_chain_keeps_everything_between_pixels_and_results_on_the_device(
    setting: Setting, gpu_machine
) -> None:
    networks = gpu_check.tensorrt_engines(open_networks(setting.bundle, "tensorrt"))
    driver = setting.open_driver(networks[0].stream)
    chain = zero_shot(gpu_machine.device, driver, *networks, setting.bundle.text_features())
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    first = chain.run(pixels)
    chain.record(setting.make_graph())
    gpu_machine.cuda.copies.clear()
    executions = [context.executions for context in gpu_machine.apis["tensorrt"].contexts]
    second = chain.run(pixels)
    assert gpu_machine.cuda.copies == ["htod", "dtoh", "dtoh", "dtoh"]  # pixels; embedding, map, prompts
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    after = [context.executions for context in gpu_machine.apis["tensorrt"].contexts]
    assert [now - before for now, before in zip(after, executions, strict=True)] == [1, 1, 1]
    other = chain.run(pixels[..., ::-1].copy())  # a graph reads what lies there now
    assert np.abs(other["anomaly_map"] - second["anomaly_map"]).max() > 0
    chain.close()


def test_a_learner_that_reads_more_reads_the_encoders_pixels_and_the_number_of_normals(
    jetson: Callable[[Path], Setting], gpu_machine, seeing_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = jetson(seeing_bundle)
    setting.runs = 1
    monkeypatch.setattr(gpu_check, "WARM_UP", 0)
    names = ("tensorrt against the CPU", "tensorrt, latency", "tensorrt, few-shot chain")
    assert run_checks(setting, chosen(*names)).failed == {}
    encoder, decoder, learner = gpu_check.tensorrt_engines(open_networks(setting.bundle, "tensorrt"))
    driver, text = setting.open_driver(encoder.stream), setting.bundle.text_features()
    chain = zero_shot(gpu_machine.device, driver, encoder, decoder, learner, text)
    chain.record(setting.make_graph())
    for pixels in sample_pixels(setting.bundle)[:, None]:
        gpu_machine.cuda.copies.clear()
        found = chain.run(pixels)
        assert gpu_machine.cuda.copies == ["htod", "dtoh", "dtoh", "dtoh"]  # the pixels go up once
        expected = run_chain(setting.bundle, open_networks(setting.bundle, CPU), pixels, text)
        np.testing.assert_allclose(found["prompt_embeddings"], expected["prompt_embeddings"], atol=1e-3)
    chain.close()


def test_a_chain_that_counts_other_normals_fails(
    jetson: Callable[[Path], Setting], seeing_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = jetson(seeing_bundle)
    setting.runs = 1
    monkeypatch.setattr(gpu_check, "WARM_UP", 0)
    monkeypatch.setattr(gpu_check, "few_shot", lambda *given: few_shot(*given[:-1], 0))
    (failed,) = run_checks(setting, chosen("tensorrt, few-shot chain")).failed.values()
    assert "prompt_embeddings of the chain differs" in failed


def test_few_shot_has_the_kernels_between_the_engines(setting: Setting, shim: ShimDriver) -> None:
    shim.launches.clear()
    report = run_checks(setting, chosen("tensorrt, few-shot chain"))
    assert report.failed == {}
    assert set(report.figures["tensorrt, few-shot chain"]) == {"stream", "graph"}
    launched = [name for name, *_ in shim.launches]
    assert launched[:4] == ["unit_rows_f32_f16", "match_f16", "match_distance", "upsample_f32_f32"]
    assert launched == launched[:4] * (len(launched) // 4)


def test_a_chain_that_differs_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Chain.run

    def other(self: Chain, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array + 1 for name, array in run(self, pixels).items()}

    monkeypatch.setattr(Chain, "run", other)
    report = run_checks(setting, chosen("tensorrt, zero-shot chain"))
    assert "differs by" in report.failed["tensorrt, zero-shot chain"]


def test_what_cannot_be_recorded_is_a_failure(setting: Setting, fakes, gpu_machine) -> None:
    driver = fakes.FakeDriver()
    driver.cuda, driver.fail = gpu_machine.cuda, "cuGraphInstantiateWithFlags"
    setting.make_graph = lambda: Graph(driver)
    report = run_checks(setting, chosen("tensorrt, zero-shot chain"))
    assert "cuGraphInstantiateWithFlags" in report.failed["tensorrt, zero-shot chain"]


def test_one_failure_does_not_hide_the_others(setting: Setting, tiny_bundle: Path) -> None:
    def broken(_: Setting) -> dict:
        raise ConfigError("broken")

    plain = Setting(open_bundle(tiny_bundle))
    report = run_checks(
        plain,
        [
            Check("first", lambda _: "", broken),
            Check("second", lambda _: "not here", broken),
            Check("third", lambda _: "", lambda _: {"ms": 1.0}),
        ],
    )
    assert report.failed == {"first": "ConfigError: broken"}
    assert report.skipped == {"second": "not here"}
    assert report.figures == {"third": {"ms": 1.0}}


def test_plans_are_built_before_they_are_checked(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [check.name for check in gpu_check.checks()]
    assert names.index("tensorrt, plans built here") < names.index("tensorrt against the CPU")
    asked = []
    before: Bundle = setting.bundle

    def rebuild(folder: Path, options, advance, allow_failure: bool):
        asked.append((folder, options[0].engine, allow_failure))
        return before.manifest

    monkeypatch.setattr(gpu_check, "rebuild", rebuild)
    report = run_checks(setting, chosen("tensorrt, plans built here"))
    assert asked == [(before.folder, "tensorrt", True)]
    assert set(report.figures["tensorrt, plans built here"]["bytes"]) == {
        "encoder",
        "decoder",
        "prompt_learner",
    }
    assert setting.bundle is not before


def test_figures_go_beside_the_others_of_the_device(
    gpu_machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = Report(figures={"a": {"ms": 1}}, skipped={"b": "why"})
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: None)
    assert gpu_check.store(report, tmp_path, "nano") is None
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: gpu_machine.gpu)
    (tmp_path / "orin.json").write_text('{"demo_line": 1}')
    path = gpu_check.store(report, tmp_path, "nano")
    assert path == tmp_path / "orin.json"
    stored = json.loads(path.read_text())
    assert stored["demo_line"] == 1
    assert stored["gpu_check"]["figures"] == {"a": {"ms": 1}}
    assert stored["gpu_check"]["skipped"] == {"b": "why"}


def test_golden_cases_are_asked_for_with_the_engine(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--golden" in gpu_check.needs_golden("tensorrt")(setting)
    setting.golden = True
    assert gpu_check.needs_golden("tensorrt")(setting) == ""
    seen = {}

    def pytest_run(command, **options) -> subprocess.CompletedProcess:
        seen.update(engine=options["env"]["AGPT_GOLDEN_ENGINE"], command=command)
        return subprocess.CompletedProcess(
            command, code, "a: anomaly_map 1.0e-05, b: anomaly_map 2.0e-04\n1 failed", ""
        )

    monkeypatch.setattr(gpu_check.subprocess, "run", pytest_run)
    code = 0
    assert gpu_check.golden_of("tensorrt")(setting) == {"anomaly_map": 2e-4}
    assert seen["engine"] == "tensorrt"
    code = 1
    with pytest.raises(AgptError, match="golden cases differ"):
        gpu_check.golden_of("tensorrt")(setting)

"""``make gpu-check`` without a GPU: what it skips and why; and what it finds on a GPU made of NumPy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import Bundle, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError, ConfigError
from anomalygpt_edge.runtime.vision.engines import BACKENDS
from anomalygpt_edge.runtime.vision.engines.gpu import Graph, find_gpu
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
from anomalygpt_edge.runtime.vision.resident_stages import ResidentStages
from anomalygpt_edge.runtime.vision.stages import Stages
from tools import gpu_check
from tools.cuda_shim import ShimDriver
from tools.gpu_check import Check, Report, Setting, run_checks

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


ZERO_SHOT, FEW_SHOT = "tensorrt, resident stages, zero-shot", "tensorrt, resident stages, few-shot"


def test_engines_and_graphs_are_checked_and_measured(setting: Setting, gpu_machine, capsys) -> None:
    names = ("tensorrt against the CPU", "tensorrt, latency", ZERO_SHOT)
    report = run_checks(setting, chosen(*names))
    assert report.failed == {}
    assert tuple(report.figures) == names
    assert report.figures["tensorrt against the CPU"]["patch_features"]["error"] < 1e-4
    assert report.figures["tensorrt, latency"]["encoder"]["p50"] > 0
    resident = report.figures[ZERO_SHOT]
    assert set(resident) == {"stream", "graph"}
    for figures in resident.values():
        assert set(figures) == {"device_ms", "host_to_host_ms"}
        assert figures["device_ms"]["p50"] > 0
    assert capsys.readouterr().out.count("ok    ") == 3
    assert gpu_machine.cuda.depth == 0


def test_a_learner_that_reads_more_is_checked(
    jetson: Callable[[Path], Setting], seeing_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = jetson(seeing_bundle)
    setting.runs = 1
    monkeypatch.setattr(gpu_check, "WARM_UP", 0)
    names = ("tensorrt against the CPU", "tensorrt, latency", FEW_SHOT)
    assert run_checks(setting, chosen(*names)).failed == {}


def test_few_shot_has_the_kernels_between_the_engines(
    setting: Setting, shim: ShimDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.runs = 1
    monkeypatch.setattr(gpu_check, "WARM_UP", 0)
    shim.launches.clear()
    report = run_checks(setting, chosen(FEW_SHOT))
    assert report.failed == {}
    assert set(report.figures[FEW_SHOT]) == {"stream", "graph"}
    launched = [name for name, *_ in shim.launches]
    assert launched[:4] == ["unit_rows_f32_f16", "match_f16", "match_distance", "upsample_f32_f32"]
    assert launched == launched[:4] * (len(launched) // 4)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("encode", "image_embedding"), ("localise", "anomaly_map"), ("prompt", "prompt_embeddings")],
)
def test_a_result_that_differs_fails(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    def broken(self: ResidentStages, *given: Any) -> Any:
        found = plain(self, *given)
        if stage == "prompt":
            return found + 1
        (found.image_embeddings if stage == "encode" else found.maps)[...] += 1
        return found

    plain = getattr(ResidentStages, stage)
    monkeypatch.setattr(ResidentStages, stage, broken)
    report = run_checks(setting, chosen(ZERO_SHOT))
    assert f"{name} of the resident stages differs by" in report.failed[ZERO_SHOT]


def test_another_nearest_patch_passes_only_where_it_is_as_near(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 2, 5, 8)).astype(np.float32)  # 2 taps
    rows[..., 4, :] = rows[..., 3, :]
    bank = MemoryBank.from_features([rows], "0" * 64)
    nearest = np.tile(np.arange(5, dtype=np.int32), (1, 2, 1))
    tie = np.where(nearest == 4, 3, nearest)
    wrong = np.where(nearest == 4, 2, nearest)
    assert gpu_check.excess_distance(rows, bank, nearest, nearest) == 0
    assert gpu_check.excess_distance(rows, bank, nearest, tie) < 1e-6
    assert gpu_check.excess_distance(rows, bank, nearest, wrong) > 0.1

    localise = ResidentStages.localise

    def other_rows(self: ResidentStages, *given: Any) -> Any:
        found = localise(self, *given)
        found.matches.nearest[...] = 0
        return found

    monkeypatch.setattr(ResidentStages, "localise", other_rows)
    assert "nearest of the resident stages differs" in run_checks(setting, chosen(FEW_SHOT)).failed[FEW_SHOT]


def test_what_goes_through_the_host_is_a_failure(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidentStages, "prompt", Stages.prompt)
    report = run_checks(setting, chosen(ZERO_SHOT))
    assert "1 of the resident stages used host memory" in report.failed[ZERO_SHOT]


def test_what_cannot_be_recorded_is_a_failure(setting: Setting, fakes, gpu_machine) -> None:
    driver = fakes.FakeDriver()
    driver.cuda, driver.fail = gpu_machine.cuda, "cuGraphInstantiateWithFlags"
    setting.make_graph = lambda: Graph(driver)
    report = run_checks(setting, chosen(ZERO_SHOT))
    assert "cannot be recorded as a CUDA graph" in report.failed[ZERO_SHOT]
    assert "cuGraphInstantiateWithFlags" in report.failed[ZERO_SHOT]


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

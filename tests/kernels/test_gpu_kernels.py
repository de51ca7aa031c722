"""``make gpu-check``'s part for the kernels: its cases on the shim, its figures on a clock of our own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.kernels import cuda
from tools import gpu_kernels
from tools.cuda_shim import ShimDriver

ROOT = Path(__file__).parents[2]
needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the shim is compiled with g++: install it"
)


@needs_gxx
def test_every_case_holds_on_the_shim() -> None:
    driver = ShimDriver()
    results = [gpu_kernels.check(driver, case) for case in gpu_kernels.cases(driver, small=True)]
    launched = {name for name, *_ in driver.launches}
    driver.close()
    assert len({result.name for result in results}) == len(results) > 20
    for result in results:
        assert result.passed, gpu_kernels.line(result)
    for kernel in (
        "match_i8",
        "preprocess_BayerRG8_f16",
        "project",
        "summarise_figures",
        "cell_peaks",
        "components_measure",
        "coreset_next",
        "pack_prompt_Q6_K",
    ):
        assert kernel in launched


@needs_gxx
def test_a_wrong_result_is_called_wrong() -> None:
    driver = ShimDriver()
    case = next(case for case in gpu_kernels.cases(driver, small=True) if case.name == "upsample")
    for wrong in (np.nan, 1e-3):
        expected = (case.expected[0] + wrong,)
        result = gpu_kernels.check(driver, types.SimpleNamespace(**{**vars(case), "expected": expected}))  # type: ignore[arg-type]
        assert not result.passed
        assert gpu_kernels.line(result).startswith("WRONG")
        assert not gpu_kernels.Report(results=[result]).passed
    driver.close()


def test_figures_are_shares_of_ceilings_of_the_same_run() -> None:
    case = types.SimpleNamespace(num_bytes=10_000_000, operations=2_000_000_000, ceiling="f16")
    result = gpu_kernels.Result("match", 0, 1)
    gpu_kernels.add_times(result, case, np.full(50, 100.0), {"copy": 200.0, "f16": 40.0, "i8": 80.0})  # type: ignore[arg-type]
    assert result.gb_per_s == pytest.approx(100)
    assert result.of_copy_ceiling == pytest.approx(0.5)
    assert result.tflop_per_s == pytest.approx(20)
    assert result.of_tensor_ceiling == pytest.approx(0.5)
    assert "50% of tensor cores" in gpu_kernels.line(result)


@pytest.mark.parametrize(
    ("sanitizer", "graph", "passed"),
    [
        ({}, "the same results", True),
        ({"memcheck": "clean", "racecheck": "skipped: not here"}, "", True),
        ({"memcheck": "Invalid __global__ read"}, "", False),
        ({}, "wrong: differs", False),
    ],
)
def test_what_makes_a_report_fail(sanitizer: dict[str, str], graph: str, passed: bool) -> None:
    assert gpu_kernels.Report(sanitizer=sanitizer, graph=graph).passed is passed


@pytest.mark.skipif(cuda.runs_here(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "skipped, because there is no NVIDIA GPU" in done.stdout


def test_without_compute_sanitizer_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu_kernels.run_sanitizer("memcheck").startswith("skipped: compute-sanitizer was not found")


@pytest.mark.skipif(not cuda.runs_here(), reason="there is no NVIDIA GPU with its driver and pycuda here")
def test_on_a_gpu() -> None:
    report = gpu_kernels.check_kernels()
    assert report.passed, report

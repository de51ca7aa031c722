"""``make gpu-check``: checks and measures what needs a GPU, and prints what it skips and why.

    python -m tools.gpu_check [--bundle DIR] [--golden] [--results DIR]

Plans are built on this machine from a copy of the bundle. Every engine that runs here is compared with onnxruntime on
the CPU. The resident stages (zero-shot and few-shot, on a stream and as CUDA graphs) are compared with the same engines
through host memory. Latencies are measured between CUDA events. The CUDA kernels are checked by ``tools.gpu_kernels``.
With --golden, every engine is compared with the golden vectors at full size (30 GB of disk). Figures are written to
benchmarks/results/<device>.json. The exit status is 1 when a check fails; without a GPU all checks are skipped, which
is not a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anomalygpt_edge.export.tensorrt_plan import PLAN_ENGINES, PlanOptions, rebuild
from anomalygpt_edge.kernels import cuda, normalise
from anomalygpt_edge.kernels.cuda.driver import Driver, PycudaDriver
from anomalygpt_edge.runtime.bundles.bundle import NETWORKS, Bundle, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.inspection.product import Product, prepare_product
from anomalygpt_edge.runtime.vision.engines import BACKENDS, learner_inputs, open_networks
from anomalygpt_edge.runtime.vision.engines.agreement import (
    compare_with_cpu,
    difference,
    run_chain,
    sample_pixels,
)
from anomalygpt_edge.runtime.vision.engines.device import Device, open_device
from anomalygpt_edge.runtime.vision.engines.gpu import Graph, find_gpu, missing_driver
from anomalygpt_edge.runtime.vision.engines.tensorrt import TensorRtEngine
from anomalygpt_edge.runtime.vision.memory_bank import MemoryBank
from anomalygpt_edge.runtime.vision.resident_stages import ResidentStages
from anomalygpt_edge.runtime.vision.stages import Stages

from . import gpu_kernels

ROOT = Path(__file__).resolve().parent.parent
CPU = "onnxruntime"
WARM_UP, RUNS = 10, 200
ZERO_SHOT_SAME = 1e-4  # the CUDA kernel's map differs from the CPU's by a few roundings
FEW_SHOT_SAME = 2e-3  # the kernels compute distances in float16
NUM_NORMALS = 2


@dataclass
class Setting:
    """The bundle, options and device functions that the checks use."""

    bundle: Bundle
    golden: bool = False
    make_graph: Callable[[], Graph] = Graph
    open_device: Callable[[], Device] = open_device
    open_driver: Callable[[Any], Driver] = lambda stream: PycudaDriver(stream=stream)
    runs: int = RUNS


@dataclass(frozen=True)
class Check:
    """One check. ``skip`` returns why it cannot run here ("" when it can); ``run`` returns figures or raises."""

    name: str
    skip: Callable[[Setting], str]
    run: Callable[[Setting], dict[str, Any]]


@dataclass
class Report:
    """The results of all checks, by name."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def checks() -> list[Check]:
    """Every check, in order."""
    engines = [name for name in BACKENDS if name != CPU]
    return [
        *(Check(f"{name}, plans built here", needs_builder(name), build_of(name)) for name in PLAN_ENGINES),
        *(Check(f"{name} against the CPU", needs(name), agreement_of(name)) for name in engines),
        *(Check(f"{name}, latency", needs(name), latency_of(name)) for name in engines),
        *(
            Check(f"{name}, resident stages, zero-shot", needs(name), resident_of(name))
            for name in PLAN_ENGINES
        ),
        *(
            Check(f"{name}, resident stages, few-shot", needs(name), resident_of(name, by_bank=True))
            for name in PLAN_ENGINES
        ),
        Check("CUDA kernels", needs_kernels, check_kernels),
        *(
            Check(f"{name} against the golden vectors", needs_golden(name), golden_of(name))
            for name in engines
        ),
    ]


def needs(engine: str) -> Callable[[Setting], str]:
    return lambda setting: BACKENDS[engine].unavailable_reason(setting.bundle)


def needs_builder(engine: str) -> Callable[[Setting], str]:
    return lambda setting: BACKENDS[engine].unavailable_reason(None)


def needs_kernels(setting: Setting) -> str:
    return "" if cuda.runs_here() else "there is no NVIDIA GPU with its driver and pycuda"


def needs_golden(engine: str) -> Callable[[Setting], str]:
    def skip(setting: Setting) -> str:
        wanted = "" if setting.golden else "needs --golden (full size: 30 GB of disk, minutes)"
        return BACKENDS[engine].unavailable_reason(None) or wanted

    return skip


def agreement_of(engine: str) -> Callable[[Setting], dict[str, Any]]:
    """Compare an engine's outputs with those of onnxruntime on the CPU, by the bundle's tolerances."""

    def run(setting: Setting) -> dict[str, Any]:
        results = compare_with_cpu(setting.bundle, engine, open_networks(setting.bundle, engine))
        return {stage: {"error": error, "limit": limit} for stage, error, limit in results}

    return run


def latency_of(engine: str) -> Callable[[Setting], dict[str, Any]]:
    """Measure each network on one image, in milliseconds from host arrays to host arrays."""

    def run(setting: Setting) -> dict[str, Any]:
        networks = open_networks(setting.bundle, engine)
        pixels, text = sample_pixels(setting.bundle)[:1], setting.bundle.text_features()
        outputs = run_chain(setting.bundle, networks, pixels, text)
        learner = setting.bundle.manifest.components["prompt_learner"]
        inputs: dict[str, dict[str, np.ndarray]] = {
            "encoder": {"pixels": pixels},
            "decoder": {"patch_features": outputs["patch_features"], "text_features": text},
            "prompt_learner": learner_inputs(learner, outputs["anomaly_map"], 0, pixels),
        }
        return {
            name: percentiles(wall_clock(partial(networks[name].run, **inputs[name]), setting.runs))
            for name in NETWORKS
        }

    return run


def build_of(engine: str) -> Callable[[Setting], dict[str, Any]]:
    """Build plans for this machine in the setting's bundle; the next check compares their results."""

    def run(setting: Setting) -> dict[str, Any]:
        started = time.perf_counter()
        folder = setting.bundle.folder
        manifest = rebuild(folder, [PlanOptions(engine)], lambda: None, allow_failure=True)
        setting.bundle = open_bundle(folder)
        sizes = {name: manifest.files[plan.file].bytes for name in NETWORKS for plan in manifest.plans[name]}
        return {"seconds": round(time.perf_counter() - started, 1), "bytes": sizes}

    return run


def check_kernels(setting: Setting) -> dict[str, Any]:
    """Check and time the CUDA kernels."""
    report = gpu_kernels.check_kernels()
    if not report.passed:
        raise AgptError("a CUDA kernel gives wrong results: run python -m tools.gpu_kernels to see which")
    return gpu_kernels.as_json(report)


def resident_of(engine: str, by_bank: bool = False) -> Callable[[Setting], dict[str, Any]]:
    """Compare the resident stages, on a stream and as CUDA graphs, with the host path, and measure them."""

    def run(setting: Setting) -> dict[str, Any]:
        bundle, tolerance = setting.bundle, FEW_SHOT_SAME if by_bank else ZERO_SHOT_SAME
        pixels, product = sample_pixels(bundle)[:1], prepare_product(bundle)
        with closing(Stages(bundle, open_networks(bundle, engine), default_threads())) as stages:
            if by_bank:
                product = replace(product, bank=make_bank(bundle, stages, pixels.shape[1:]))
            expected = run_stages(stages, pixels, product)
        figures = {}
        for name, make_graph in (("stream", None), ("graph", setting.make_graph)):
            with closing(open_resident(setting, engine, make_graph)) as resident:
                figures[name] = measure_resident(setting, resident, pixels, product, expected, tolerance)
        return figures

    return run


def make_bank(bundle: Bundle, stages: Stages, shape: tuple[int, ...]) -> MemoryBank:
    """A bank of ``NUM_NORMALS`` images of noise."""
    normals = np.random.default_rng(1).normal(size=(NUM_NORMALS, 1, *shape)).astype(np.float32)
    samples = [stages.encode(normal).patch_features for normal in normals]
    return MemoryBank.from_features(samples, bundle.encoder_sha256)


def open_resident(setting: Setting, engine: str, make_graph: Callable[[], Graph] | None) -> ResidentStages:
    networks = open_networks(setting.bundle, engine)
    encoder = networks["encoder"]
    assert isinstance(encoder, TensorRtEngine)
    driver = setting.open_driver(encoder.stream)
    return ResidentStages(setting.bundle, networks, default_threads(), encoder.device, driver, make_graph)


def run_stages(stages: Stages, pixels: np.ndarray, product: Product) -> dict[str, np.ndarray]:
    """One frame's results by name, patch features included."""
    encoded = stages.encode(pixels)
    localised = stages.localise(encoded, product)
    results = {
        "image_embedding": encoded.image_embeddings,
        "patch_features": encoded.patch_features,
        "anomaly_map": localised.maps,
        "prompt_embeddings": stages.prompt(localised.prompt_maps, pixels, product),
    }
    if localised.matches is None:
        return results
    return results | {name: each for name, each in localised.matches._asdict().items() if each is not None}


def measure_resident(
    setting: Setting,
    stages: ResidentStages,
    pixels: np.ndarray,
    product: Product,
    expected: dict[str, np.ndarray],
    tolerance: float,
) -> dict[str, Any]:
    """Milliseconds on the device (between events, without copies) and from host to host.

    Raises:
        AgptError: a result differs from the host path's, or a stage did not run on the device or not as a graph.
    """

    def run_frame() -> None:
        maps = stages.localise(stages.encode(pixels), product).prompt_maps
        stages.prompt(maps, pixels, product)

    run_frame()
    found = run_stages(stages, pixels, product)  # graphs are recorded in the second run
    check_results(found, expected, product, tolerance)
    check_steps(stages)
    return {
        "device_ms": percentiles(device_clock(setting.open_device(), stages, setting.runs)),
        "host_to_host_ms": percentiles(wall_clock(run_frame, setting.runs)),
    }


def check_results(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], product: Product, tolerance: float
) -> None:
    """Compare by the largest difference, relative to the largest value. Nearest patches are compared by their
    distances, because any of several equally near patches is correct.

    Raises:
        AgptError: a difference is over the tolerance.
    """
    errors = {
        name: difference(array, found[name], "relative")
        for name, array in expected.items()
        if name != "nearest"
    }
    if product.bank is not None:
        errors["nearest"] = excess_distance(
            expected["patch_features"], product.bank, expected["nearest"], found["nearest"]
        )
    for name, error in errors.items():
        if not error <= tolerance:
            raise AgptError(f"{name} of the resident stages differs by {error:.2g} from the host path's")


def excess_distance(
    patch_features: np.ndarray, bank: MemoryBank, expected: np.ndarray, found: np.ndarray
) -> float:
    """Largest excess of a found row's distance to its patch over the expected row's distance, as 1 - cosine.

    Args:
        patch_features: float32 [views, T, P, V].
        expected, found: rows of the bank, int32 [views, T, P].
    """
    rows, features = bank.prepared[0].to_float(), normalise(patch_features)
    taps = np.arange(len(rows))[:, None]
    near, other = ((features * rows[taps, nearest]).sum(axis=-1) for nearest in (expected, found))
    return float((near - other).max())


def check_steps(stages: ResidentStages) -> None:
    """
    Raises:
        AgptError: a stage used host memory, or is not a graph although graphs are recorded.
    """
    if len(stages.steps) != len(NETWORKS):
        raise AgptError(f"{len(NETWORKS) - len(stages.steps)} of the resident stages used host memory")
    if stages.records:
        for step in stages.steps:
            if step.graph is None:
                raise AgptError(f"a resident stage cannot be recorded as a CUDA graph: {step.not_recorded_because}")


def device_clock(device: Device, stages: ResidentStages, runs: int) -> list[float]:
    """Milliseconds between events before and after all stages on their stream, with the data in their buffers."""
    times = []
    with device.current():
        for index in range(WARM_UP + runs):
            before, after = device.event(), device.event()
            before.record(stages.stream)
            for step in stages.steps:
                step.run()
            after.record(stages.stream)
            stages.stream.synchronize()
            if index >= WARM_UP:
                times.append(after.time_since(before))
    return times


def wall_clock(call: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of a call that returns when its results are complete."""
    times = []
    for index in range(WARM_UP + runs):
        started = time.perf_counter()
        call()
        if index >= WARM_UP:
            times.append((time.perf_counter() - started) * 1e3)
    return times


def percentiles(milliseconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(milliseconds), 3)}


def golden_of(engine: str) -> Callable[[Setting], dict[str, Any]]:
    """Run the cases of ``make test-golden`` with this engine, in a separate process."""

    def run(setting: Setting) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "golden",
            "tests/golden",
            "-k",
            "case_is_the_originals or case_holds_in_other_precisions",
        ]
        environment = {**os.environ, "AGPT_GOLDEN_ENGINE": engine}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise AgptError("the golden cases differ:\n" + "\n".join(done.stdout.splitlines()[-20:]))
        return worst_errors(done.stdout)

    return run


def worst_errors(printed: str) -> dict[str, float]:
    """The largest error of each stage in the output of the golden tests ("case: stage 1.2e-06, …")."""
    worst: dict[str, float] = {}
    for stage, number in re.findall(r"(\w+) (\d\.\de[+-]\d\d)", printed):
        worst[stage] = max(worst.get(stage, 0.0), float(number))
    return worst


def run_checks(setting: Setting, chosen: list[Check]) -> Report:
    """Run the checks that can run here, and print one line for each check."""
    report = Report()
    for check in chosen:
        try:
            reason = check.skip(setting)
            if reason:
                report.skipped[check.name] = reason
                print(f"skip  {check.name}: {reason}", flush=True)
                continue
            figures = check.run(setting)
        except Exception as error:
            report.failed[check.name] = f"{type(error).__name__}: {error}"
            print(f"FAIL  {check.name}: {report.failed[check.name]}", flush=True)
            continue
        report.figures[check.name] = figures
        print(f"ok    {check.name}: {json.dumps(figures)}", flush=True)
    return report


def store(report: Report, folder: Path, bundle: str) -> Path | None:
    """Write the figures to the device's file, keeping its other entries. None without a GPU or without figures."""
    gpu = find_gpu()
    if gpu is None or not report.figures:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = folder / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    entry = {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "bundle": bundle}
    stored["gpu_check"] = {
        **entry,
        "figures": report.figures,
        "skipped": report.skipped,
        "failed": report.failed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=2) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--bundle", type=Path, help="bundle folder; default: the lite bundle that ships with the package"
    )
    parser.add_argument(
        "--golden", action="store_true", help="also compare with the golden vectors at full size"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    gpu = find_gpu()
    print(
        f"gpu: {gpu.name}, compute capability {gpu.compute_capability}" if gpu else f"gpu: {missing_driver()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(open_bundle(options.bundle).folder, Path(folder) / "bundle")
        setting = Setting(open_bundle(copy), options.golden)
        report = run_checks(setting, checks())
    path = store(report, options.results, setting.bundle.manifest.name)
    print(f"{len(report.figures)} passed, {len(report.skipped)} skipped, {len(report.failed)} failed")
    if path:
        print(f"figures: {path}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``agpt doctor`` and ``agpt verify``: what this machine can run, and whether a bundle works here."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..bundles.bundle import Bundle, default_bundle, open_bundle
from ..cameras.device import present_cameras
from ..common.errors import AgptError, BundleError
from ..common.machine import memory_gib
from ..common.printable import printable
from ..inspection.verdict import Status
from ..vision.engines import AUTO, BACKENDS
from ..vision.engines.agreement import compare_with_cpu
from ..vision.engines.gpu import find_gpu
from ..vision.engines.plans import inspect_plan

REQUIRED = ("numpy", "opencv-python-headless", "onnxruntime", "llama-cpp-python", "msgspec", "typer", "rich")
# Import name, what it is for, and the extra that brings it.
OPTIONAL = (
    ("torch", "agpt export", "export"),
    ("tensorrt_rtx", "building TensorRT-RTX plans, without a GPU too", "tensorrt-rtx"),
    ("pycuda", "CUDA kernels and TensorRT's buffers", "cuda"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says how to get what is missing."""

    name: str
    found: str
    fix: str = ""
    needed: bool = True


def examine() -> list[Finding]:
    """Everything the report says, most needed first."""
    return [_machine(), _gpu(), *_packages(), *_engines(), _cameras(), _shipped_bundle(), *_extras()]


def print_report(findings: list[Finding] | None = None) -> bool:
    """Print the findings, this machine's when none are given; true when nothing needed is missing."""
    findings = findings or examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok  " if not finding.fix else ("MISS" if finding.needed else "--  ")
        fix = f"  -> {printable(finding.fix)}" if finding.fix else ""
        print(f"{mark}  {finding.name:<{width}}  {printable(finding.found)}{fix}")
    return not any(finding.fix and finding.needed for finding in findings)


def verify_bundle(folder: Path | None, engine: str = AUTO) -> None:
    """Check every digest and every plan, open the bundle and inspect one grey frame with it.

    A plan of an engine that this machine cannot run is looked at as far as that goes without loading it. An engine
    other than the CPU's is compared with that one, by the tolerances in the manifest.

    Raises:
        BundleError: altered, incomplete, or it does not work on this machine.
        ConfigError: the engine cannot run here.
    """
    from ..inspection.inspector import Inspector

    bundle = open_bundle(folder)
    manifest = bundle.manifest
    print(f"bundle {manifest.name} at {bundle.folder}")
    for name, record in sorted(manifest.files.items()):
        print(f"  {name:<32} {record.bytes:>14,} bytes  sha256 {record.sha256[:16]}…  ok")
    for component, entry in manifest.components.items():
        print(f"  {component:<32} {entry.precision}")
    _verify_plans(bundle)
    for notice in manifest.notices:
        print(f"  notice: {notice}")
    with Inspector.open(bundle.folder, engine=engine) as inspector:
        started = time.perf_counter()
        verdict = inspector.inspect(np.full((480, 640, 3), 128, np.uint8))
        if verdict.status == Status.NO_RESULT:
            raise BundleError(
                f"{bundle.folder} opens but gives no verdict here ({verdict.reason}): run agpt doctor"
            )
        milliseconds = (time.perf_counter() - started) * 1e3
        print(f"  one inspection by {inspector.engine:<23} {milliseconds:>8.1f} ms     ok")
        for stage, error, limit in compare_with_cpu(bundle, inspector.engine, inspector.vision.networks):
            print(f"  {stage:<32} {error:.1e} from onnxruntime on the CPU, {limit:.0e} allowed  ok")


def _verify_plans(bundle: Bundle) -> None:
    """Raises BundleError for a plan that is not what the manifest says; says which would run here."""
    for component, plans in bundle.manifest.plans.items():
        for plan in plans:
            inspect_plan(bundle, component, plan)
            obstacle = BACKENDS[plan.engine].unavailable_reason(bundle)
            verdict = f"cannot run here: {obstacle}" if obstacle else "runs here"
            print(f"  {plan.file:<32} for {plan.built_for}: whole; {verdict}")


def _gpu() -> Finding:
    gpu = find_gpu()
    if gpu is None:
        fix = "install its driver; without one everything runs on the CPU"
        return Finding("GPU", "no NVIDIA GPU that this process can use", fix=fix, needed=False)
    return Finding("GPU", f"{gpu.name}, compute capability {gpu.compute_capability}", needed=False)


def _machine() -> Finding:
    found = f"{platform.machine()}, {os.cpu_count()} CPU threads, {memory_gib():.1f} GiB, {platform.system()}"
    return Finding("machine", f"{found}, Python {platform.python_version()}")


def _packages() -> list[Finding]:
    findings = []
    for name in REQUIRED:
        try:
            findings.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", fix=f"pip install {name}"))
    return findings


def _engines() -> list[Finding]:
    """What could run a bundle's networks on this machine, and what would by itself."""
    findings = []
    for name, backend in BACKENDS.items():
        try:
            obstacle = backend.unavailable_reason(None)
        except (ImportError, AgptError) as error:
            obstacle = str(error)
        reason, _, fix = obstacle.partition(": ")
        found = reason or "runs here"
        findings.append(Finding(f"engine {name}", found, fix=fix, needed=name == "onnxruntime"))
    return findings


def _cameras() -> Finding:
    numbers = present_cameras()
    if numbers:
        return Finding("cameras", ", ".join(map(str, numbers)), needed=False)
    return Finding("cameras", "none", fix="plug one in, or use --source demo or a folder", needed=False)


def _shipped_bundle() -> Finding:
    try:
        manifest = open_bundle(default_bundle()).manifest
    except AgptError as error:
        return Finding("shipped bundle", "not usable", fix=str(error))
    return Finding(
        "shipped bundle", f"{manifest.name}, {sum(f.bytes for f in manifest.files.values()) / 1e6:.1f} MB"
    )


def _extras() -> list[Finding]:
    findings = []
    for module, purpose, extra in OPTIONAL:
        if find_spec(module):
            findings.append(Finding(module, f"there, for {purpose}", needed=False))
        else:
            fix = f'pip install "anomalygpt-edge[{extra}]"'
            findings.append(Finding(module, f"not there, for {purpose}", fix=fix, needed=False))
    return findings

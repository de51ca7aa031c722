"""What this machine can run, what is missing, and how to get it: the report of ``agpt doctor``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec

from ..bundles.bundle import default_bundle, open_bundle
from ..cameras.device import present_cameras
from ..common.errors import AgptError
from ..common.install import how_to_install, how_to_install_package
from ..common.machine import Finding, memory_gib
from ..common.printable import printable
from ..vision.engines import BACKENDS
from ..vision.engines.gpu import find_gpu

REQUIRED = ("numpy", "opencv-python-headless", "onnxruntime", "llama-cpp-python", "msgspec", "typer", "rich")
# Import name, purpose, and the extra that installs it.
OPTIONAL = (
    ("torch", "agpt export", "export"),
    ("tensorrt_rtx", "building TensorRT-RTX plans (no GPU needed)", "tensorrt-rtx"),
    ("pycuda", "CUDA kernels and TensorRT's buffers", "cuda"),
)


def examine() -> list[Finding]:
    """All findings of the report, the most important first."""
    return [_machine(), _gpu(), *_packages(), *_engines(), _cameras(), _shipped_bundle(), *_extras()]


def print_report(findings: list[Finding] | None = None) -> bool:
    """Print findings (default: about this machine). True when nothing needed is missing."""
    findings = findings or examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok  " if not finding.fix else ("MISS" if finding.needed else "--  ")
        fix = f"  -> {printable(finding.fix)}" if finding.fix else ""
        print(f"{mark}  {finding.name:<{width}}  {printable(finding.found)}{fix}")
    return not any(finding.fix and finding.needed for finding in findings)


def _gpu() -> Finding:
    gpu = find_gpu()
    if gpu is None:
        fix = "install the NVIDIA driver; without a GPU everything runs on the CPU"
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
            findings.append(Finding(name, "missing", fix=how_to_install_package(name)))
    return findings


def _engines() -> list[Finding]:
    """Which engines can run a bundle's networks on this machine, and what the others lack."""
    findings = []
    for name, backend in BACKENDS.items():
        try:
            unavailable = backend.unavailable_reason(None)
        except (ImportError, AgptError) as error:
            unavailable = str(error)
        reason, _, fix = unavailable.partition(": ")
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
            findings.append(Finding(module, f"installed, for {purpose}", needed=False))
        else:
            fix = how_to_install(extra)
            findings.append(Finding(module, f"not installed, for {purpose}", fix=fix, needed=False))
    return findings

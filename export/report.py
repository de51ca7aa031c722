"""The report at the end of an export: sizes, precisions, parity, and requirements of the bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..runtime.bundles.bundle import Manifest
from .parity import StageResult


@dataclass(frozen=True)
class Report:
    """What was published, and the results of its comparison with the checkpoints."""

    bundle: Path
    manifest: Manifest
    parity: list[StageResult]
    seconds: float


def print_report(report: Report, console: Console) -> None:
    """Print sizes, precisions, parity, and requirements of the bundle."""
    manifest = report.manifest
    files = Table("file", "precision", "MB", title=f"{report.bundle}: {manifest.name}")
    precision = {component.file: component.precision for component in manifest.components.values()}
    precision |= {plan.file: plan.built_for for plans in manifest.plans.values() for plan in plans}
    for name, record in manifest.files.items():
        files.add_row(name, precision.get(name, ""), f"{record.bytes / 1e6:.1f}")
    stages = Table("stage", "error", "allowed", "", title="Parity with the checkpoints")
    for result in report.parity:
        error = f"{result.error:.1e}" if math.isfinite(result.error) else "not finite"
        verdict = "ok" if result.passed else "[red]FAILED"
        stages.add_row(result.stage, f"{error} {result.kind}", f"{result.limit:.0e}", verdict)
    total = sum(record.bytes for record in manifest.files.values())
    console.print(files, stages)
    for engine, figures in manifest.parity.get("engines", {}).items():
        if not figures["compared"]:
            console.print(
                f"plans for {engine} were not compared: {figures['reason']}; run agpt verify on the device"
            )
    engines = " or ".join(
        ["onnxruntime", *dict.fromkeys(plan.engine for plans in manifest.plans.values() for plan in plans)]
    )
    for line in (
        f"{total / 1e6:.0f} MB in {report.seconds:.0f} s; classes: {', '.join(manifest.classes)}",
        f"needs {engines}, llama-cpp-python, NumPy and OpenCV, no torch, and more than {total / 1e9:.1f} GB of memory",
        f"try it: agpt run --bundle {report.bundle}",
    ):
        console.print(line, highlight=False, soft_wrap=True)

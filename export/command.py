"""What ``agpt export`` runs: an export with its report, or plans for a bundle that is there."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..runtime.bundles.bundle import NETWORKS
from ..runtime.common.errors import ConfigError, Interrupted
from ..runtime.common.install import how_to_install
from .options import ExportOptions
from .tensorrt_plan import PLAN_ENGINES, PlanOptions, rebuild


def run_export(options: ExportOptions) -> None:
    """Export and print the report.

    Raises:
        AgptError: a mistake of the user, in one sentence.
        ConfigError: a package of the extra "export" is not installed.
        Interrupted: the user stopped it.
    """
    try:
        from .pipeline import export_bundle
        from .report import print_report
    except ImportError as error:
        raise ConfigError(
            f"agpt export needs a package that is not installed ({error.name}): {how_to_install('export')}"
        ) from error
    console = Console()
    try:
        print_report(export_bundle(options, console), console)
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or "interrupted") from stop


def plan_options(
    engines: tuple[str, ...],
    capabilities: tuple[str, ...],
    max_batch: int,
    version_compatible: bool,
    hardware_compatible: bool,
) -> tuple[PlanOptions, ...]:
    """What each engine's plans are built for. An option that only one of two engines has goes to that one.

    Raises:
        ConfigError: an option that none of them has.
    """
    several = len(set(engines) & set(PLAN_ENGINES)) > 1
    return tuple(
        PlanOptions(
            engine=engine,
            capabilities=() if several and engine == "tensorrt" else capabilities,
            max_batch=max_batch,
            version_compatible=version_compatible and not (several and engine == "tensorrt-rtx"),
            hardware_compatible=hardware_compatible and not (several and engine == "tensorrt-rtx"),
        )
        for engine in PLAN_ENGINES
        if engine in engines
    )


def build_plans_of(
    bundle: Path | None,
    resume: bool,
    plans: tuple[PlanOptions, ...],
    checkpoints: list[str],
    allow_failure: bool,
) -> None:
    """``--resume``: plans from a bundle's own graphs.

    Raises:
        ConfigError: the options do not fit together, or an engine cannot build here.
    """
    if bundle is None or not resume:
        raise ConfigError(
            "building plans needs both --resume and a bundle: agpt export --resume --engine tensorrt BUNDLE"
        )
    if checkpoints:
        raise ConfigError(f"--resume needs the bundle alone: leave out --{checkpoints[0]}")
    if not plans:
        raise ConfigError(f"--resume builds plans: give --engine {' or '.join(PLAN_ENGINES)}")
    console = Console()
    started = time.monotonic()
    total = len(NETWORKS) * len(plans)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("Build plans", total=total)
        manifest = rebuild(bundle, plans, lambda: progress.advance(task), allow_failure)
    for network in NETWORKS:
        for plan in manifest.plans[network]:
            size = manifest.files[plan.file].bytes / 1e6
            console.print(f"{plan.file}: {size:.1f} MB, for {plan.built_for}", highlight=False)
    for engine, report in manifest.parity["engines"].items():
        words = report.get("reason", "computes what the graphs say")
        console.print(
            f"{engine}: {'compared' if report['compared'] else 'not compared'}, {words}", highlight=False
        )
    console.print(f"{bundle}: {total} plans in {time.monotonic() - started:.0f} s", highlight=False)


def split(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())

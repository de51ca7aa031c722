"""``agpt export``: converts research checkpoints to one bundle for edge devices."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..runtime.bundles.bundle import NETWORKS
from ..runtime.cli import main as cli
from ..runtime.common.errors import ConfigError, Interrupted
from .options import ENGINES, LLM_PRECISIONS, PRECISIONS, RESIZE_MODES, ExportOptions, parse_size
from .tensorrt_plan import PLAN_ENGINES, PlanOptions, rebuild

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def export(
    bundle: Annotated[
        Path | None, typer.Argument(help="With --resume: the bundle to add the plans of --engine to.")
    ] = None,
    imagebind: Annotated[
        Path | None, typer.Option(help="imagebind_huge.pth, or another tower saved under the same key names.")
    ] = None,
    vicuna: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the language model (Vicuna v0).")
    ] = None,
    pandagpt: Annotated[
        Path | None, typer.Option(help="PandaGPT's pytorch_model.pt (LoRA and llama_proj).")
    ] = None,
    anomalygpt: Annotated[
        Path | None, typer.Option(help="AnomalyGPT's pytorch_model.pt (decoder, learner).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Bundle folder to write; an existing bundle is replaced.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Build plans from a bundle's graphs on the device; needs neither checkpoints nor torch.",
        ),
    ] = False,
    text_features: Annotated[
        Path | None,
        typer.Option(
            help="npz file of text features, class name to [2, E] (normal, abnormal); by default they are computed "
            "with ImageBind's text tower."
        ),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="model.json with the model's name, notices and region levels.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"Precision of the networks: {', '.join(PRECISIONS)}.")
    ] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your normal images to calibrate --precision int8 with; by default generated ones alone."
        ),
    ] = None,
    llm_quant: Annotated[
        str, typer.Option(help=f"Precision of the language model: {', '.join(LLM_PRECISIONS)}.")
    ] = "f16",
    engine: Annotated[
        str, typer.Option(help=f"Engines to export for, comma-separated: {', '.join(ENGINES)}.")
    ] = "onnx",
    compute_capability: Annotated[
        str,
        typer.Option(
            help="Compute capabilities to build tensorrt-rtx plans for, comma-separated, for example 8.9; by default "
            "this GPU's or, without a GPU, those of GeForce RTX 30, 40 and 50."
        ),
    ] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch that the plans accept.")] = 4,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Build plans that later TensorRT releases of the same major version can load too.",
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Build plans that run on other GPUs of compute capability 8.0 and later too; not on Jetson.",
        ),
    ] = False,
    classes: Annotated[
        str,
        typer.Option(
            help="Class names, comma-separated: any with the text tower, else those of --text-features; all known "
            "ones by default."
        ),
    ] = "",
    resize: Annotated[
        str, typer.Option(help=f"How frames become square: {' or '.join(RESIZE_MODES)}.")
    ] = "crop",
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse at once an export that would take more memory, for example 8G.")
    ] = None,
    allow_parity_failure: Annotated[
        bool,
        typer.Option(
            "--allow-parity-failure",
            help="Publish a bundle that fails the comparison; the failure is recorded in its manifest.",
        ),
    ] = False,
) -> None:
    """Convert checkpoints to a bundle, compare it with them, and publish it completely or not at all."""
    plans = plan_options(
        split(engine), split(compute_capability), max_batch, version_compatible, hardware_compatible
    )
    needed = {
        "imagebind": imagebind,
        "vicuna": vicuna,
        "pandagpt": pandagpt,
        "anomalygpt": anomalygpt,
        "out": out,
    }
    if resume or bundle is not None:
        build_plans_of(
            bundle, resume, plans, [name for name, path in needed.items() if path], allow_parity_failure
        )
        return
    if imagebind is None or vicuna is None or pandagpt is None or anomalygpt is None or out is None:
        missing = ", ".join(f"--{name}" for name, path in needed.items() if path is None)
        raise ConfigError(
            f"agpt export needs {missing}: give the missing options, or run agpt export --resume --engine … BUNDLE "
            "to build plans only"
        )
    options = ExportOptions(
        imagebind=imagebind,
        vicuna=vicuna,
        pandagpt=pandagpt,
        anomalygpt=anomalygpt,
        text_features=text_features,
        out=out,
        about=about,
        precision=precision,
        calibration=calibration,
        llm_quant=llm_quant,
        engines=split(engine),
        plans=plans,
        classes=split(classes),
        resize=resize,  # type: ignore[arg-type]  # checked by ExportOptions
        allow_parity_failure=allow_parity_failure,
        max_memory=parse_size(max_memory) if max_memory else None,
    )
    try:
        from .pipeline import export_bundle
        from .report import print_report
    except ImportError as error:
        raise ConfigError(
            f"agpt export needs a package that is not installed ({error.name}): "
            "pip install 'anomalygpt-edge[export]'"
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
    """Build options of each engine. With both engines, an option that one does not support applies to the other.

    Raises:
        ConfigError: no engine supports an option.
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
    """``--resume``: build plans from a bundle's graphs.

    Raises:
        ConfigError: the options do not fit together, or an engine cannot build on this machine.
    """
    if bundle is None or not resume:
        raise ConfigError(
            "building plans needs both --resume and a bundle: run agpt export --resume --engine tensorrt BUNDLE"
        )
    if checkpoints:
        raise ConfigError(f"--resume takes only the bundle: leave out --{checkpoints[0]}")
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
        result = report.get("reason", "computes what the graphs define")
        console.print(
            f"{engine}: {'compared' if report['compared'] else 'not compared'}, {result}", highlight=False
        )
    console.print(f"{bundle}: {total} plans in {time.monotonic() - started:.0f} s", highlight=False)


def split(text: str) -> tuple[str, ...]:
    """The items of a comma-separated list, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def export_command(arguments: list[str]) -> None:
    """Run ``agpt export`` with these arguments.

    Raises:
        AgptError: a user error, in one or two sentences.
        Interrupted: the user stopped it.
    """
    if app(args=arguments, prog_name="agpt export", standalone_mode=False) == cli.EXIT_INTERRUPTED:
        raise Interrupted("interrupted")


def main() -> None:
    """``python -m anomalygpt_edge.export`` is ``agpt export``."""
    sys.argv[1:] = ["export", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()

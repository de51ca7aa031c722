"""``agpt export``: research checkpoints to one bundle for the edge; the work is done in ``export/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError
from .options import path


def export(
    bundle: Annotated[
        Path | None,
        typer.Argument(parser=path, help="With --resume: the bundle that gets the plans of --engine."),
    ] = None,
    imagebind: Annotated[
        Path | None, typer.Option(parser=path, help="imagebind_huge.pth, or a tower saved in its key names.")
    ] = None,
    vicuna: Annotated[
        Path | None, typer.Option(parser=path, help="Hugging Face folder of the language model (Vicuna v0).")
    ] = None,
    pandagpt: Annotated[
        Path | None, typer.Option(parser=path, help="PandaGPT's pytorch_model.pt (LoRA and llama_proj).")
    ] = None,
    anomalygpt: Annotated[
        Path | None, typer.Option(parser=path, help="AnomalyGPT's pytorch_model.pt (decoder, learner).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path, help="Bundle folder to write; a bundle that is there is replaced."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Build plans from a bundle's own graphs, on the device: no checkpoints, no torch.",
        ),
    ] = False,
    text_features: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="npz: class name to [2, E] (normal, abnormal); computed with ImageBind's text tower when left out.",
        ),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(parser=path, help="model.json: name, notices, region levels.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the networks: fp32, fp16 or int8.")] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder of normal images, for --precision int8; drawn parts when left out."
        ),
    ] = None,
    llm_quant: Annotated[
        str, typer.Option(help="Of the language model: f16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.")
    ] = "f16",
    engine: Annotated[str, typer.Option(help="Comma-separated: onnx, tensorrt, tensorrt-rtx.")] = "onnx",
    compute_capability: Annotated[
        str,
        typer.Option(
            help="For tensorrt-rtx, comma-separated, for example 8.9; this GPU's or the usual ones."
        ),
    ] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of plans.")] = 4,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Plans for later TensorRTs of the major version too.")
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option("--hardware-compatible", help="Plans for other GPUs from 8.0 on too; not on Jetson."),
    ] = False,
    classes: Annotated[
        str,
        typer.Option(help="Comma-separated class names, with the text tower any; all known when left out."),
    ] = "",
    resize: Annotated[str, typer.Option(help="How frames become square: crop or stretch.")] = "crop",
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse at once what would take more memory, for example 8G.")
    ] = None,
    allow_parity_failure: Annotated[
        bool, typer.Option("--allow-parity-failure", help="Publish, marked, what fails the comparison.")
    ] = False,
) -> None:
    """Turn checkpoints into a bundle, compare it with them, and publish it whole or not at all."""
    from ...export.command import build_plans_of, plan_options, run_export, split
    from ...export.options import ExportOptions, parse_size

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
            bundle, resume, plans, [name for name, given in needed.items() if given], allow_parity_failure
        )
        return
    if imagebind is None or vicuna is None or pandagpt is None or anomalygpt is None or out is None:
        missing = ", ".join(f"--{name}" for name, given in needed.items() if given is None)
        raise ConfigError(
            f"agpt export needs {missing}: give it, or agpt export --resume --engine … BUNDLE for plans alone"
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
    run_export(options)

"""``agpt export``: converts research checkpoints to a bundle. The code for it is in ``export/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError
from .options import path


def export(
    bundle: Annotated[
        Path | None,
        typer.Argument(parser=path, help="With --resume: the bundle to build plans for."),
    ] = None,
    imagebind: Annotated[
        Path | None,
        typer.Option(parser=path, help="imagebind_huge.pth, or an encoder with the same key names."),
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
        typer.Option(parser=path, help="Bundle folder to write; an existing bundle is replaced."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Build plans on the device, from the graphs in a bundle; needs no checkpoints and no torch.",
        ),
    ] = False,
    text_features: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="npz file: class name to [2, E] (normal, abnormal). Default: computed with ImageBind's text tower.",
        ),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(parser=path, help="model.json with name, notices and region levels.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of the networks: fp32, fp16 or int8.")] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="For --precision int8: folder of normal images. Default: generated images."
        ),
    ] = None,
    llm_quant: Annotated[
        str, typer.Option(help="Type of the language model: f16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.")
    ] = "f16",
    engine: Annotated[
        str, typer.Option(help="Engines, comma-separated: onnx, tensorrt, tensorrt-rtx.")
    ] = "onnx",
    compute_capability: Annotated[
        str,
        typer.Option(
            help="For tensorrt-rtx: compute capabilities, comma-separated, for example 8.9. Default: this machine's "
            "GPU, or common ones where there is none."
        ),
    ] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch size of the plans.")] = 4,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Build plans that also run on later TensorRTs of this major version."
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Build plans that also run on other GPUs from 8.0 on; not for Jetson.",
        ),
    ] = False,
    classes: Annotated[
        str,
        typer.Option(help="Class names, comma-separated; any names with the text tower. Default: all known."),
    ] = "",
    resize: Annotated[str, typer.Option(help="How frames are made square: crop or stretch.")] = "crop",
    max_memory: Annotated[
        str | None, typer.Option(help="Stop an export that would need more memory, for example 8G.")
    ] = None,
    allow_parity_failure: Annotated[
        bool,
        typer.Option(
            "--allow-parity-failure", help="Publish a bundle that fails the comparison, and mark it."
        ),
    ] = False,
) -> None:
    """Convert checkpoints to a bundle, and publish it only when its results agree with theirs."""
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
            f"agpt export needs {missing}: add it, or build only plans with agpt export --resume --engine … BUNDLE"
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

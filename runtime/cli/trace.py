"""``agpt trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BundleArgument,
    ClassOption,
    EngineOption,
    NormalOption,
    ThreadsOption,
    path,
)


def trace(
    bundle: BundleArgument,
    image: Annotated[Path, typer.Argument(parser=path, help="The image.")],
    out: Annotated[Path, typer.Option(parser=path, help="The npz file to write.")],
    normal: NormalOption = None,
    class_name: ClassOption = None,
    resize: Annotated[
        str | None,
        typer.Option(help="How the image is made square: crop or stretch. Default: the bundle's setting."),
    ] = None,
    question: Annotated[str, typer.Option(help="The question. Default: the bundle's.")] = "",
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Write every intermediate result of one inspection to a file, to compare with another program."""
    from ..evaluation.trace import TraceOptions, trace_image

    options = TraceOptions(bundle, image, tuple(normal or ()), class_name, resize, question, threads, engine)
    trace_image(options, out)

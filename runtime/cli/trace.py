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
    out: Annotated[Path, typer.Option(parser=path, help="npz file to write.")],
    normal: NormalOption = None,
    class_name: ClassOption = None,
    resize: Annotated[
        str | None,
        typer.Option(help="How the image becomes square: crop or stretch; the bundle's if left out."),
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask; the bundle's own question if left out.")] = "",
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Write every intermediate result of one inspection, to compare with another program."""
    from ..evaluation.trace import TraceOptions, trace_image

    options = TraceOptions(bundle, image, tuple(normal or ()), class_name, resize, question, threads, engine)
    trace_image(options, out)

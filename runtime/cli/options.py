"""Options that several commands share. Every command's module imports this one, so it imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError


def path(text: str) -> Path:
    """Convert an argument of the command line to a path.

    Raises:
        ConfigError: the argument is empty, which ``Path`` takes for the current folder.
    """
    if not str(text).strip():
        raise ConfigError("a path on the command line is empty: name a file or folder, or . for this folder")
    return Path(text)


BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle", parser=path, help="Bundle folder. Default: the lite model that ships with the package."
    ),
]
BundleArgument = Annotated[Path, typer.Argument(parser=path, help="Bundle folder.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", parser=path, help="Product recipe, written by agpt enroll.")
]
ClassOption = Annotated[
    str | None, typer.Option("--class", help="Class of the part: one of the bundle's class names.")
]
NormalOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--normal",
        parser=path,
        metavar="PATH",
        help="Image of a good part, or a folder of such images and its subfolders. May be given several times.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores, at most 8.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Inference engine of the networks: tensorrt, tensorrt-rtx, onnxruntime-tensorrt, onnxruntime-cuda or "
        "onnxruntime (CPU). auto selects the best one that this machine can run.",
    ),
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        "--tiles",
        help="Inspect tiles of the frame at full resolution, to find small defects: ROWSxCOLUMNS, for example 3x3, or "
        "a tile's side in pixels, for example 448.",
    ),
]
DEFAULT_OVERLAP = 0.2
OverlapOption = Annotated[
    float,
    typer.Option(
        "--overlap", min=0.0, max=0.9, help="Overlap of neighbouring tiles, as a fraction of a tile."
    ),
]

"""Options that several commands share. Imports nothing heavy: every command's file does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError


def path(text: str) -> Path:
    """A path of the command line.

    Raises:
        ConfigError: it is empty, which would mean the current folder.
    """
    if not str(text).strip():
        raise ConfigError("a path on the command line is empty: name a file or folder, or . for this folder")
    return Path(text)


BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle", parser=path, help="Bundle folder. Default: the nano model that ships with the package."
    ),
]
BundleArgument = Annotated[Path, typer.Argument(parser=path, help="Bundle folder.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", parser=path, help="Product recipe made by agpt enroll.")
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
        help="Image of a good part, or a folder of them with its subfolders; may be given several times.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores, at most 8.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Engine of the networks: tensorrt, tensorrt-rtx, onnxruntime-tensorrt, onnxruntime-cuda or "
        "onnxruntime (CPU). auto takes the best that this machine can run.",
    ),
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        "--tiles",
        help="Inspect tiles of the frame at their own resolution, for small defects: ROWSxCOLUMNS like 3x3, or a "
        "tile's side in pixels like 448.",
    ),
]
DEFAULT_OVERLAP = 0.2
OverlapOption = Annotated[
    float,
    typer.Option("--overlap", min=0.0, max=0.9, help="Overlap of neighbouring tiles, as a share of a tile."),
]

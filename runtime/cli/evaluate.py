"""``agpt eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DEFAULT_OVERLAP,
    BundleArgument,
    ClassOption,
    EngineOption,
    OverlapOption,
    ThreadsOption,
    TilesOption,
    path,
)


def evaluate(
    bundle: BundleArgument,
    folder: Annotated[
        Path,
        typer.Argument(parser=path, help="Folder of one category or several, in MVTec-AD or VisA layout."),
    ],
    shots: Annotated[
        str, typer.Option(help="Numbers of normal samples, comma-separated; 0 is zero-shot.")
    ] = "0,1,2,4",
    json: Annotated[
        Path | None, typer.Option(parser=path, help="Also write the figures to this JSON file.")
    ] = None,
    class_name: ClassOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of normal samples.")] = 0,
    tiles: TilesOption = None,
    overlap: OverlapOption = DEFAULT_OVERLAP,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Measure a bundle on labelled images: image and pixel AUROC, verdict accuracy."""
    from ..evaluation.evaluate import evaluate_folder, parse_shots, print_table, write_json
    from ..vision.views import parse_tiles

    grid = parse_tiles(tiles, overlap) if tiles is not None else None
    results = evaluate_folder(bundle, folder, parse_shots(shots), class_name, seed, threads, engine, grid)
    print_table(results)
    if json is not None:
        write_json(results, json)

"""``agpt run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BundleOption,
    ClassOption,
    EngineOption,
    NormalOption,
    RecipeOption,
    ThreadsOption,
    path,
)


def run(
    source: Annotated[
        str,
        typer.Option(
            help="demo, a folder of images (and its subfolders), an image, a video file, or a camera's number."
        ),
    ] = "demo",
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for records.jsonl and overlays/.")
    ] = None,
    overlays: Annotated[str, typer.Option(help="Overlays to write: all, reject (no PASS) or none.")] = "all",
    parts: Annotated[int | None, typer.Option(min=1, help="Stop after this many parts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the demo line's generated parts.")] = 0,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
    budget_ms: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Time budget of each part in milliseconds. When it runs out, stages are skipped: first the sentence, "
            "then the verdict.",
        ),
    ] = None,
) -> None:
    """Inspect the frames of a source; show a live table and a summary, write records and overlays."""
    from ..station.run import RunOptions, run_line

    run_line(
        RunOptions(
            source=source,
            bundle=bundle,
            recipe=recipe,
            normals=tuple(normal or ()),
            class_name=class_name,
            out=out,
            overlays=overlays,
            parts=parts,
            seed=seed,
            threads=threads,
            engine=engine,
            budget_ms=budget_ms,
        )
    )

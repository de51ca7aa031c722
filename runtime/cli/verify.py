"""``agpt verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import EngineOption, path


def verify(
    bundle: Annotated[
        Path | None,
        typer.Argument(parser=path, help="Bundle folder. Default: the one that ships with the package."),
    ] = None,
    engine: EngineOption = "auto",
) -> None:
    """Check a bundle: every file's digest, then one inspection on this machine."""
    from ..evaluation.verify import verify_bundle

    verify_bundle(bundle, engine)

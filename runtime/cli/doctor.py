"""``agpt doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.errors import ConfigError
from ..common.install import how_to_install
from ..common.machine import Finding


def doctor(
    checkpoints: Annotated[
        tuple[Path, Path, Path, Path] | None,
        typer.Option(
            metavar="IMAGEBIND VICUNA PANDAGPT ANOMALYGPT", help="Check these four checkpoints instead."
        ),
    ] = None,
) -> None:
    """Report what this machine can run, what is missing and how to install it; or check a set of checkpoints."""
    from ..station.doctor import print_report

    if not print_report(examine_checkpoints(checkpoints) if checkpoints else None):
        raise typer.Exit(1)


def examine_checkpoints(checkpoints: tuple[Path, Path, Path, Path]) -> list[Finding]:
    """Findings about the four checkpoints.

    Raises:
        ConfigError: the packages of the extra "export" are not installed.
    """
    try:
        from ...export.checkpoint_report import report_checkpoints
    except ImportError as error:
        raise ConfigError(
            f"the check of checkpoints needs the package {error.name}, which is not installed: "
            f"{how_to_install('export')}"
        ) from error
    return report_checkpoints(*checkpoints)

"""The commands that install a missing package on this machine."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # root of a clone; an installed wheel has no setup.py there


def how_to_install(extra: str) -> str:
    """The command that installs an extra ("export", "cuda" …): into a clone's environment or from the package index."""
    if not (ROOT / "setup.py").is_file():
        return f"pip install 'anomalygpt-edge[{extra}]'"
    return f"{pip_command()} install -e {shlex.quote(f'{_from_here(ROOT)}[{extra}]')}"


def how_to_install_package(name: str) -> str:
    """The command that installs one package from the package index."""
    return f"{pip_command() if (ROOT / 'setup.py').is_file() else 'pip'} install {shlex.quote(name)}"


def pip_command() -> str:
    """This environment's pip, relative to the current folder where it is below that."""
    return shlex.quote(
        str(Path(_from_here(Path(sys.prefix)), "bin" if os.name == "posix" else "Scripts", "pip"))
    )


def _from_here(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)

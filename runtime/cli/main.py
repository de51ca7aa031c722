"""The command ``agpt``, put together. Heavy imports happen inside the commands: ``agpt --help`` answers at once."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..common.errors import AgptError, Interrupted
from ..common.printable import printable
from .ask import ask
from .doctor import doctor
from .enroll import enroll
from .evaluate import evaluate
from .export import export
from .run import run
from .trace import trace
from .verify import verify

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "enroll": enroll,
    "ask": ask,
    "trace": trace,
    "eval": evaluate,
    "export": export,
    "verify": verify,
    "doctor": doctor,
}

app = typer.Typer(
    name="agpt",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point: a user's mistake is one sentence on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter shows "?"
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        if (
            status == EXIT_INTERRUPTED
        ):  # typer's word for a KeyboardInterrupt; its earlier versions raise Abort
            _complain("interrupted", status)
    except Interrupted as stop:
        status = _complain(str(stop), EXIT_INTERRUPTED)
    except AgptError as error:
        status = _complain(str(error), EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        status = _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (agpt run | head): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        status = _complain(f"cannot use {error.filename} ({error.strerror}): check it", EXIT_BAD_INPUT)
    except Exception as error:
        # The command line's own errors (unknown option, missing value); their module moved between releases.
        if not hasattr(error, "format_message"):
            raise
        status = _complain(error.format_message() or "see agpt --help", EXIT_BAD_INPUT)
    sys.exit(status if isinstance(status, int) else 0)


def _complain(sentence: str, status: int) -> int:
    print(f"agpt: {printable(sentence)}", file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"agpt {version('anomalygpt-edge')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Inspect parts with AnomalyGPT: a verdict sentence and an anomaly map for every frame."""


if __name__ == "__main__":
    main()

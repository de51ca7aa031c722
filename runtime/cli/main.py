"""The command ``agpt``, put together. Heavy imports happen inside the commands: ``agpt --help`` answers at once."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from ..common.errors import AgptError, NoReaderError
from ..common.terminal import tell
from .ask import ask
from .command import register
from .doctor import doctor
from .enroll import enroll
from .evaluate import evaluate
from .export import export
from .run import run
from .schema import schema
from .trace import trace
from .verify import verify

# docs/exit-codes.md
EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EPILOG = (
    "Exit status: 0 when the work is done; 1 when agpt doctor misses something; 2 on an error, which is one sentence "
    "on standard error; 130 after Ctrl-C and 143 after SIGTERM; 141 when the reader of standard output has gone. "
    "docs/exit-codes.md has the details."
)

app = typer.Typer(
    name="agpt",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
register(app, "run", run)
register(app, "enroll", enroll)
register(app, "ask", ask)
register(app, "trace", trace)
register(app, "eval", evaluate)
register(app, "export", export)
register(app, "verify", verify)
register(app, "doctor", doctor)
register(app, "schema", schema)


def main() -> None:
    """Entry point: a user's mistake is one sentence on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter shows "?"
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="agpt", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what the system does not take is heard of here, not at the interpreter's end
        if (
            status == EXIT_INTERRUPTED
        ):  # typer's word for a KeyboardInterrupt; its earlier versions raise Abort
            tell("interrupted")
    except AgptError as error:
        tell(str(error))
        status = error.status
    except (KeyboardInterrupt, typer.Abort):
        tell("interrupted")
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        tell(str(NoReaderError()))
        status = NoReaderError.status
    except OSError as error:
        tell(f"{_what_failed(error)} ({error.strerror or error}): check it")
        status = EXIT_ERROR
    except Exception as error:
        # The command line's own errors (unknown option, missing value); their module moved between releases.
        if not hasattr(error, "format_message"):
            raise
        tell(error.format_message() or "see agpt --help")
        status = EXIT_ERROR
    _end_output()
    sys.exit(status if isinstance(status, int) else 0)


def _what_failed(error: OSError) -> str:
    if error.filename is not None:
        return f"cannot use {os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}"
    return "the system refused to read or write"


def _end_output() -> None:
    """Write what is buffered, and let the interpreter not try again what standard output does not take."""
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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

"""Entry point of ``agpt``. The commands import heavy modules when they run, so that ``agpt --help`` is fast."""

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
    "Exit status: 0 on success; 1 when agpt doctor finds that something needed is missing; 2 on an error, which is "
    "reported in one sentence on standard error; 130 after Ctrl-C; 143 after SIGTERM; 141 when the reader of standard "
    "output has closed it. See docs/exit-codes.md."
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
    """Run ``agpt``: an error that a user can cause gives one sentence on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for characters that the encoding lacks
    try:
        status = app(args=sys.argv[1:] or ["--help"], prog_name="agpt", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # raise write errors here, not when the interpreter exits
        if status == EXIT_INTERRUPTED:  # how typer reports a KeyboardInterrupt; earlier versions raise Abort
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
        tell(_describe(error))
        status = EXIT_ERROR
    except Exception as error:
        # typer's usage errors (unknown option, missing value); the module of their class differs between releases.
        if not hasattr(error, "format_message"):
            raise
        tell(error.format_message() or "see agpt --help")
        status = EXIT_ERROR
    _flush_output()
    sys.exit(status if isinstance(status, int) else 0)


def _describe(error: OSError) -> str:
    reason = error.strerror or error
    if error.filename is None:
        return f"a file could not be read or written ({reason}): check the disk and where the output goes"
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"cannot use {name} ({reason}): check the path and its permissions"


def _flush_output() -> None:
    """Flush standard output; if that fails, connect it to the null device, as the interpreter flushes again at exit."""
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

"""The base class of the ``agpt`` commands. Beyond typer's checks it rejects unexpected arguments and text that is not
UTF-8, and reports a closed standard output."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from ..common.errors import ConfigError, NoReaderError
from ..common.printable import is_text, readable

# Command -> what the user probably meant by an unexpected argument, which is put in for {}.
HINTS = {
    "run": "did you mean --source {}?",
    "enroll": "did you mean --normal {}?",
    "ask": "put the question in quotes",
    "doctor": "did you mean agpt verify {}?",
}
PATHS = {"source"}  # parameters that may be a file name, which need not be UTF-8


class Command(TyperCommand):
    """A command that suggests a fix for an unexpected argument and rejects text that is not UTF-8."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """
        Raises:
            ConfigError: there is an unexpected argument, or a text is not UTF-8.
        """
        left = super().parse_args(ctx, args)
        if left:
            name = f"agpt {self.name}"
            hint = HINTS.get(str(self.name), f"see {name} --help")
            raise ConfigError(f"{name} does not take the argument {left[0]!r}: {hint.format(left[0])}")
        for name, value in ctx.params.items():
            texts = value if isinstance(value, (list, tuple)) else [value]
            for text in texts:
                if isinstance(text, str) and name not in PATHS and not is_text(text):
                    raise ConfigError(f"{readable(text)!r} is not UTF-8 text: set the terminal to UTF-8")
        return left

    def invoke(self, ctx: Any) -> Any:
        """
        Raises:
            NoReaderError: standard output was closed; typer would exit without a message.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise NoReaderError from error


def register(app: typer.Typer, name: str, function: Any) -> None:
    """Add a command; ``agpt --help`` lists it with the complete first line of its docstring, unshortened."""
    app.command(name, cls=Command, short_help=(function.__doc__ or "").strip().split("\n")[0])(function)

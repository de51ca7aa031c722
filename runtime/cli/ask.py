"""``agpt ask``: questions line by line, answers line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.errors import ConfigError
from ..common.printable import printable
from .options import (
    BundleOption,
    ClassOption,
    EngineOption,
    ImageArgument,
    NormalOption,
    RecipeOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from ..language.dialogue import Dialogue


def ask(
    image: ImageArgument,
    question: Annotated[
        str | None,
        typer.Argument(
            help='What to ask, for example "Is there a crack?"; left out, one question a line is read.'
        ),
    ] = None,
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Ask about an image: one question, or a dialogue, a line a question, until the input ends."""
    from ..station.run import open_inspector
    from ..vision.images import read_image

    if question is not None and not question.strip():
        raise ConfigError("the question is empty: ask something")
    frame = read_image(image)
    with open_inspector(bundle, recipe, tuple(normal or ()), class_name, threads, engine) as inspector:
        dialogue = inspector.dialogue(frame)
        if dialogue.view:
            print(f"about {printable(dialogue.view)}, where the map is highest", file=sys.stderr)
        answer_lines(dialogue, sys.stdin if question is None else [question])


def answer_lines(dialogue: Dialogue, lines: Iterable[str]) -> None:
    """Print the answer to each line; empty lines are passed over. A question that does not fit is said so, and
    the dialogue goes on.

    Raises:
        ConfigError: the only question does not fit into the context.
    """
    talking = lines is sys.stdin
    at_terminal = talking and sys.stdin.isatty()
    num_dropped = 0
    _invite(at_terminal)
    for line in lines:
        if question := line.strip():
            try:
                answer = dialogue.ask(question)
            except ConfigError as error:
                if not talking:
                    raise
                print(f"agpt: {printable(str(error))}", file=sys.stderr)
            else:
                print(printable(answer.text), flush=True)
                if answer.num_turns_dropped > num_dropped:
                    num_dropped = answer.num_turns_dropped
                    print(
                        f"(the context is full: the first {num_dropped} questions are forgotten)", flush=True
                    )
        _invite(at_terminal)
    if at_terminal:
        print()


def _invite(at_terminal: bool) -> None:
    if at_terminal:
        print("> ", end="", flush=True)

"""``agpt ask``: questions line by line, answers line by line."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.errors import ConfigError
from ..common.printable import is_text, printable
from ..common.terminal import tell
from .options import (
    BundleOption,
    ClassOption,
    EngineOption,
    NormalOption,
    RecipeOption,
    ThreadsOption,
    path,
)

if TYPE_CHECKING:
    from ..bundles.bundle import Manifest
    from ..language.dialogue import Dialogue

FAREWELLS = ("quit", "exit")


def ask(
    image: Annotated[Path | None, typer.Argument(parser=path, help="The image.")] = None,
    question: Annotated[
        str | None,
        typer.Argument(
            help='What to ask, for example "Is there a crack?"; left out, one question a line is read until the '
            "input ends or a line is quit or exit."
        ),
    ] = None,
    list_questions: Annotated[
        bool, typer.Option("--list-questions", help="List what the bundle's model was trained to answer.")
    ] = False,
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Ask about an image: one question, or a dialogue with a question on each line."""
    if list_questions:
        from ..bundles.bundle import open_bundle

        print("\n".join(known_questions(open_bundle(bundle).manifest)))
        return
    if image is None:
        raise ConfigError("agpt ask needs an image: agpt ask IMAGE, or agpt ask IMAGE QUESTION")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty: ask something")
    if question is None and sys.stdin is None:
        raise ConfigError("there is no input to read questions from: give the question after the image")
    from ..station.run import open_inspector
    from ..vision.images import read_image

    frame = read_image(image)
    with open_inspector(bundle, recipe, tuple(normal or ()), class_name, threads, engine) as inspector:
        dialogue = inspector.dialogue(frame)
        if dialogue.view:
            print(f"about {printable(dialogue.view)}, where the map is highest", file=sys.stderr)
        if question is not None:
            answer_lines(dialogue, [question])
            return
        if sys.stdin.isatty():
            listed = "\n".join(f"  {known}" for known in known_questions(inspector.bundle.manifest))
            print(f"The model was trained to answer questions like these; quit ends the dialogue.\n{listed}")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        answer_lines(dialogue, sys.stdin)


def known_questions(manifest: Manifest) -> list[str]:
    """One question of each kind that the model was trained on, as far as the bundle lists them."""
    return list(dict.fromkeys(map(printable, [manifest.prompt.question, *manifest.questions])))


def answer_lines(dialogue: Dialogue, lines: Iterable[str]) -> None:
    """Print the answer to each line until one is ``quit`` or ``exit``; empty lines are passed over. A question that
    does not fit or is not text is reported, and the dialogue goes on.

    Raises:
        ConfigError: the only question does not fit into the context.
    """
    talking = lines is sys.stdin
    at_terminal = talking and sys.stdin.isatty()
    num_dropped = 0
    _invite(at_terminal)
    for line in lines:
        question = line.strip()
        if talking and question.lower() in FAREWELLS:
            return
        if question:
            try:
                if not is_text(question):
                    raise ConfigError("the question is not UTF-8 text: set the terminal or the file to UTF-8")
                answer = dialogue.ask(question)
            except ConfigError as error:
                if not talking:
                    raise
                tell(str(error))
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

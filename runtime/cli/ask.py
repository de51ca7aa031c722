"""``agpt ask``: answers one question about an image, or one question per input line."""

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
    from ..inspection.conversation import Conversation

END_WORDS = ("quit", "exit")  # a line that ends a dialogue


def ask(
    image: Annotated[Path | None, typer.Argument(parser=path, help="The image.")] = None,
    question: Annotated[
        str | None,
        typer.Argument(
            help='The question, for example "Is there a crack?". Default: read questions from standard input, one '
            "per line, until the input ends or a line is quit or exit."
        ),
    ] = None,
    list_questions: Annotated[
        bool,
        typer.Option("--list-questions", help="List questions that the model was trained on, then exit."),
    ] = False,
    bundle: BundleOption = None,
    recipe: RecipeOption = None,
    normal: NormalOption = None,
    class_name: ClassOption = None,
    threads: ThreadsOption = None,
    engine: EngineOption = "auto",
) -> None:
    """Ask one question about an image, or hold a dialogue with one question per line."""
    if list_questions:
        from ..bundles.bundle import open_bundle

        print("\n".join(known_questions(open_bundle(bundle).manifest)))
        return
    if image is None:
        raise ConfigError("agpt ask needs an image: run agpt ask IMAGE, or agpt ask IMAGE QUESTION")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty: write a question, or leave it out for a dialogue")
    if question is None and sys.stdin is None:
        raise ConfigError(
            "standard input is closed, so no question can be read: give the question after the image"
        )
    from ..station.run import open_inspector
    from ..vision.images import read_image

    frame = read_image(image)
    with open_inspector(bundle, recipe, tuple(normal or ()), class_name, threads, engine) as inspector:
        dialogue = inspector.dialogue(frame)
        if dialogue.view:
            print(f"view {printable(dialogue.view)}, which has the highest anomaly score", file=sys.stderr)
        if question is not None:
            answer_lines(dialogue, [question])
            return
        if sys.stdin.isatty():
            listed = "\n".join(f"  {known}" for known in known_questions(inspector.bundle.manifest))
            print(f"The model was trained on questions like these. Type quit to end the dialogue.\n{listed}")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        answer_lines(dialogue, sys.stdin)


def known_questions(manifest: Manifest) -> list[str]:
    """The default question and the questions listed in the manifest (one of each trained kind), as printable text."""
    return list(dict.fromkeys(map(printable, [manifest.prompt.question, *manifest.questions])))


def answer_lines(dialogue: Conversation, lines: Iterable[str]) -> None:
    """Print the answer to each line. Empty lines are skipped.

    Standard input is read until a line is ``quit`` or ``exit``; a question that is not UTF-8 or does not fit into the
    context is reported there, and the dialogue continues.

    Raises:
        ConfigError: a question that does not come from standard input is not UTF-8, or does not fit.
    """
    from_stdin = lines is sys.stdin
    at_terminal = from_stdin and sys.stdin.isatty()
    num_dropped = 0
    _show_input_sign(at_terminal)
    for line in lines:
        question = line.strip()
        if from_stdin and question.lower() in END_WORDS:
            return
        if question:
            try:
                if not is_text(question):
                    raise ConfigError("the question is not UTF-8 text: set the terminal or the file to UTF-8")
                answer = dialogue.ask(question)
            except ConfigError as error:
                if not from_stdin:
                    raise
                tell(str(error))
            else:
                print(printable(answer.text), flush=True)
                if answer.source == "inspection" and answer.model_text not in ("", answer.text):
                    print(f"(the inspection's answer; the model said: {printable(answer.model_text)})", flush=True)
                if answer.num_turns_dropped > num_dropped:
                    num_dropped = answer.num_turns_dropped
                    print(
                        f"(the context is full: the first {num_dropped} questions were dropped)", flush=True
                    )
        _show_input_sign(at_terminal)
    if at_terminal:
        print()


def _show_input_sign(at_terminal: bool) -> None:
    if at_terminal:
        print("> ", end="", flush=True)

"""``agpt ask``: questions line by line, answers line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..common.errors import ConfigError
from ..common.printable import printable
from ..language.dialogue import Dialogue


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

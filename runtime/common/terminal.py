"""Sentences for the user, on standard error."""

from __future__ import annotations

import sys

from .printable import printable


def tell(sentence: str) -> None:
    """Print one line after ``agpt:``."""
    print(f"agpt: {printable(sentence)}", file=sys.stderr, flush=True)

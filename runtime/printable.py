"""Text from outside (file names, a model's answer) made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line without control characters: they could move the cursor or recolour the operator's screen."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split())
    )

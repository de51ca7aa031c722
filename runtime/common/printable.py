"""Text from outside (file names, a model's answers), made safe to store and to print."""

from __future__ import annotations


def readable(text: str) -> str:
    """Convert to valid Unicode. Python represents the bytes of a file name that are not UTF-8 as lone surrogates, which
    JSON cannot encode and native code crashes on. Each becomes an escape, ``\\udce4``, so that names stay distinct."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_text(text: str) -> bool:
    """Whether a text is valid Unicode, without lone surrogates; see ``readable``."""
    return readable(text) == text


def printable(text: str) -> str:
    """One line without control characters: they could move the cursor or recolour the operator's screen."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split())
    )

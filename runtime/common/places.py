"""The nine places of an image, named as in the model's training answers (AnomalyGPT, Gu et al., AAAI 2024)."""

from __future__ import annotations

import re

# Row by row; the boundaries 1/3 and 2/3 belong to the upper and left cell.
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
_PLACE_WORDS = re.compile(r"\b(?:" + "|".join(sorted(PLACES, key=len, reverse=True)) + r")\b")


def place_name(row: float, column: float) -> str:
    """The place of a point of the image, both coordinates in 0..1 from the top left."""
    return PLACES[3 * _third(row) + _third(column)]


def named_places(sentence: str) -> list[str]:
    """Places that an answer names, in order ("… at the top left and bottom of the image.")."""
    return list(dict.fromkeys(_PLACE_WORDS.findall(sentence)))


def _third(x: float) -> int:
    return 0 if x <= 1 / 3 else 1 if x <= 2 / 3 else 2

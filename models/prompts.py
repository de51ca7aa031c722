"""AnomalyGPT's texts: class names, the pieces of the prompt, the answers that it was trained to give.

Source: the original code (CASIA-IVA-Lab/AnomalyGPT); see Gu et al., AAAI 2024.
"""

from __future__ import annotations

CLASS_NAMES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper", "object", "candle", "cashew", "chewinggum", "fryum", "macaroni",
    "pcb", "pipe fryum",
)  # fmt: skip

# The original's 30 objects: MVTec-AD's, 'object' for anything else, VisA's. The last seven are VisA's category names,
# which the original's prompts do not use.
ENSEMBLE_CLASSES = (*CLASS_NAMES, "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4", "capsules")

# The sentences whose text features stand for "normal" and "abnormal" in the zero-shot map.
NORMAL_STATES = (
    "{}", "flawless {}", "perfect {}", "unblemished {}",
    "{} without flaw", "{} without defect", "{} without damage",
)  # fmt: skip
ABNORMAL_STATES = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")

# <bos> PIECE_BEFORE_IMAGE [image embedding] PIECE_AFTER_IMAGE [18 prompt embeddings] question PIECE_ASSISTANT
PIECE_BEFORE_IMAGE = "### Human: <Img>"
PIECE_AFTER_IMAGE = "</Img> "
PIECE_ASSISTANT = "\n### Assistant:"
STOP_STRING = "\n###"
STOP_PIECE = "##"  # the piece whose appearance ends an answer
DEFAULT_QUESTION = "Is there any anomaly in the image?"

AFFIRMATIVE = "Yes"
NEGATIVE = "No"

ANSWER_NONE = "No, there is no anomaly in the image."
ANSWER_ONE = "Yes, there is an anomaly in the image, at the {place} of the image."
ANSWER_SEVERAL = "Yes, there are {count} anomalies in the image, they are at the {places} of the image."

PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip


def ensemble(class_name: str) -> tuple[list[str], list[str]]:
    """The 14 normal and 10 abnormal sentences of a class, in the original's order (states outside)."""
    normal, abnormal = (
        [template.format(state.format(class_name)) for state in states for template in TEMPLATES]
        for states in (NORMAL_STATES, ABNORMAL_STATES)
    )
    return normal, abnormal


def place_number(row: float, column: float) -> int:
    """Index of the 3×3 cell of a point in 0..1, in reading order; 1/3 and 2/3 belong to the cell before."""

    def third(x: float) -> int:
        return 0 if x <= 1 / 3 else 1 if x <= 2 / 3 else 2

    return 3 * third(row) + third(column)


def place_name(row: float, column: float) -> str:
    """Name of the 3×3 cell of a point in 0..1."""
    return PLACES[place_number(row, column)]


def answer(places: list[str]) -> str:
    """The original's training answer for defects centred in these places, in order; each place is named once."""
    if not places:
        return ANSWER_NONE
    if len(places) == 1:
        return ANSWER_ONE.format(place=places[0])
    named = list(dict.fromkeys(places))
    where = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return ANSWER_SEVERAL.format(count=len(places), places=where)

"""What nano can be asked and what it answers: the original's sentences, grounded in where the defects are."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator, default_rng

from ..prompts import DEFAULT_QUESTION, answer, place_name, place_number
from .defects import Defect
from .products import KINDS

ANOMALY_QUESTIONS = (
    DEFAULT_QUESTION,
    "Are there any anomalies in the image?",
    "Is there any defect in the image?",
    "Are there any defects or anomalies in the image?",
    "Is there anything wrong with this part?",
    "Is this part defective?",
)
PLACE_QUESTIONS = (
    "Where is the anomaly?",
    "Where is it?",
    "Where is the defect?",
    "Where are the anomalies in the image?",
)
COUNT_QUESTIONS = (
    "How many anomalies are there?",
    "How many defects are there in the image?",
    "How many are there?",
)
KIND_QUESTIONS = (
    "What is in the image?",
    "What is this?",
    "What product is this?",
    "Describe the image.",
)

NOUNS = {
    "weave": "woven fabric", "knit": "knitted fabric", "leather": "leather", "wood": "wood", "metal": "metal surface",
    "tile": "tiled surface", "speckle": "speckled stone", "carpet": "carpet", "cast": "cast surface",
    "printed": "printed pattern", "mesh": "wire mesh", "disc": "disc", "ring": "ring", "gear": "gear", "nut": "nut",
    "capsule": "capsule", "bottle": "bottle", "biscuit": "biscuit", "board": "circuit board",
    "connector": "connector", "blister": "tablet tray", "bracket": "bracket", "fabric": "fine fabric",
    "ground": "ground surface", "corrugated": "ribbed surface", "foam": "foam", "glazed": "glazed surface",
    "screw": "screw", "cable": "cable section", "shell": "nut shell", "pill": "tablet", "label": "label",
    "goblet": "glass bottom", "pins": "component with legs", "zipper": "zipper",
}  # fmt: skip
MATERIALS = ("leather", "wood", "weave", "knit", "speckle", "fabric", "foam")  # no article
assert set(NOUNS) == set(KINDS)

ADJECTIVES = (
    "without any damage, flaw, defect, scratch, hole or broken part",
    "round", "flat", "smooth", "clean", "regular", "of one color", "with a clear outline",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five")


def places(defects: list[Defect]) -> list[str]:
    """The 3×3 place of every defect, in reading order."""
    centers = sorted((d.center for d in defects), key=lambda center: (place_number(*center), center))
    return [place_name(*center) for center in centers]


def noun_phrase(kind: str) -> str:
    noun = NOUNS[kind]
    return noun if kind in MATERIALS else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe_product(rng: Generator, kind: str) -> str:
    """A description as the original's test scripts prepend it to the question."""
    wanted = [
        ADJECTIVES[i] for i in sorted(rng.choice(len(ADJECTIVES), int(rng.integers(1, 3)), replace=False))
    ]
    noun = noun_phrase(kind) if rng.random() < 0.7 else "an object"
    return f"This is a photo of {noun} for anomaly detection, which should be {', '.join(wanted[::-1])}. "


def place_answer(named: list[str]) -> str:
    if not named:
        return "There is no anomaly in the image."
    unique = list(dict.fromkeys(named))
    where = unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + " and " + unique[-1]
    return f"At the {where} of the image."


def count_answer(named: list[str]) -> str:
    if len(named) == 1:
        return "There is one anomaly in the image."
    return f"There {'are' if named else 'is'} {NUMBERS[len(named)]} {'anomalies' if named else 'anomaly'} in the image."


def dialogue(rng: Generator, defects: list[Defect], kind: str) -> list[tuple[str, str]]:
    """One to three turns about a part; the first usually asks whether there is an anomaly."""
    named = places(defects)
    ask_verdict = (str(rng.choice(ANOMALY_QUESTIONS)), answer(named))
    if rng.random() < 0.5:
        ask_verdict = (DEFAULT_QUESTION, ask_verdict[1])
    others = [
        (str(rng.choice(PLACE_QUESTIONS)), place_answer(named)),
        (str(rng.choice(COUNT_QUESTIONS)), count_answer(named)),
        (str(rng.choice(KIND_QUESTIONS)), f"This is a photo of {noun_phrase(kind)}."),
    ]
    rng.shuffle(others)
    turns = [ask_verdict, *others] if rng.random() < 0.8 else [*others[:1], ask_verdict, *others[1:]]
    if rng.random() < 0.4:
        turns[0] = (describe_product(rng, kind) + turns[0][0], turns[0][1])
    return turns[: int(rng.integers(1, 4))]


def corpus(seed: int = 0, size: int = 6000) -> Iterator[str]:
    """Sentences to learn the vocabulary from."""
    rng = default_rng(seed)
    for _ in range(size):
        count = int(rng.integers(0, 4))
        defects = [Defect("", (float(rng.random()), float(rng.random())), 0.01) for _ in range(count)]
        for question, reply in dialogue(rng, defects, str(rng.choice(KINDS))):
            yield question
            yield reply
        # with two signs instead of three the stop piece becomes a token and "###" does not, as in LLaMA's vocabulary
        yield "## Human: <Img>"
        yield "</Img> "
        yield ".## Assistant:"

"""Nano's training dialogues: questions, and answers that follow from the defects; verdicts are the original's
sentences."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator, default_rng
from torch import Tensor

from ...runtime.synthetic.defects import Defect
from ...runtime.synthetic.products import KINDS
from ..look import LOOKS, probabilities
from ..prompts import DEFAULT_QUESTION, answer, place_name, place_number

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
SIZE_QUESTIONS = (
    "How large is it?",
    "How large is the defect?",
    "How big is the anomaly?",
    "How much of the image is defective?",
)
LOOK_QUESTIONS = (
    "What does it look like?",
    "What does the defect look like?",
    "What kind of anomaly is it?",
    "Describe the defect.",
)
SHADE_QUESTIONS = (
    "Is it dark or bright?",
    "Is the defect darker or brighter?",
    "Is it darker than the rest?",
    "Is the anomaly bright or dark?",
)
SURE_QUESTIONS = (
    "How sure are you?",
    "Are you sure?",
    "How certain is that?",
)
KIND_QUESTIONS = (
    "What is in the image?",
    "What is this?",
    "What product is this?",
    "Describe the image.",
)
KNOWN_QUESTIONS = (  # one of each kind, to show to who asks
    DEFAULT_QUESTION,
    PLACE_QUESTIONS[0],
    COUNT_QUESTIONS[0],
    SIZE_QUESTIONS[0],
    LOOK_QUESTIONS[0],
    SHADE_QUESTIONS[0],
    SURE_QUESTIONS[0],
    KIND_QUESTIONS[0],
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
# questions that a picture of a part cannot answer; ``UNKNOWABLE_UNSEEN`` is for tests and not trained on
UNKNOWABLE = (
    "Why is it defective?", "What caused the defect?", "What is the cause?", "Why did this happen?",
    "How can it be repaired?", "How do I fix it?", "Can it be repaired?", "What should I do now?",
    "When was it made?", "How old is this part?", "Who made it?", "Where was it made?", "Which machine made it?",
    "What is the serial number?", "What does it cost?", "How much does it weigh?", "What is it made of?",
    "Will it break?", "How long will it last?", "Can I sell it?", "Is it safe to use?", "Is the customer happy?",
    "What time is it?", "What is the weather like?", "Who are you?", "What is your name?", "Tell me a joke.",
    "Write a poem.", "What is two plus two?", "Which batch is it from?", "How many parts were made today?",
    "What will the next part be?", "What temperature was it?", "Is the camera dirty?", "Is the machine broken?",
    "Which tool is worn?", "Hello.", "Thank you.", "Do you like it?", "What do you think about it?",
    "Is something missing?", "Is a part missing?",
    "How deep is it?", "What color is it?", "Is it only dirt?",
)  # fmt: skip
UNKNOWABLE_UNSEEN = (
    "What is the reason for it?", "How did the damage happen?", "Who is the supplier?", "How heavy is this part?",
    "What is the order number?", "Should I stop the machine?", "Is it expensive?", "What day is it?",
    "How can I avoid it?", "How fast is the line?", "Is anything missing?", "How deep is the defect?",
)  # fmt: skip
NOTHING = "There is no anomaly in the image."
CANNOT_KNOW = "I cannot know that from the image."

SIZES = (  # (largest share of the image, text); a patch is 0.4 percent, so finer classes cannot be distinguished
    (0.01, "small: less than 1 percent"),
    (0.04, "medium: 1 to 4 percent"),
    (1.0, "large: more than 4 percent"),
)
LINES = ("scratch", "crack", "fibre", "streak")
SHORTEST_LINE = 0.003  # share of the image; smaller lines look like spots in a map of 16 × 16 patches
ONE_SIDED = 0.6  # smallest |signed change| / |change| of a defect with a shade
SURE_SHADE = 0.6  # smallest probability of a shade that is named
SURE_LINE = 0.5  # and of a line
CONFIDENCE_ANSWERS = ("I am sure.", "I am fairly sure.", "I am not sure.")
NUMBERS = ("no", "one", "two", "three", "four", "five")


def places(defects: list[Defect]) -> list[str]:
    """The 3×3 place of every defect, in reading order."""
    centers = sorted((d.center for d in defects), key=lambda center: (place_number(*center), center))
    return [place_name(*center) for center in centers]


def size_answer(defects: list[Defect]) -> str:
    """The share of the image that the defects cover, in classes."""
    if not defects:
        return NOTHING
    area = sum(d.area for d in defects)
    size = next(text for limit, text in SIZES if area <= limit)
    return f"{'It is' if len(defects) == 1 else 'Together they are'} {size} of the image."


def look_answer(defects: list[Defect], shade: str, line: bool | None = None) -> str:
    """Form of the most visible defect, and its shade if it is known (``shade``: "darker", "brighter" or "neither").

    ``line`` is whether the picture network recognises a line; everything else is then "a mark". None: the form is
    the defect's true one.

    Missing parts are not named: the inputs do not show reliably enough that something is missing
    (``training/ablation.md``).
    """
    if not defects:
        return NOTHING
    worst = max(defects, key=lambda d: d.contrast * d.area**0.5)
    if line is not None:
        form = "line" if line else "mark"
    else:
        form = "line" if is_line(worst) else "spot" if worst.area < SIZES[0][0] else "area"
    shaded = {"darker": "a dark ", "brighter": "a bright ", "neither": "an " if form == "area" else "a "}[
        shade
    ]
    return f"It looks like {shaded}{form}."


def shade_answer(defects: list[Defect], shade: str) -> str:
    """Whether the part is darker or brighter at the defect."""
    if not defects:
        return NOTHING
    return CANNOT_KNOW if shade == "neither" else f"It is {shade} than what is around it."


def shade_of(defect: Defect) -> str:
    """The true shade: "darker" or "brighter" if most of the defect's change is in one direction, else "neither"."""
    one_sided = abs(defect.shade) >= ONE_SIDED * defect.contrast
    return "neither" if not one_sided else "darker" if defect.shade < 0 else "brighter"


def shade_seen(looks: Tensor) -> str:
    """The shade to name for ``LookNet``'s logits [len(LOOKS)]: one with at least ``SURE_SHADE``, else "neither"."""
    shade = probabilities(looks[None])[0, :2]
    return LOOKS[int(shade.argmax())] if float(shade.max()) >= SURE_SHADE else "neither"


def line_seen(looks: Tensor) -> bool:
    """Whether to name a line for ``LookNet``'s logits [len(LOOKS)]: if its probability is at least ``SURE_LINE``."""
    return float(probabilities(looks[None])[0, 3]) >= SURE_LINE


def is_line(defect: Defect) -> bool:
    """Whether a defect is a line of at least ``SHORTEST_LINE``."""
    return defect.name in LINES and defect.area >= SHORTEST_LINE


def noun_phrase(kind: str) -> str:
    noun = NOUNS[kind]
    return noun if kind in MATERIALS else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe_product(rng: Generator, kind: str) -> str:
    """A description of the product, in the form that the original's test scripts put before the question."""
    wanted = [
        ADJECTIVES[i] for i in sorted(rng.choice(len(ADJECTIVES), int(rng.integers(1, 3)), replace=False))
    ]
    noun = noun_phrase(kind) if rng.random() < 0.7 else "an object"
    return f"This is a photo of {noun} for anomaly detection, which should be {', '.join(wanted[::-1])}. "


def place_answer(named: list[str]) -> str:
    if not named:
        return NOTHING
    unique = list(dict.fromkeys(named))
    where = unique[0] if len(unique) == 1 else ", ".join(unique[:-1]) + " and " + unique[-1]
    return f"At the {where} of the image."


def count_answer(named: list[str]) -> str:
    if len(named) == 1:
        return "There is one anomaly in the image."
    return f"There {'are' if named else 'is'} {NUMBERS[len(named)]} {'anomalies' if named else 'anomaly'} in the image."


def follow_ups(
    rng: Generator,
    defects: list[Defect],
    kind: str,
    confidence: str,
    shade: str,
    line: bool | None = None,
) -> dict[str, tuple[str, str]]:
    """A question of each kind with its right answer.

    Args:
        rng: chooses the wording of the questions.
        defects: of the part.
        kind: of the product.
        confidence: one of ``CONFIDENCE_ANSWERS``.
        shade: that the picture network recognises, "darker", "brighter" or "neither".
        line: see ``look_answer``.
    """
    named = places(defects)
    return {
        "place": (str(rng.choice(PLACE_QUESTIONS)), place_answer(named)),
        "count": (str(rng.choice(COUNT_QUESTIONS)), count_answer(named)),
        "size": (str(rng.choice(SIZE_QUESTIONS)), size_answer(defects)),
        "look": (str(rng.choice(LOOK_QUESTIONS)), look_answer(defects, shade, line)),
        "shade": (str(rng.choice(SHADE_QUESTIONS)), shade_answer(defects, shade)),
        "sure": (str(rng.choice(SURE_QUESTIONS)), confidence),
        "kind": (str(rng.choice(KIND_QUESTIONS)), f"This is a photo of {noun_phrase(kind)}."),
        "unknowable": (str(rng.choice(UNKNOWABLE)), CANNOT_KNOW),
    }


def dialogue(
    rng: Generator,
    defects: list[Defect],
    kind: str,
    confidence: str,
    shade: str,
    line: bool | None = None,
) -> list[tuple[str, str]]:
    """One to three turns about a part, arguments as of ``follow_ups``; in half of the dialogues the first question
    asks for an anomaly, in the others for something else."""
    ask_verdict = (str(rng.choice(ANOMALY_QUESTIONS)), answer(places(defects)))
    if rng.random() < 0.5:
        ask_verdict = (DEFAULT_QUESTION, ask_verdict[1])
    kinds = follow_ups(rng, defects, kind, confidence, shade, line)
    names = list(kinds)
    rng.shuffle(names)
    # parts with a known shade are rare, so their dialogues ask for it more often
    if shade != "neither" and rng.random() < 0.5:
        names = ["shade", *(name for name in names if name != "shade")]
    others = [kinds[name] for name in names]
    turns = [ask_verdict, *others] if rng.random() < 0.5 else [*others[:1], ask_verdict, *others[1:]]
    if rng.random() < 0.4:
        turns[0] = (describe_product(rng, kind) + turns[0][0], turns[0][1])
    return turns[: int(rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25]))]


def corpus(seed: int = 0, size: int = 6000) -> Iterator[str]:
    """Sentences to train the tokenizer on."""
    rng = default_rng(seed)
    for _ in range(size):
        count = int(rng.integers(0, 4))
        names = rng.choice(["scratch", "missing", "stain"], count)
        defects = [
            Defect(
                str(n),
                (float(rng.random()), float(rng.random())),
                float(rng.uniform(0, 0.05)),
                1,
                float(rng.uniform(-1, 1)),
            )
            for n in names
        ]
        confidence = str(rng.choice(CONFIDENCE_ANSWERS))
        shade = str(rng.choice(LOOKS[:3]))
        for question, reply in dialogue(rng, defects, str(rng.choice(KINDS)), confidence, shade):
            yield question
            yield reply
        # with "##" instead of "###", the stop piece becomes a token and "###" does not, as in LLaMA's vocabulary
        yield "## Human: <Img>"
        yield "</Img> "
        yield ".## Assistant:"

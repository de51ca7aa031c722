"""A conversation about one inspected frame.

Questions about what the inspection decides and measures (good or not, how many, where, how large, how serious) are
answered from the verdict, so that they cannot contradict it, whether they are asked first or later. All other questions
are answered by the language model. A reply contains who answered, and what the model said where both did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..language.answer import Answer
from ..language.dialogue import Dialogue
from .product import Product
from .verdict import Status, Verdict

Source = Literal["inspection", "model"]
Topic = Literal["good", "defective", "count", "place", "size", "severity", "logic"]

SUBJECT = r"\b(is|are|was|does|did|has) (the|this|that|these|it|they)\b.*"
# In this order; the first pattern that is found decides.
TOPICS: tuple[tuple[Topic, str], ...] = (
    ("severity", r"\b(danger\w*|serious\w*|severe\w*|severity|critical\w*|harmful|acceptable)\b"),
    ("logic", r"\b(missing|complete|incomplete)\b|\b(wrong|right) (number|count|part|place|order)\b"),
    ("count", r"\bhow many\b|\bnumber of (anomal|defect|flaw|fault)"),
    ("size", r"\bhow (large|big|small|long|wide)\b|\bhow much of\b|\bwhat size\b"),
    ("place", r"\bwhere\b|\b(at|in) which (place|part|area)\b"),
    ("good", SUBJECT + r"\b(good|ok|okay|fine|intact|faultless|flawless|normal|pass|passed)\b"),
    ("defective", r"\b(is|are) there\b.*\b(anomal\w*|defect\w*|flaw\w*|fault\w*|damage\w*|wrong)\b"),
    ("defective", SUBJECT + r"\b(defective|bad|faulty|damaged|broken|anomalous|rejected|reject)\b"),
)
# Words that ask for a cause, a time or an origin: no topic of the inspection, whatever else the question contains.
OTHER_QUESTIONS = re.compile(
    r"\b(why|when|who|cause\w*|made|machine|camera|customer|repair\w*|fix|buy|sell|cost\w*|sure|certain)\b"
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NOTHING = "There is no anomaly in the image."
CANNOT_KNOW_SEVERITY = (
    "I cannot know that: the recipe has no severity rule. Add [[severity]] to it to have defects graded."
)
CANNOT_KNOW_LOGIC = (
    "I cannot know that: the inspection compares patches with those of good samples. It does not ask whether what good "
    "samples show is there, and it counts nothing."
)


@dataclass(frozen=True)
class Reply:
    """The answer to a question.

    Attributes:
        text: the answer.
        source: "inspection" if it follows from the verdict, "model" if the language model said it.
        model_text: what the language model said; "" if it was not asked.
        num_turns_dropped: number of the oldest turns that no longer fit into the language model's context.
    """

    text: str
    source: Source
    model_text: str = ""
    num_turns_dropped: int = 0


class Conversation:
    """Questions about one frame.

    Attributes:
        verdict: the result of the frame's inspection.
        dialogue: the language model's dialogue about the view with the highest map score; None if the frame has no
            map.
    """

    def __init__(self, verdict: Verdict, dialogue: Dialogue | None, product: Product, question: str) -> None:
        """
        Args:
            verdict: the result of the frame's inspection.
            dialogue: the language model's dialogue; None if the frame has no map.
            product: the product that the frame was inspected as.
            question: the bundle's question, asked when a question is empty.
        """
        self.verdict = verdict
        self.dialogue = dialogue
        self._product = product
        self._question = question

    @property
    def view(self) -> str:
        """Name of the region or tile that the language model sees; "" for the whole frame."""
        return "" if self.dialogue is None else self.dialogue.view

    def ask(self, question: str = "") -> Reply:
        """Answer a question; "" is the bundle's question.

        Raises:
            ConfigError: the question does not fit into the language model's context.
            ClosedError: the inspector was closed.
        """
        topic = topic_of(question) if question else "defective"
        question = question or self._question
        if self.dialogue is None or (topic and self.verdict.status is Status.NO_RESULT):
            return Reply(f"There is no result for this frame: {self.verdict.reason}", "inspection")
        answer = self.dialogue.ask(question)
        if topic is None:
            return Reply(answer.text, "model", answer.text, answer.num_turns_dropped)
        if topic == "defective" and not self._contradicts(answer):
            return Reply(answer.text, "model", answer.text, answer.num_turns_dropped)
        text = answer_from(self.verdict, topic, self._product)
        if topic in ("defective", "good") and self.verdict.contradiction:
            text += f" ({self.verdict.reason})"
        return Reply(text, "inspection", answer.text, answer.num_turns_dropped)

    def _contradicts(self, answer: Answer) -> bool:
        """Whether an answer to "is there an anomaly" is not the verdict's, or names other places."""
        if answer.affirmative is not (self.verdict.status is Status.FAIL):
            return True
        return answer.text != self.verdict.sentence and self.verdict.status is Status.FAIL


def topic_of(question: str) -> Topic | None:
    """The topic of a question that the inspection answers; None for a question to the language model.

    A description before the question does not count.
    """
    text = re.split(r"[.!]\s+", question.strip().lower())[-1]
    if OTHER_QUESTIONS.search(text):
        return None
    return next((topic for topic, pattern in TOPICS if re.search(pattern, text)), None)


def answer_from(verdict: Verdict, topic: Topic, product: Product) -> str:
    """The answer to a question of this topic, from a verdict of PASS or FAIL."""
    fails = verdict.status is Status.FAIL
    if topic == "good":
        return f"No, the part is rejected: {places_text(verdict)}." if fails else "Yes, the part passes."
    if topic == "defective":
        return f"Yes, there is an anomaly, {places_text(verdict)}." if fails else f"No. {NOTHING}"
    if topic == "severity":
        return severity_text(verdict, product)
    if topic == "logic":
        return CANNOT_KNOW_LOGIC
    if not fails:
        return NOTHING
    if topic == "count":
        count = len(verdict.regions)
        number = NUMBERS[count] if count < len(NUMBERS) else str(count)
        return f"There {'is' if count == 1 else 'are'} {number} anomal{'y' if count == 1 else 'ies'} in the image."
    if topic == "place":
        text = places_text(verdict)
        return f"{text[0].upper()}{text[1:]}."
    return size_text(verdict, product)


def places_text(verdict: Verdict) -> str:
    """ "at the top left and bottom of the image", from the regions."""
    return f"at the {listed(list(dict.fromkeys(region.place for region in verdict.regions)))} of the image"


def size_text(verdict: Verdict, product: Product) -> str:
    """The area of all regions and the size of the largest one; in millimetres if the recipe has a scale."""
    frame = verdict.frame
    if frame is None:
        return "The size of the frame is not known."
    area = sum(region.area_px for region in verdict.regions)
    largest = max(verdict.regions, key=lambda region: region.area_px)
    width, height = largest.box[2:]
    share = 100 * area / (frame.width * frame.height)
    subject = "It covers" if len(verdict.regions) == 1 else "Together they cover"
    text = f"{subject} {share:.2g} percent of the image"
    if (scale := product.mm_per_pixel) is None:
        return f"{text}; the {'box' if len(verdict.regions) == 1 else 'largest box'} is {width} x {height} pixels."
    return (
        f"{text}, {area * scale**2:.3g} square millimetres; the "
        f"{'box' if len(verdict.regions) == 1 else 'largest box'} is {width * scale:.3g} x {height * scale:.3g} mm."
    )


def severity_text(verdict: Verdict, product: Product) -> str:
    """The grade of the part by the recipe's severity rules."""
    if not product.severity:
        return CANNOT_KNOW_SEVERITY
    if verdict.status is not Status.FAIL:
        return NOTHING
    grade = product.severity_of(verdict.regions)
    return (
        f"By the recipe's severity rule it is {grade}."
        if grade
        else "It is below the recipe's severity rules."
    )


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]

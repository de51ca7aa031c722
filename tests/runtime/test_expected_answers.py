"""Expected answers: from the bundle's answer forms, the map, and recent answers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.models import prompts
from anomalygpt_edge.runtime.bundles.bundle import AnswerForms
from anomalygpt_edge.runtime.language.answer import MapReading
from anomalygpt_edge.runtime.language.expected_answers import MAX_ANSWERS, AnswerGrammar, Drafter

FORMS = AnswerForms(
    none=[prompts.ANSWER_NONE], one=[prompts.ANSWER_ONE], several=[prompts.ANSWER_SEVERAL],
    places=list(prompts.PLACES),
)  # fmt: skip
ASKED = prompts.DEFAULT_QUESTION
CALM = MapReading(0.01, prompts.PLACES, ())
LEFT = MapReading(0.6, ("left", *(place for place in prompts.PLACES if place != "left")), ("left",))


def letters(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def drafter() -> Drafter:
    return Drafter(AnswerGrammar(FORMS), ASKED, letters)


def probability_of(drafts: Drafter, text: str, reading: MapReading | None, question: str = ASKED) -> float:
    """Probability of an answer: that of its last letter's node."""
    expected = drafts.expect(question, reading)
    assert expected is not None
    assert expected.root == -1
    node = expected.tree.find(letters(text))
    return 0.0 if node is None else float(expected.probabilities[node])


def test_the_forms_are_the_originals_training_answers() -> None:
    grammar = AnswerGrammar(FORMS)
    assert grammar.negative == (prompts.answer([]),)
    assert [text for _, text in grammar.single] == [prompts.answer([place]) for place in prompts.PLACES]
    reading = MapReading(0.5, prompts.PLACES, ("right", "left", "center", "top"))
    assert grammar.several(reading) == [
        prompts.answer(["left", "right"]),
        prompts.answer(["left", "center", "right"]),
    ]


def test_the_place_of_the_maps_peak_is_the_most_likely() -> None:
    drafts = drafter()
    left, top = (prompts.answer([place]) for place in ("left", "top"))
    assert probability_of(drafts, left, LEFT) > 5 * probability_of(drafts, top, LEFT) > 0
    assert probability_of(drafts, prompts.answer([]), CALM) > 0.2


def test_recent_answers_are_expected() -> None:
    drafts = drafter()
    for _ in range(30):
        drafts.learn(ASKED, CALM, letters(prompts.answer([])))
        drafts.learn(ASKED, LEFT, letters(prompts.answer(["left"])))
    assert probability_of(drafts, prompts.answer([]), CALM) > 0.85
    assert probability_of(drafts, prompts.answer(["left"]), LEFT) > 0.75
    for _ in range(60):
        drafts.learn(ASKED, LEFT, letters("Yes, it is scratched."))
    assert probability_of(drafts, "Yes, it is scratched.", LEFT) > 0.5


def test_for_another_question_only_recent_answers_are_expected() -> None:
    drafts = drafter()
    assert drafts.expect("Where is it?", LEFT) is None
    drafts.learn("Where is it?", LEFT, letters("At the left."))
    assert probability_of(drafts, "At the left.", LEFT, "Where is it?") > 0.3
    assert probability_of(drafts, prompts.answer([]), CALM, f"A photo of a nut. {ASKED}") > 0.2, (
        "a description precedes the question"
    )


def test_an_unknown_answer_is_continued_like_a_similar_one() -> None:
    drafts = drafter()
    drafts.expect(ASKED, LEFT)
    expected = drafts.expect(
        ASKED, LEFT, letters("Yes, there are 9 anomalies in the image, they are at the left")
    )
    assert expected is None or expected.tree.find(letters(" of the image.")) is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1)), min_size=1, max_size=300))
def test_memory_is_bounded_and_probabilities_are_valid(answers: list[tuple[int, float]]) -> None:
    drafts = drafter()
    for number, score in answers:
        reading = MapReading(score, prompts.PLACES, ("top", "left"))
        drafts.expect(ASKED, reading)
        drafts.learn(ASKED, reading, (number % 7, number, 1))
    expected = drafts.expect(ASKED, LEFT)
    assert expected is not None
    tree, probabilities = expected.tree, expected.probabilities
    assert np.isfinite(probabilities).all()
    assert (probabilities >= 0).all()
    assert probabilities[tree.parents[expected.nodes] == -1].sum() <= 1 + 1e-9
    assert len(drafts._of(ASKED).answers) <= MAX_ANSWERS
    assert tree.find(letters(prompts.answer([]))) is not None, "the forms stay"

"""Dialogues: AnomalyGPT's history format, reuse of the cache, and dropping of the oldest turns in a full context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.common.errors import ConfigError
from anomalygpt_edge.runtime.language.dialogue import Dialogue
from anomalygpt_edge.runtime.language.model import LanguageModel

QUESTIONS = ("", "Where is the anomaly?", "How many anomalies are there?", "What is in the image?")


@pytest.fixture(scope="module")
def injected() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=128).astype(np.float32), rng.normal(size=(18, 128)).astype(np.float32)


def open_nano(max_context: int = 1024) -> LanguageModel:
    bundle = open_bundle()
    manifest = bundle.manifest
    path: Path = bundle.component_file("language_model")
    return LanguageModel.open(path, manifest.prompt, manifest.language, 1, max_context)


@pytest.fixture(scope="module")
def nano() -> Iterator[LanguageModel]:
    model = open_nano()
    yield model
    model.close()


def history(turns: list[tuple[str, str]], question: str) -> str:
    """The history as AnomalyGPT's web demo writes it."""
    text = ""
    for index, (asked, answer) in enumerate(turns):
        text += f"{' Human: ' if index else ''}{asked}\n### Assistant: {answer}\n###"
    return text + (" Human: " if turns else "") + question


@pytest.mark.parametrize("drafting", [False, True])
def test_each_turn_is_the_answer_to_the_whole_history(nano, injected, drafting) -> None:
    nano.decoder.drafting = drafting
    dialogue = Dialogue(nano, *injected)
    answers = [dialogue.ask(question) for question in QUESTIONS]
    turns: list[tuple[str, str]] = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        asked = question or nano.layout.question
        nano.decoder.drafting = False
        whole = nano.answer(*injected, history(turns, asked))
        assert answer.token_ids == whole.token_ids
        assert answer.text == whole.text
        turns.append((asked, answer.text))
    nano.decoder.drafting = True
    assert dialogue.turns == turns


def test_earlier_turns_are_not_computed_again(nano, injected) -> None:
    dialogue = Dialogue(nano, *injected)
    first = dialogue.ask()
    assert first.token_ids[-1] in nano.stops
    dialogue.ask("Where is it?")
    new = nano.session.tokenise("x\n### Human: Where is it?\n### Assistant:")
    assert dialogue.num_computed <= len(new)


def test_an_answer_about_another_image_does_not_change_the_dialogue(nano, injected) -> None:
    alone = Dialogue(nano, *injected)
    expected = [alone.ask(question).token_ids for question in QUESTIONS]
    dialogue = Dialogue(nano, *injected)
    found = []
    for question in QUESTIONS:
        found.append(dialogue.ask(question).token_ids)
        nano.answer(-injected[0], injected[1])
    assert found == expected


def test_the_oldest_turns_are_dropped_and_counted_in_the_answer(injected) -> None:
    model = open_nano(160)
    dialogue = Dialogue(model, *injected)
    dropped = []
    for index in range(12):
        answer = dialogue.ask(f"Is there anything wrong with this part, number {index}?", 20)
        dropped.append(answer.num_turns_dropped)
        kept = dialogue.turns[:-1] if answer.complete else dialogue.turns
        model.decoder.drafting = False
        whole = model.answer(
            *injected, history(kept, f"Is there anything wrong with this part, number {index}?"), 20
        )
        model.decoder.drafting = True
        assert answer.token_ids == whole.token_ids
    assert dropped[0] == 0
    assert dropped[-1] > 0
    assert dropped == sorted(dropped)
    with pytest.raises(ConfigError, match="positions"):
        dialogue.ask("too long " * 200)
    model.close()

"""Questions about a frame: what the inspection decides is answered from its verdict, in every order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from anomalygpt_edge.runtime.common.errors import RecipeError
from anomalygpt_edge.runtime.inspection.conversation import Conversation, answer_from, topic_of
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.product import Product
from anomalygpt_edge.runtime.inspection.verdict import Status, Verdict
from anomalygpt_edge.runtime.recipes.recipe import Recipe, SeverityRule, load_recipe, save_recipe
from anomalygpt_edge.runtime.vision.regions import Region
from anomalygpt_edge.runtime.vision.views import FrameSize

REGIONS = (
    Region(box=(10, 20, 30, 40), place="top left", area_px=1000.0, peak=5.0),
    Region(box=(60, 70, 8, 9), place="bottom", area_px=50.0, peak=3.0),
)
FAIL = Verdict(
    status=Status.FAIL,
    reason="answered Yes",
    sentence="Yes, there are 2 anomalies in the image, they are at the top left and bottom of the image.",
    regions=REGIONS,
    frame=FrameSize(width=100, height=100),
)
PASS = msgspec.structs.replace(
    FAIL, status=Status.PASS, sentence="No, there is no anomaly in the image.", regions=()
)
PRODUCT = Product(name="a", text_features=np.zeros((2, 1), np.float32), bank=None, question="", resize="crop")


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("Is the part good?", "good"),
        ("Is this part OK?", "good"),
        ("Did it pass?", "good"),
        ("Is there any anomaly in the image?", "defective"),
        ("This is a photo of a bottle, which should be without any damage. Is it broken?", "defective"),
        ("How many defects are there?", "count"),
        ("How large is the defect?", "size"),
        ("How much of the image is defective?", "size"),
        ("Where is it?", "place"),
        ("Is it dangerous?", "severity"),
        ("Is a component missing?", "logic"),
        ("Is the number of screws the right number?", "logic"),
        ("What does it look like?", None),
        ("Why is it broken?", None),
        ("Where was it made?", None),
        ("What is in the image?", None),
    ],
)
def test_topics(question: str, topic: str | None) -> None:
    assert topic_of(question) == topic


def test_answers_follow_from_the_verdict() -> None:
    said = {
        topic: answer_from(FAIL, topic, PRODUCT) for topic in ("good", "defective", "count", "place", "size")
    }
    assert said == {
        "good": "No, the part is rejected: at the top left and bottom of the image.",
        "defective": "Yes, there is an anomaly, at the top left and bottom of the image.",
        "count": "There are two anomalies in the image.",
        "place": "At the top left and bottom of the image.",
        "size": "Together they cover 10 percent of the image; the largest box is 30 x 40 pixels.",
    }
    assert answer_from(PASS, "good", PRODUCT) == "Yes, the part passes."
    assert {answer_from(PASS, topic, PRODUCT) for topic in ("count", "place", "size")} == {
        "There is no anomaly in the image."
    }


def test_sizes_in_millimetres_and_severity_come_from_the_recipe() -> None:
    assert "cannot know" in answer_from(FAIL, "severity", PRODUCT)
    assert "cannot know" in answer_from(FAIL, "logic", PRODUCT)
    rules = (
        SeverityRule(name="critical", min_area_mm2=300),
        SeverityRule(name="major", min_area_mm2=200),
        SeverityRule(name="minor", places=("bottom",)),
    )
    graded = replace(PRODUCT, mm_per_pixel=0.5, severity=rules)
    assert answer_from(FAIL, "size", graded).endswith(
        "262 square millimetres; the largest box is 15 x 20 mm."
    )
    assert answer_from(FAIL, "severity", graded) == "By the recipe's severity rule it is major."
    small = msgspec.structs.replace(FAIL, regions=REGIONS[1:])
    assert answer_from(small, "severity", graded) == "By the recipe's severity rule it is minor."


def test_severity_rules_are_checked(tmp_path: Path) -> None:
    recipe = Recipe(name="a", mm_per_pixel=0.1, severity=(SeverityRule(name="critical", min_area_mm2=4),))
    save_recipe(recipe, tmp_path / "a.toml")
    assert load_recipe(tmp_path / "a.toml") == recipe
    (tmp_path / "b.toml").write_text("name = 'b'\n[[severity]]\nname = 'x'\nmin_area_mm2 = 4")
    with pytest.raises(RecipeError, match="mm_per_pixel"):
        load_recipe(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_text("name = 'b'\n[[severity]]\nname = 'x'\nplaces = ['above']")
    with pytest.raises(RecipeError, match="'above' is not a place"):
        load_recipe(tmp_path / "c.toml")


class Parrot:
    """A dialogue that always says the same."""

    view = ""

    def __init__(self, text: str, affirmative: bool | None) -> None:
        self.text, self.affirmative, self.num_turns_dropped = text, affirmative, 0

    def ask(self, question: str) -> Parrot:
        return self


def test_an_overruled_answer_is_quoted_and_not_passed_off_as_the_models() -> None:
    reason = "rejected by the map at top left (score 3, limit 2); the model answered 'No'"
    overruled = msgspec.structs.replace(FAIL, reason=reason, contradiction=True, decided_by="map")
    conversation = Conversation(overruled, Parrot("No.", False), PRODUCT, "Is there any anomaly?")  # type: ignore[arg-type]
    for question in ("", "Is there any anomaly?", "Is the part good?"):
        reply = conversation.ask(question)
        assert (reply.source, reply.model_text) == ("inspection", "No.")
        assert reason in reply.text
    assert conversation.ask("What does it look like?").source == "model"


def test_a_conversation_about_a_frame_agrees_with_its_verdict(tiny_bundle: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        conversation = inspector.dialogue(frame)
        expected = inspector.inspect(frame)
        assert conversation.verdict.status is expected.status is Status.FAIL
        assert conversation.ask("How many defects are there?").text == answer_from(expected, "count", PRODUCT)
        assert conversation.ask("Is the part good?").text.startswith("No")
        assert conversation.ask("What is this?").source == "model"
        assert conversation.ask("Is the part good?").text.startswith("No")

"""The bundled models equal the export of their checkpoints, and lite's answers depend on its prompt embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from anomalygpt_edge.models.nano.dialogues import KNOWN_QUESTIONS
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.synthetic.data import draw, held_out_families

NUM_FAMILIES, NUM_EACH = 16, 3  # good and as many defective parts of each product
REPOSITORY = Path(__file__).parents[2]
SHIPPED_LIMIT_MB = 40
MODELS = ("lite", "nano")


@pytest.fixture(scope="module")
def judged() -> dict[str, np.ndarray]:
    """Truth, and the verdicts with each part's own and with other parts' prompt embeddings."""
    truth, images, prompts = [], [], []
    with Inspector.open() as inspector:
        for family in held_out_families(NUM_FAMILIES):
            rng = default_rng([family.seed, 5])
            inspector.use(inspector.make_bank([draw(family, rng, 0).pixels]))
            for count in [0] * NUM_EACH + [1] * NUM_EACH:
                part = inspector.part(draw(family, rng, count).pixels)
                truth.append(count > 0)
                images.append(part.image_embedding)
                prompts.append(part.prompt_embeddings)

        def said_yes(order: np.ndarray) -> np.ndarray:
            answers = [
                inspector.language.answer(images[i], prompts[j], max_tokens=1) for i, j in enumerate(order)
            ]
            return np.array([answer.affirmative for answer in answers])

        # every good part gets the prompts of a good or a defective part alike, and so does every defective one
        order = np.arange(len(truth)).reshape(NUM_FAMILIES, 2, NUM_EACH)
        crossed = order.copy()
        crossed[::2] = order[::2, ::-1]
        return {
            "truth": np.array(truth),
            "own": said_yes(order.ravel()),
            "shuffled": said_yes(crossed.ravel()),
        }


def test_verdicts_on_products_never_seen(judged: dict[str, np.ndarray]) -> None:
    """Of these parts lite judges about .8 rightly."""
    assert (judged["own"] == judged["truth"]).mean() >= 0.7


def test_verdicts_follow_the_prompt_embeddings(judged: dict[str, np.ndarray]) -> None:
    """With other parts' prompt embeddings, half of them of the other truth, the verdict is worth a coin."""
    assert 0.35 <= (judged["shuffled"] == judged["truth"]).mean() <= 0.65


def test_the_bundle_lists_one_question_of_each_kind() -> None:
    assert tuple(open_bundle().manifest.questions) == KNOWN_QUESTIONS


@pytest.mark.parametrize("model", MODELS)
def test_the_repository_carries_little(model: str) -> None:
    folders = [REPOSITORY / "models" / model / kind for kind in ("bundle", "checkpoint")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < SHIPPED_LIMIT_MB * 1e6


@pytest.mark.parametrize("model", MODELS)
def test_a_shipped_bundle_is_what_the_checkpoint_exports_to(tmp_path: Path, model: str) -> None:
    from anomalygpt_edge.export.options import ExportOptions
    from anomalygpt_edge.export.pipeline import export_bundle

    folder = REPOSITORY / "models" / model
    export_bundle(ExportOptions.of_folder(folder / "checkpoint", tmp_path / "bundle"))
    shipped, exported = open_bundle(folder / "bundle"), open_bundle(tmp_path / "bundle")
    assert shipped.manifest.sources == exported.manifest.sources
    frame = draw(held_out_families(1)[0], default_rng(0), 1).pixels
    with Inspector.open(shipped.folder) as ours, Inspector.open(exported.folder) as theirs:
        one, other = ours.inspect(frame), theirs.inspect(frame)
    assert one.sentence == other.sentence
    assert np.abs(one.anomaly_map - other.anomaly_map).max() < 1e-5

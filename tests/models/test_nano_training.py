"""The training recipe: deterministic from its seed, and the same whether interrupted or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from sklearn.metrics import roc_auc_score

from anomalygpt_edge.models.nano import train_language, train_vision
from anomalygpt_edge.models.nano.config import Recipe
from anomalygpt_edge.models.nano.data import mirror_defects, training_group
from anomalygpt_edge.models.nano.evaluate import auroc
from anomalygpt_edge.models.nano.gallery import Gallery, build_gallery
from anomalygpt_edge.models.nano.tokenizer import load_tokenizer, train_tokenizer
from anomalygpt_edge.models.nano.train import train
from anomalygpt_edge.models.nano.words import dialogue, places
from anomalygpt_edge.models.prompts import STOP_PIECE, answer

TINY = Recipe(
    vision_steps=4,
    warmup_steps=1,  # so that the cosine is on the way too
    groups_per_step=1,
    gallery_groups=4,
    language_steps=4,
    language_batch=4,
    log_every=1,
    evaluate_every=2,
)


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures logged while training are not what is tested here: two families do."""
    for module, name in ((train_vision, "evaluate_vision"), (train_language, "evaluate_language")):
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _whole=whole: _whole(*args, num_families=2, num_queries=1)
        )


def _weights(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([v.numpy().ravel() for v in state.values()])


def test_interrupted_vision_training_ends_where_uninterrupted_does(tmp_path: Path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = train_vision.train_vision(TINY, whole, "cpu", 0)
    loss, calls = train_vision.vision_loss, []

    def dies_at_the_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(train_vision, "vision_loss", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_vision.train_vision(TINY, parts, "cpu", 0)
    monkeypatch.setattr(train_vision, "vision_loss", loss)
    resumed = train_vision.train_vision(TINY, parts, "cpu", 0)
    assert np.allclose(_weights(resumed.state_dict()), _weights(expected.state_dict()), atol=1e-6)


def test_whole_recipe_writes_a_checkpoint_and_a_curve(tmp_path: Path) -> None:
    train(TINY, tmp_path / "run", tmp_path / "checkpoint", "cpu", 0)
    assert (tmp_path / "checkpoint" / "imagebind.safetensors").exists()
    assert "one_shot_pixel" in (tmp_path / "run" / "vision.jsonl").read_text()
    assert "one_shot_accuracy" in (tmp_path / "run" / "language.jsonl").read_text()
    with pytest.raises(SystemExit, match="another recipe"):
        train(dataclasses.replace(TINY, seed=21), tmp_path / "run", tmp_path / "checkpoint", "cpu", 0)


def test_the_loss_teaches_matching() -> None:
    """A few steps on one batch must lower its loss."""
    torch.manual_seed(0)
    model = train_vision.NanoVision(TINY)
    batch = train_vision.Groups(TINY)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss, parts = train_vision.vision_loss(model, batch, TINY)
        losses.append(parts["few_shot"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_only_answers_are_learned(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.model")
    words = train_language.Vocabulary(load_tokenizer(tmp_path / "tokenizer.model"))
    asked = [("Is this part defective?", answer(["top"])), ("Where is it?", "At the top of the image.")]
    ids, labels = words.turns(asked)
    learned = [i for i, label in zip(ids, labels, strict=True) if label != train_language.IGNORE]
    text = words.tokenizer.decode(learned)
    assert text.startswith("Yes, there is an anomaly")
    assert "Where" not in text
    assert learned.count(words.stop) == 2
    assert words.tokenizer.id_to_piece(words.stop) == STOP_PIECE


def test_gallery_survives_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = train_vision.NanoVision(TINY).eval()
    gallery = build_gallery(
        vision.encoder, vision.decoder, vision.text_features()[0].detach(), 5, 2, workers=0
    )
    gallery.save(tmp_path / "gallery.npz")
    loaded = Gallery.load(tmp_path / "gallery.npz")
    assert np.array_equal(loaded.few_shot, gallery.few_shot)
    assert loaded.defects == gallery.defects
    assert len(loaded.kinds) == 6


def test_mirrored_maps_and_places_agree() -> None:
    sample = training_group(1, 1)[2]
    mirrored = mirror_defects(sample.defects, True, False)
    assert {
        p.replace("left", "x").replace("right", "left").replace("x", "right") for p in places(sample.defects)
    } == set(places(mirrored))


def test_every_dialogue_has_a_grounded_answer() -> None:
    rng = default_rng(0)
    for index in range(30):
        sample = training_group(2, index)[2]
        for question, reply in dialogue(rng, sample.defects, sample.kind):
            assert question.endswith(("?", "."))
            if reply.startswith(("Yes", "No,")):
                assert reply == answer(places(sample.defects))


def test_auroc_equals_scikit_learns() -> None:
    rng = default_rng(0)
    scores, labels = rng.integers(0, 8, 200) / 8, rng.integers(0, 2, 200)
    assert auroc(scores, labels.astype(float)) == pytest.approx(roc_auc_score(labels, scores))

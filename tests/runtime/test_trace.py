"""``agpt trace``: all intermediate results in one file, equal to the inspector's."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalygpt_edge.kernels import INJECTED
from anomalygpt_edge.models import prompts
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.cli import main as cli
from anomalygpt_edge.runtime.evaluation.trace import trace_frame
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.vision.images import read_image

KEYS = {
    "pixels", "image_embedding", "patch_features", "text_features", "anomaly_map", "prompt_embeddings",
    "prompt_token_ids", "answer_logits", "answer_token_ids",
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """One image and two good parts, not square."""
    rng = np.random.default_rng(3)
    paths = [tmp_path / f"{name}.png" for name in ("image", "good_a", "good_b")]
    for path in paths:
        cv2.imwrite(str(path), rng.integers(0, 256, (60, 90, 3), np.uint8))
    return paths


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["agpt", "trace", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_command_writes_every_stage(tiny_bundle, images, tmp_path, monkeypatch):
    out = tmp_path / "trace.npz"
    assert command(monkeypatch, tiny_bundle, images[0], "--class", "pcb", "--threads", "1", "--out", out) == 0
    manifest = open_bundle(tiny_bundle).manifest
    width, vocab = manifest.language.width, manifest.language.vocab_size
    with np.load(out, allow_pickle=False) as trace:
        shapes = {name: trace[name].shape for name in trace.files}
        assert all(
            trace[name].dtype == (np.int32 if name.endswith("_ids") else np.float32) for name in shapes
        )
        np.testing.assert_array_equal(trace["text_features"], open_bundle(tiny_bundle).text_features("pcb"))
        tokens, answer = list(trace["prompt_token_ids"]), list(trace["answer_token_ids"])
        assert trace["answer_logits"].argmax() == answer[0]
    assert shapes.keys() == KEYS
    assert shapes["pixels"] == (1, 3, 224, 224)
    assert shapes["image_embedding"] == (width,)
    assert shapes["patch_features"] == (4, 256, manifest.vision.width)
    assert shapes["anomaly_map"] == (224, 224)
    assert shapes["prompt_embeddings"] == (18, width)
    assert shapes["answer_logits"] == (vocab,)
    assert tokens[0] == 1
    assert tokens.count(INJECTED) == 19
    assert 0 < len(answer) <= 16


def test_traced_stages_equal_the_inspectors(tiny_bundle, images):
    frames = [read_image(path) for path in images]
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        zero_shot = trace_frame(inspector, frames[0], [])
        verdict = inspector.inspect(frames[0])
        np.testing.assert_array_equal(zero_shot["anomaly_map"], verdict.anomaly_map)
        few_shot = trace_frame(inspector, frames[0], frames[1:])
        vision, product = inspector.vision, inspector.product
        localised = vision.localise(vision.encode_frame(frames[0], product), product)
        np.testing.assert_array_equal(few_shot["anomaly_map"], localised.prompt_maps[0])
        known = trace_frame(inspector, frames[0], frames[:1])
    assert not np.allclose(zero_shot["anomaly_map"], few_shot["anomaly_map"])
    assert np.abs(known["anomaly_map"]).max() < 1e-5  # compared with itself, nothing is anomalous


def test_image_and_good_parts_are_resized_alike(tiny_bundle, images):
    frame = read_image(images[0])
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        crop = trace_frame(inspector, frame, [frame], "crop")
        stretch = trace_frame(inspector, frame, [frame], "stretch")
    assert not np.allclose(crop["pixels"], stretch["pixels"])
    for trace in (crop, stretch):
        assert np.abs(trace["anomaly_map"]).max() < 1e-5


def test_history_is_part_of_the_question(tiny_bundle, images):
    """AnomalyGPT's prompt with several turns is one text; it does not change the chosen class."""
    question = "Is it good?\n### Assistant: It is a pcb.\n### Human: Why?"
    with Inspector.open(tiny_bundle, threads=1) as inspector:
        trace = trace_frame(inspector, read_image(images[0]), [], question=question)
        pieces = inspector.language.session.tokenise(question + prompts.PIECE_ASSISTANT)
        np.testing.assert_array_equal(trace["text_features"], inspector.bundle.text_features("object"))
    assert list(trace["prompt_token_ids"][-len(pieces) :]) == pieces


def test_errors_are_one_sentence_and_leave_no_file(tiny_bundle, images, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out" / "trace.npz"
    out.parent.mkdir()
    for arguments, words in (
        ((tiny_bundle, images[0], "--resize", "pad"), "--resize 'pad' is not known"),
        ((tiny_bundle, tmp_path / "none.png"), "none.png"),
        ((tiny_bundle, images[0], "--class", "dragon"), "unknown class name 'dragon'"),
        ((tmp_path, images[0]), "not a bundle"),
    ):
        assert command(monkeypatch, *arguments, "--out", out) == 2
        assert words in capfd.readouterr().err
    assert not list(out.parent.iterdir())

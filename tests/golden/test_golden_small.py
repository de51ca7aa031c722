"""What of the original's results needs no full-size model: pixels and tokens, in every run of the tests."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anomalygpt_edge.export.checkpoints import open_networks
from anomalygpt_edge.export.description import prompt_layout
from anomalygpt_edge.export.gguf_llm import write_gguf
from anomalygpt_edge.export.parity import ANSWER_LIMITS
from anomalygpt_edge.export.tolerances import TOLERANCES
from anomalygpt_edge.kernels import INJECTED, preprocess
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.runtime.bundles.bundle import Language
from anomalygpt_edge.runtime.language.model import LanguageModel
from anomalygpt_edge.runtime.vision.images import read_image

HERE = Path(__file__).parent
INDEX = json.loads((HERE / "golden.json").read_text())
CASES = {case["id"]: case for case in INDEX["cases"]}

FP32 = TOLERANCES["fp32"]
# The stages as docs/benchmarks.md names them → the largest error that an export may have.
STAGES = {
    "image embedding": FP32["image_embedding"].limit,
    "patch features": FP32["patch_features"].limit,
    "anomaly map": FP32["zero_shot_map"].limit,
    "prompt embeddings": FP32["prompt_embeddings"].limit,
    "answer logits, f16": ANSWER_LIMITS["f16"],
    "answer logits, q8_0": ANSWER_LIMITS["q8_0"],
}

sys.path.insert(0, str(HERE.parents[1]))  # tools is never installed
generator = importlib.import_module("tools.random_checkpoints")


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Iterator[LanguageModel]:
    """A small language model with the golden vocabulary, its LoRA merged."""
    folder = tmp_path_factory.mktemp("small")
    files = generator.write_checkpoints(3, folder / "checkpoints", generator.TINY)
    source = open_networks(*vars(files).values()).llama
    write_gguf(source, folder / "llm.gguf", "small")
    config = source.config
    described = Language(config.hidden_size, config.vocab_size, config.num_hidden_layers, 2048)
    model = LanguageModel.open(folder / "llm.gguf", prompt_layout(), described, threads=1)
    yield model
    model.close()


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """Normalised pixels [3, S, S] → grey levels 0..255."""
    spec = VisionConfig.pixel_mean, VisionConfig.pixel_std
    mean, std = (np.array(values, np.float32)[:, None, None] for values in spec)
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_the_originals(case):
    """Within one grey level, as the original's Pillow 10 resized them: squeezed for its demo, else cropped."""
    frame = read_image(HERE / "inputs" / CASES[case]["image"])
    resize = "stretch" if CASES[case]["web_demo"] else "crop"
    pixels = preprocess(frame, 224, resize, VisionConfig.pixel_mean, VisionConfig.pixel_std)[0]
    with np.load(HERE / "golden.npz") as arrays:
        expected = arrays[INDEX["aliases"].get(f"{case}/pixels", f"{case}/pixels")]
    assert np.abs(to_grey(pixels) - expected).max() <= 1.01


@pytest.mark.parametrize("case", CASES)
def test_prompt_is_the_originals_token_by_token(language, case):
    """A dialogue's history included: ``zs_history_sq`` is the third turn."""
    ids = CASES[case]["token_ids"]
    expected = [ids["bos"], *ids["before"], INJECTED, *ids["middle"], *[INJECTED] * 18, *ids["after"]]
    assert language.prompt.token_ids(CASES[case]["prompt"]) == expected


def test_no_word_is_cut_from_an_answer(language):
    """The original cuts the last two tokens from every answer, also from one that did not end in a stop."""
    for case in CASES.values():
        ids, text = case["greedy_ids"], language.session.text
        assert text(ids[:-2]).strip() == case["output_text"].strip()
        assert len(text(ids)) > len(text(ids[:-2]))


def test_copy_is_compact():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".py") <= 8_000_000


def test_page_of_benchmarks_states_the_gate_that_exports_pass():
    """One table of tolerances, in export/tolerances.py; the published errors are held against the same limits."""
    page = (HERE.parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("### Equality with the original")[1].split("###")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in section.splitlines()
        if line.count("|") == 4
    ]
    allowed = {stage: float(limit) for stage, _, limit in rows if stage in STAGES}
    assert allowed == STAGES

"""The gate: the right bundle passes, and every wrong merge, other model or broken number does not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from anomalygpt_edge.export.checkpoints import load_model, open_checkpoint_folder, open_checkpoints
from anomalygpt_edge.export.gguf_llm import quantise, write_gguf
from anomalygpt_edge.export.parity import (
    Parity,
    ParityError,
    StageResult,
    greedy_gap,
    require,
    sample_cases,
    summary,
)
from anomalygpt_edge.export.reference import Reference
from anomalygpt_edge.export.tolerances import TOLERANCES, error_of


@pytest.fixture(scope="module")
def checkpoints(small):
    return open_checkpoints(*small.paths)


@pytest.fixture(scope="module")
def reference(checkpoints):
    return Reference(checkpoints)


@pytest.fixture(scope="module")
def parity(reference, exported):
    return Parity(reference, exported.bundle, exported.manifest, sample_cases())


def answers(parity, checkpoints, folder, **changed) -> dict[str, StageResult]:
    """Parity of a GGUF whose source was changed."""
    path = folder / "llm.gguf"
    write_gguf(replace(checkpoints.llama, **changed), path, "test")
    return {result.stage: result for result in parity.answers(path, "f16", threads=1)}


def test_networks_pass_in_every_stage(parity):
    results = parity.networks()
    assert [result.stage for result in results] == list(TOLERANCES["fp32"])
    assert all(result.passed for result in results)
    assert max(result.error for result in results) > 0  # two computations, not one compared with itself


def test_right_merge_passes(parity, checkpoints, tmp_path):
    results = answers(parity, checkpoints, tmp_path)
    assert results["answer_logits f16"].error < 2e-3
    require(list(results.values()))


@pytest.mark.parametrize("times", [0, 2])
def test_lora_left_out_or_applied_twice_fails(parity, checkpoints, tmp_path, times):
    lora = replace(checkpoints.llama.lora, scaling=checkpoints.llama.lora.scaling * times)
    results = answers(parity, checkpoints, tmp_path, lora=lora)
    assert results["answer_logits f16"].error > 5 * results["answer_logits f16"].limit
    with pytest.raises(ParityError, match="LoRA left out, applied twice"):
        require(list(results.values()))


def test_unpermuted_rows_fail(parity, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalygpt_edge.export.gguf_llm.permute_rows", lambda weight, heads: weight)
    assert not answers(parity, checkpoints, tmp_path)["answer_logits f16"].passed


def test_quantised_is_within_its_own_tolerance(parity, checkpoints, tmp_path):
    write_gguf(checkpoints.llama, tmp_path / "f16.gguf", "test")
    quantise(tmp_path / "f16.gguf", tmp_path / "q8.gguf", "q8_0", threads=1)
    results = parity.answers(tmp_path / "q8.gguf", "q8_0", threads=1)
    require(results)
    assert results[0].error > 1e-4


def test_bundle_of_another_model_fails(nano_folder, exported):
    other = Reference(open_checkpoint_folder(nano_folder))
    results = Parity(other, exported.bundle, exported.manifest, sample_cases()).networks()
    failed = {result.stage for result in results if not result.passed}
    assert {"image_embedding", "zero_shot_map", "prompt_embeddings"} <= failed  # the towers are the same
    with pytest.raises(ParityError, match="image_embedding"):
        require(results)


def test_reference_equals_the_merged_model(checkpoints, reference):
    """Unmerged LoRA, streamed layers and last positions only, against the plain module with merged weights."""
    model = load_model(checkpoints)
    torch.manual_seed(0)
    prompts = [torch.randn(length, checkpoints.config.llama.hidden_size) for length in (5, 9)]
    streamed = reference.logits(prompts, [1, 4])
    for prompt, count, logits in zip(prompts, (1, 4), streamed, strict=True):
        assert torch.allclose(logits, model.llama(prompt[None])[0, -count:], atol=1e-4)


def test_errors_that_are_no_number_fail():
    nan = np.array([1, math.nan], np.float32)
    assert error_of(np.ones(2, np.float32), nan, "relative") == math.inf
    assert error_of(nan, nan, "absolute") == math.inf
    assert error_of(np.ones(2), np.ones(3), "absolute") == math.inf
    assert error_of(np.array([4.0, 1.0]), np.array([4.0, 3.0]), "relative") == 0.5
    assert not StageResult("x", math.nan, 1.0, "absolute", "").passed


def test_greedy_gap_measures_how_far_from_a_tie():
    logits = np.array([[1.0, 4.0], [3.0, 2.0]], np.float32)
    assert greedy_gap(logits, [1, 0]) == 0
    assert greedy_gap(logits, [1, 1]) == 0.25


def test_summary_marks_a_failure():
    results = [StageResult("a", 0.1, 1.0, "absolute", ""), StageResult("b", math.inf, 1.0, "absolute", "")]
    kept = summary(results, 4)
    assert kept["passed"] is False
    assert kept["stages"] == {
        "a": {"error": 0.1, "limit": 1.0, "kind": "absolute"},
        "b": {"error": "not finite", "limit": 1.0, "kind": "absolute"},
    }

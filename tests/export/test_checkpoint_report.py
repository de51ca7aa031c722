"""``agpt doctor --checkpoints``: model, training setup, fit, and the needs of an export."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from anomalygpt_edge.export.checkpoint_report import (
    describe_pandagpt,
    describe_vicuna,
    model_name,
    needs_of,
    report_checkpoints,
    resources,
    setup_of,
)
from anomalygpt_edge.export.tensor_files import CheckpointError, Tensors
from anomalygpt_edge.models.anomalygpt import AnomalyGPTConfig
from anomalygpt_edge.models.llama import LlamaConfig
from anomalygpt_edge.models.prompt_learner import PromptLearnerConfig
from anomalygpt_edge.runtime.cli import main as cli
from anomalygpt_edge.runtime.common.machine import Finding

LLAMA_13B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["agpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_set_that_fits(originals, call):
    status, printed, _ = call("doctor", "--checkpoints", *originals.paths[:4])
    assert status == 0
    assert "vision tower of 32 blocks, width 64; " in printed
    assert "a LLaMA of 3 layers, width 64; " in printed
    rows = originals.config.llama.vocab_size
    assert f"{rows} rows, {rows - 1} pieces" in printed
    assert "LoRA for 3 layers" in printed
    assert "setup: unknown" in printed
    assert "they fit" in printed
    for line in ("bundle", "disk", "memory"):
        assert line in printed


def test_every_mistake_is_named_not_only_the_first(originals, tmp_path, copy_of, call):
    copied = copy_of(originals, tmp_path)
    os.truncate(copied.imagebind, 1000)
    imagebind, vicuna, panda, anomaly, _ = copied.paths
    (vicuna / "tokenizer.model").unlink()
    status, printed, _ = call("doctor", "--checkpoints", imagebind, vicuna, anomaly, panda)
    assert status == 1
    assert "is truncated or not a torch checkpoint" in printed
    assert "tokenizer.model does not exist" in printed
    assert "is the AnomalyGPT checkpoint, but it was given as PandaGPT's" in printed
    assert "is the PandaGPT checkpoint, but it was given as AnomalyGPT's" in printed
    assert "not checked" in printed


def test_good_files_that_do_not_fit(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    delta = torch.load(copied.pandagpt, weights_only=True)
    kept = OrderedDict((k, v) for k, v in delta.items() if ".layers.2." not in k)
    torch.save(kept, copied.pandagpt)
    found = by_name(report_checkpoints(*copied.paths[:4]))
    assert not found["PandaGPT"].fix
    assert "LoRA for 2 layers but the language model has 3" in found["together"].fix
    assert found["together"].needed


def test_no_weight_is_read(originals, monkeypatch):
    """Only shapes, and the final norm that tells Vicuna from its published differences."""
    read = []
    whole = Tensors.__getitem__
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, key: (read.append(key), whole(self, key))[1])
    report_checkpoints(*originals.paths[:4])
    assert set(read) == {"model.norm.weight"}


def test_a_delta_of_vicuna_is_no_vicuna(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    shard = copied.vicuna / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(shard, weights_only=True)
    tensors["model.norm.weight"] *= 0.01
    torch.save(tensors, shard)
    with pytest.raises(CheckpointError, match="contains the differences to LLaMA"):
        describe_vicuna(copied.vicuna)


def test_fewer_rows_than_pieces(originals, tmp_path, copy_of):
    copied = copy_of(originals, tmp_path)
    rows = originals.config.llama.vocab_size - 10
    index = json.loads((copied.vicuna / "pytorch_model.bin.index.json").read_text())["weight_map"]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        shard = copied.vicuna / index[key]
        tensors = torch.load(shard, weights_only=True)
        tensors[key] = tensors[key][:rows].clone()
        torch.save(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{rows + 9} pieces but its embedding {rows} rows"):
        describe_vicuna(copied.vicuna)


@pytest.mark.parametrize(
    ("path", "setup"),
    [
        ("ckpt/train_supervised/pytorch_model.pt", "supervised, from the folder name train_supervised"),
        ("ckpt/train_mvtec/pytorch_model.pt", "MVTec-AD, from the folder name train_mvtec"),
        ("train_visa/sub/pytorch_model.pt", "VisA, from the folder name train_visa"),
        ("visa/a/b/pytorch_model.pt", "unknown, no parent folder names it"),
        ("downloads/pytorch_model_mvtec.pt", "unknown, no parent folder names it"),
    ],
)
def test_setup_is_judged_by_the_folder(path, setup, tmp_path):
    root = Path("/data")
    assert setup_of(root / path) == setup


def test_7b_and_13b_by_shapes():
    assert model_name(LlamaConfig()) == "a LLaMA of 7B"
    assert model_name(LLAMA_13B) == "a LLaMA of 13B"
    assert model_name(LlamaConfig(num_hidden_layers=2)) == "a LLaMA of 2 layers, width 4096"
    names = [f"x.layers.{i}.self_attn.{p}_proj.lora_A.weight" for i in range(40) for p in "qkvo"]
    shapes = dict.fromkeys(names, (32, 5120)) | {"llama_proj.weight": (5120, 1024)}
    panda = Tensors(Path("pandagpt.pt"), shapes, lambda key: pytest.fail(f"{key} was read"))
    assert describe_pandagpt(panda) == (
        "delta for width 5120 (13B), image embeddings of 1024; LoRA for 40 layers"
    )


def test_needs_of_the_full_sizes():
    """7B: 6.7 billion weights in float16, and 1.1 billion of the networks in float32."""
    small = needs_of(AnomalyGPTConfig(llama=LlamaConfig(vocab_size=32001)))
    assert small.language == pytest.approx(2 * 6_738_423_808, rel=1e-3)
    assert small.networks == pytest.approx(4 * (631e6 + 5.2e6 + 107.6e6 + 4.2e6), rel=0.01)
    assert small.disk("f16") == small.bundle("f16") == small.networks + small.language
    assert small.disk("q8_0") == pytest.approx(small.bundle("q8_0") + small.language)
    large = needs_of(AnomalyGPTConfig(llama=LLAMA_13B, prompt_learner=PromptLearnerConfig(llm_width=5120)))
    assert large.language == pytest.approx(2 * 13_015_864_320, rel=1e-3)
    assert small.memory < large.memory < 8e9
    assert large.bundle("q4_0") < large.bundle("q4_k_m") < large.bundle("q8_0") < large.bundle("f16")


def test_too_small_a_machine_is_said(monkeypatch):
    monkeypatch.setattr("anomalygpt_edge.export.checkpoint_report.memory_gib", lambda: 2.0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: DiskUsage(free=1e9))
    found = by_name(resources(needs_of(AnomalyGPTConfig())))
    assert "free some" in found["disk"].fix
    assert "larger machine" in found["memory"].fix
    assert not found["disk"].needed


class DiskUsage:
    def __init__(self, free: float) -> None:
        self.free = free


def test_four_paths_are_needed(call):
    status, _, printed = call("doctor", "--checkpoints", "a", "b")
    assert status == 2
    assert "requires 4 arguments" in printed


def test_names_in_a_file_cannot_steer_the_terminal(originals, tmp_path, copy_of, call):
    copied = copy_of(originals, tmp_path)
    tensors = torch.load(copied.anomalygpt, weights_only=True)
    tensors["image_decoder.\x1b[2Jnothing wrong\n"] = torch.ones(2)
    torch.save(tensors, copied.anomalygpt)
    status, printed, _ = call("doctor", "--checkpoints", *copied.paths[:4])
    assert status == 1
    assert "nothing wrong" in printed
    assert "\x1b" not in printed

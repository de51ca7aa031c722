"""The generator of checkpoints: its numbers are those that the golden vectors were computed from."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalygpt_edge.export.checkpoints import open_checkpoints
from anomalygpt_edge.export.gguf_llm import read_vocabulary
from anomalygpt_edge.export.vicuna import open_llama
from anomalygpt_edge.models.imagebind import VisionConfig
from anomalygpt_edge.models.llama import LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # tools is never installed
generator = importlib.import_module("tools.random_checkpoints")

MAX_ELEMENTS = 20_000  # larger tensors are drawn in the same way; make test-golden draws them all
ROLES = {
    "imagebind": ("imagebind", generator.imagebind_specs(generator.Sizes()), torch.float32),
    "vicuna": ("llama", generator.llama_specs(generator.Sizes(), 2401), torch.float16),
    "pandagpt": ("pandagpt", generator.pandagpt_specs(generator.Sizes()), torch.float16),
    "anomalygpt": ("anomalygpt", generator.anomalygpt_specs(generator.Sizes()), torch.float16),
}


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    return generator.write_checkpoints(5, tmp_path_factory.mktemp("tiny"), generator.TINY)


@pytest.mark.parametrize("group", ROLES)
def test_tensors_are_the_golden_ones(group):
    expected = json.loads((ROOT / "tests/golden/seed11_crc32.json").read_text())[group]
    role, specs, dtype = ROLES[group]
    specs = list(specs)
    assert len(specs) == len(expected)
    writer = generator.Writer(11, {})
    checked = 0
    for spec, checksum in zip(specs, expected, strict=True):
        if math.prod(spec.shape) <= MAX_ELEMENTS:
            assert generator.crc32(writer.tensor(role, spec, dtype)) == checksum, spec.name
            checked += 1
    assert checked >= len(specs) // 3 or group == "pandagpt"


def test_full_size_is_the_originals():
    specs = list(generator.imagebind_specs(generator.Sizes()))
    assert len(specs) == 1311
    assert sum(math.prod(spec.shape) for spec in specs) == 1_200_786_990


def test_tiny_set_opens_as_the_original(tiny_set, tmp_path):
    rows = np.eye(2, 32, dtype=np.float32)
    np.savez(tmp_path / "text.npz", object=rows)
    opened = open_checkpoints(*vars(tiny_set).values(), tmp_path / "text.npz")
    assert opened.config.vision == VisionConfig(width=64, mlp_width=256, embed_dim=32)
    assert opened.config.llama == LlamaConfig(2401, 128, 192, 2, 4)
    assert opened.llama.lora is not None
    assert opened.llama.lora.scaling == 32 / 8
    assert all(torch.isfinite(tensor).all() for tensor in opened.vision_state().values())


def test_deltas_lie_in_one_cuda_storage(tiny_set):
    places = set()
    saved = torch.load(tiny_set.pandagpt, map_location=lambda storage, place: places.add(place) or storage)
    assert places == {"cuda:0"}
    assert len({tensor.untyped_storage().data_ptr() for tensor in saved.values()}) == 1
    assert all(isinstance(tensor, torch.nn.Parameter) for tensor in saved.values())


def test_a_set_is_kept_and_another_seed_is_another_set(tiny_set, tmp_path):
    folder = tiny_set.imagebind.parents[1]
    before = tiny_set.imagebind.stat().st_mtime_ns
    assert generator.write_checkpoints(5, folder, generator.TINY) == tiny_set
    assert tiny_set.imagebind.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="contains other checkpoints"):
        generator.write_checkpoints(6, folder, generator.TINY)
    other = generator.write_checkpoints(6, tmp_path, generator.TINY)
    first, second = (torch.load(files.anomalygpt, map_location="cpu") for files in (tiny_set, other))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_layers_that_share_weights_and_pieces_that_are_unused(tmp_path):
    """A large model to read that is small on the disk, with a vocabulary of the true length."""
    sizes = replace(generator.TINY, layers=8)
    whole, shared = (
        generator.write_checkpoints(5, tmp_path / name, sizes, num_pieces=2500, distinct_layers=distinct)
        for name, distinct in (("whole", None), ("shared", 2))
    )
    stored = [sum(file.stat().st_size for file in files.vicuna.glob("*.bin")) for files in (whole, shared)]
    assert stored[1] < 0.7 * stored[0]
    (config, tensors), (same_config, shared_tensors) = open_llama(whole.vicuna), open_llama(shared.vicuna)
    assert config == same_config
    assert config.vocab_size == 2501
    assert tensors.shapes == shared_tensors.shapes
    name = "model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(shared_tensors[name(0)], shared_tensors[name(2)])
    assert torch.equal(shared_tensors[name(0)], shared_tensors[name(6)])
    assert not torch.equal(shared_tensors[name(0)], shared_tensors[name(1)])
    vocabulary = read_vocabulary(shared.vicuna / "tokenizer.model", config.vocab_size)
    assert vocabulary.pieces[2400] == b"<unused 2400>"
    assert set(vocabulary.types[2400:]) == {5}

"""The GGUF against the torch model: tokenizer, row order, merged LoRA, quantisation."""

from __future__ import annotations

from dataclasses import replace

import gguf
import llama_cpp
import numpy as np
import pytest
import sentencepiece
import torch

from anomalygpt_edge.export.checkpoints import open_checkpoint_folder, open_checkpoints
from anomalygpt_edge.export.gguf_llm import permute_rows, quantise, read_vocabulary, write_gguf
from anomalygpt_edge.export.tensor_files import CheckpointError
from anomalygpt_edge.runtime.language.gguf_header import read_header


@pytest.fixture(scope="module")
def llm(originals, tmp_path_factory):
    """The originals' language model as float16 GGUF, and its source."""
    source = open_checkpoints(*originals.paths).llama
    path = tmp_path_factory.mktemp("gguf") / "llm.gguf"
    write_gguf(source, path, "test")
    return path, source


@pytest.fixture(scope="module")
def vocab(llm):
    """llama.cpp's view of the tokenizer."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(llm[0]).encode(), parameters)
    yield llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


def test_header_says_what_config_said(llm):
    path, source = llm
    header = read_header(path)
    config = source.config
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.embedding_length"] == config.hidden_size
    assert header.metadata["llama.block_count"] == config.num_hidden_layers
    assert header.metadata["llama.context_length"] == config.max_position_embeddings
    assert header.metadata["tokenizer.ggml.model"] == "llama"
    assert header.metadata["tokenizer.ggml.bos_token_id"] == 1
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 2
    assert header.metadata["tokenizer.ggml.add_space_prefix"] is True
    assert not [key for key in header.metadata if "chat_template" in key]
    assert header.tensors["token_embd.weight"].shape == (config.vocab_size, config.hidden_size)
    assert header.tensors["blk.0.attn_norm.weight"].type == "F32"
    assert header.tensors["blk.0.attn_q.weight"].type == "F16"
    assert len(header.tensors) == 3 + 9 * config.num_hidden_layers


def test_rows_of_q_and_k_only_are_permuted(llm):
    path, source = llm
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    heads, width = source.config.num_attention_heads, source.config.hidden_size
    for projection in "qkvo":
        merged = source.merged(f"model.layers.2.self_attn.{projection}_proj.weight").numpy()
        if projection in "qk":
            merged = merged.reshape(heads, 2, width // heads // 2, width).swapaxes(1, 2).reshape(width, width)
        name = "attn_output" if projection == "o" else f"attn_{projection}"
        assert np.array_equal(stored[f"blk.2.{name}.weight"], merged.astype(np.float16)), projection


def test_permutation_moves_every_row_once():
    rows = torch.arange(24.0)[:, None]
    assert permute_rows(rows, heads=2)[:6, 0].tolist() == [0, 6, 1, 7, 2, 8]
    assert sorted(permute_rows(rows, heads=2)[:, 0].tolist()) == rows[:, 0].tolist()


@pytest.mark.parametrize(
    "text",
    ["### Human: <Img>", "</Img> ", "Is there any anomaly in the image?\n### Assistant:", "\n###",
     "  two  spaces ", "Größe 3 µm, 漢字 🔩", "<s> typed </s> <unk>", "[PAD]", "a\tb"],
)  # fmt: skip
def test_tokenizer_agrees_with_sentencepiece(vocab, tokenizer_model, text):
    data = text.encode()
    ids = (llama_cpp.llama_token * 256)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, 256, False, False)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model)).encode(text)
    assert list(ids[:count]) == expected


def test_row_without_piece_is_unused(tokenizer_model, vocab_size):
    vocabulary = read_vocabulary(tokenizer_model, vocab_size + 1)
    assert len(vocabulary.pieces) == vocab_size + 1
    assert vocabulary.types[-1] == gguf.TokenType.UNUSED
    assert vocabulary.types[:4] == [
        gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE,
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="pieces but the embedding only 100 rows"):
        read_vocabulary(tokenizer_model, 100)


def test_quantised_keeps_readable_token_embeddings(llm, tmp_path):
    path, _ = llm
    target = tmp_path / "q8.gguf"
    quantise(path, target, "q8_0", threads=1)
    header = read_header(target)
    assert header.tensors["token_embd.weight"].type == "Q8_0"
    assert header.tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert target.stat().st_size < 0.7 * path.stat().st_size


def test_weight_beyond_float16_is_refused(nano_folder, tmp_path):
    source = open_checkpoint_folder(nano_folder).llama
    huge = replace(source.tensors, read=lambda name: source.tensors[name].float() * 1e7)
    with pytest.raises(CheckpointError, match="does not fit in float16"):
        write_gguf(replace(source, tensors=huge), tmp_path / "llm.gguf", "test")


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_vocabulary(tmp_path / "tokenizer.model", 10)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff garbage")
    with pytest.raises(CheckpointError, match="is not a sentencepiece model"):
        read_vocabulary(tmp_path / "tokenizer.model", 10)

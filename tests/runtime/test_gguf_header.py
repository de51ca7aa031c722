"""The GGUF reader: correct on valid files, one clear error on all others, no crash and no hang."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalygpt_edge.runtime.bundles.bundle import Language
from anomalygpt_edge.runtime.common.errors import BundleError
from anomalygpt_edge.runtime.language.gguf_header import TokenEmbeddings, check_language_model, read_header

WIDTH, VOCAB = 64, 40
EXPECTED = Language(width=WIDTH, vocab_size=VOCAB, layers=2, context_length=128)
TABLE = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)


def write_model(path: Path, kind: str = "F16", architecture: str = "llama", **metadata: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_token_list([f"token{i}" for i in range(VOCAB)])
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    qtype = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("token_embd.weight", stored_table(qtype), raw_dtype=qtype)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_table(qtype: gguf.GGMLQuantizationType) -> np.ndarray:
    """``TABLE`` in a GGML type; zeros for a type that the gguf package cannot write."""
    try:
        return gguf.quants.quantize(TABLE, qtype)
    except NotImplementedError:
        return np.zeros(gguf.quant_shape_to_byte_shape(TABLE.shape, qtype), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_reads_what_the_gguf_package_wrote(model: Path) -> None:
    header = read_header(model)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.embedding_length"] == WIDTH
    assert header.metadata["tokenizer.ggml.tokens"] == VOCAB
    reader = gguf.GGUFReader(model)
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
    check_language_model(model, header, EXPECTED)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_rows_are_dequantised_as_gguf_does(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "model.gguf", kind)
    qtype = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(TABLE, qtype), qtype)
    embed = TokenEmbeddings(path, read_header(path).tensors["token_embd.weight"])
    ids = [3, 0, 39, 3]
    assert embed(ids).dtype == np.float32
    np.testing.assert_array_equal(embed(ids), expected[ids])


def test_a_table_of_another_type_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "IQ4_NL")
    with pytest.raises(BundleError, match="IQ4_NL"):
        TokenEmbeddings(path, read_header(path).tensors["token_embd.weight"])


@pytest.mark.parametrize(
    ("metadata", "expected", "complaint"),
    [
        ({"architecture": "gpt2"}, EXPECTED, "architecture is gpt2"),
        ({}, Language(128, VOCAB, 2, 128), "width is 64"),
        ({}, Language(WIDTH, 41, 2, 128), "vocabulary is 40"),
        ({}, Language(WIDTH, VOCAB, 3, 128), "layers is 2"),
        ({"tokenizer__chat_template": "{{ x }}"}, EXPECTED, "tokenizer.chat_template"),
        ({"tokenizer__chat_template__tool_use": "{{ x }}"}, EXPECTED, "tokenizer.chat_template.tool_use"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, metadata: dict[str, str], expected: Language, complaint: str
) -> None:
    path = write_model(tmp_path / "model.gguf", **metadata)
    with pytest.raises(BundleError, match=complaint):
        check_language_model(path, read_header(path), expected)


def test_every_truncation_is_refused(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, len(data) - 6000, 97), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(BundleError):
            read_header(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_raises_or_gives_tensors_inside_the_file(
    model: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(model.read_bytes())
    header_size = read_header(model).tensors["token_embd.weight"].offset
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, header_size - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BundleError:
        return
    for info in header.tensors.values():
        assert info.offset + info.num_bytes <= len(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_refused(tmp_path: Path, garbage: bytes, with_magic: bool) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes((b"GGUF" + struct.pack("<I", 3) if with_magic else b"") + garbage)
    try:
        header = read_header(path)
    except BundleError:
        return
    assert with_magic
    assert not header.tensors


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 0, 2**63),
        struct.pack("<QQ", 2**63, 0),
        struct.pack("<QQQ", 0, 1, 2**64 - 1),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77),
        struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
        struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31),
    ],
    ids=["keys", "tensors", "string", "array", "nested", "type", "tensor", "dimensions"],
)
def test_absurd_sizes_are_refused_at_once(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    with pytest.raises(BundleError, match="re-run agpt export"):
        read_header(path)


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.gguf"):
        read_header(tmp_path / "none.gguf")

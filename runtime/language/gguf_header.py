"""A bounded reader of GGUF headers: every size and offset is checked against the file's size before it is used.

llama.cpp's own parser ends the process on some malformed files, and Python readers hang on others. Therefore this
reader checks every file first. It also locates the token-embedding table, which the runtime reads itself. Format: GGUF
version 3, little-endian (ggml project, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels import pack_prompt
from ...kernels.dequantise import ROW_TYPES
from ..bundles.bundle import FIX, Language
from ..common.errors import BundleError

MAGIC = b"GGUF"
VERSION = 3
MAX_HEADER_BYTES = 64 << 20  # bounds the reading time; a 7B model's header is under 1 MiB
MAX_ENTRIES = 1 << 12  # limit for metadata keys and for tensors; a 7B model has 25 and 291
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 1 << 20
MAX_DIMENSIONS = 4

_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
_STRING, _ARRAY = 8, 9

# ggml type → (name, values per block, bytes per block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 30: ("BF16", 1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: ``shape`` in NumPy's order (rows first), ``offset`` in bytes from the start of the file."""

    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` by key: scalars and strings, and for an array its length; ``tensors`` by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the tensor table.

    Raises:
        BundleError: the file is missing, truncated or not well-formed GGUF version 3.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _parse(_Reader(view))
    except (OSError, ValueError, struct.error) as error:  # mapping an empty file raises ValueError
        raise BundleError(f"{path} is not a usable GGUF file ({error}): {FIX}") from error


def check_language_model(path: Path, header: GgufHeader, expected: Language) -> None:
    """Refuse a language model that differs from the manifest or contains a chat template.

    Raises:
        BundleError: the architecture, width, depth or vocabulary differs; there is a chat template, which programs
            that use llama.cpp execute as code (CVE-2024-34359); or the file is one part of a split model.
    """
    metadata = header.metadata
    if templates := [key for key in metadata if key.startswith("tokenizer.chat_template")]:
        raise BundleError(f"{path} contains {templates[0]}, which can hold code: re-run agpt export")
    table = header.tensors.get("token_embd.weight")
    found = {
        "architecture": metadata.get("general.architecture"),
        "width": metadata.get("llama.embedding_length"),
        "layers": metadata.get("llama.block_count"),
        "vocabulary": metadata.get("tokenizer.ggml.tokens"),
        "embedding table": table and table.shape,
        "splits": metadata.get("split.count", 1),
    }
    wanted = {
        "architecture": "llama",
        "width": expected.width,
        "layers": expected.layers,
        "vocabulary": expected.vocab_size,
        "embedding table": (expected.vocab_size, expected.width),
        "splits": 1,
    }
    for what, value in wanted.items():
        if found[what] != value:
            raise BundleError(f"{path}: {what} is {found[what]}, but the manifest has {value}: {FIX}")


class TokenEmbeddings:
    """The token-embedding table; rows are read from the memory-mapped file when they are needed."""

    def __init__(self, path: Path, table: TensorInfo) -> None:
        """
        Raises:
            BundleError: ``kernels.dequantise`` does not support the table's type.
        """
        if table.type not in ROW_TYPES:
            known = ", ".join(ROW_TYPES)
            raise BundleError(
                f"{path} stores token embeddings as {table.type}: re-run agpt export with one of {known}"
            )
        rows = table.shape[0]
        self._rows = np.memmap(path, np.uint8, "r", table.offset, (rows, table.num_bytes // rows))
        self._type = table.type

    def __call__(
        self, token_ids: Sequence[int] | np.ndarray, injected: np.ndarray | None = None
    ) -> np.ndarray:
        """Token ids, int [L] → float32 [L, D].

        Each ``kernels.INJECTED`` among the ids is replaced by the next of the ``injected`` rows, float32 [K, D].
        """
        return pack_prompt(self._rows, self._type, np.asarray(token_ids, np.int32), injected)


class _Reader:
    """A cursor over the file's header that cannot move past the header's end."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.size = len(view)
        self.end = min(self.size, MAX_HEADER_BYTES)
        self.position = 0

    def skip(self, count: int) -> int:
        """Advance by ``count`` bytes; returns the position before."""
        start = self.position
        if count > self.end - start:
            raise ValueError(f"its header runs past byte {self.end}")
        self.position = start + count
        return start

    def number(self, format: str) -> Any:
        start = self.skip(struct.calcsize("<" + format))
        return struct.unpack_from("<" + format, self.view, start)[0]

    def count(self, what: str, limit: int) -> int:
        value = self.number("Q")
        if value > limit:
            raise ValueError(f"{what} is {value}, over {limit}")
        return value

    def string(self) -> str:
        length = self.count("a string's length", MAX_STRING_BYTES)
        start = self.skip(length)
        return self.view[start : start + length].decode("utf-8", "replace")


def _parse(reader: _Reader) -> GgufHeader:
    magic, version = reader.view[:4], 0
    if magic == MAGIC:
        reader.skip(4)
        version = reader.number("I")
    if version != VERSION:
        raise ValueError(f"magic and version are {magic!r} {version}, not {MAGIC!r} {VERSION}")
    num_tensors = reader.count("the number of tensors", MAX_ENTRIES)
    num_keys = reader.count("the number of metadata keys", MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"metadata key {key!r} occurs twice")
        metadata[key] = _value(reader, reader.number("I"))
    tensors = dict(_tensor(reader) for _ in range(num_tensors))
    if len(tensors) != num_tensors:
        raise ValueError("a tensor name occurs twice")
    return GgufHeader(metadata, _place(reader, metadata.get("general.alignment", 32), tensors))


def _value(reader: _Reader, kind: int) -> Any:
    if kind == _STRING:
        return reader.string()
    if kind == _ARRAY:
        return _array_length(reader)
    return reader.number(_scalar_format(kind))


def _array_length(reader: _Reader) -> int:
    """Skip an array of scalars or strings and return its length."""
    kind = reader.number("I")
    length = reader.count("an array's length", MAX_ARRAY_LENGTH)
    if kind == _STRING:
        for _ in range(length):
            reader.skip(reader.count("a string's length", MAX_STRING_BYTES))
    else:
        reader.skip(length * struct.calcsize("<" + _scalar_format(kind)))
    return length


def _scalar_format(kind: int) -> str:
    format = _SCALARS.get(kind)
    if format is None:
        raise ValueError(f"metadata type {kind} does not exist or is nested")
    return format


def _tensor(reader: _Reader) -> tuple[str, TensorInfo]:
    """Read one row of the tensor table; its offset is still relative to the data section."""
    name = reader.string()
    num_dimensions = reader.number("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
    dimensions = [reader.count("a dimension", 1 << 40) for _ in range(num_dimensions)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in TENSOR_TYPES:
        raise ValueError(f"tensor {name!r} has the unknown type {kind}")
    type_name, block_values, block_bytes = TENSOR_TYPES[kind]
    if dimensions[0] % block_values or 0 in dimensions:
        raise ValueError(f"tensor {name!r} has rows of {dimensions[0]} values, no multiple of {block_values}")
    num_bytes = math.prod(dimensions) // block_values * block_bytes
    return name, TensorInfo(type_name, tuple(reversed(dimensions)), offset, num_bytes)


def _place(reader: _Reader, alignment: Any, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Check that every tensor lies inside the file, and make the offsets relative to the start of the file."""
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise ValueError(f"the alignment is {alignment!r}, not a power of two")
    data = -(-reader.position // alignment) * alignment
    placed = {}
    for name, info in tensors.items():
        if info.offset % alignment or data + info.offset + info.num_bytes > reader.size:
            raise ValueError(
                f"tensor {name!r} lies outside the file or unaligned: the file is cut or altered"
            )
        placed[name] = TensorInfo(info.type, info.shape, data + info.offset, info.num_bytes)
    return placed

"""Quantised rows: every bit as ggml's own functions give it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalygpt_edge.kernels.dequantise import ROW_TYPES, dequantise

GGML = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
QUANTISED = [name for name in ROW_TYPES if name.startswith("Q")]


def ggml_dequantise(rows: np.ndarray, type: str, width: int) -> np.ndarray:
    function = getattr(GGML, f"dequantize_row_q{type[1:]}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.empty((len(rows), width), np.float32)
    function(rows.ctypes.data, values.ctypes.data, values.size)
    return values


def random_rows(type: str, num_rows: int, width: int, seed: int) -> np.ndarray:
    """Any bytes at all, but for float16 scales that are finite."""
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_rows * width // block_values, block_bytes), np.uint8)
    offsets = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(type, (0, 2))
    for offset in offsets:
        scales = (rng.normal(size=len(blocks)) * 10.0 ** rng.integers(-6, 3, len(blocks))).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)


@pytest.mark.parametrize("type", QUANTISED)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 5), num_blocks=st.integers(1, 4))
def test_every_bit_is_ggmls(type: str, seed: int, num_rows: int, num_blocks: int) -> None:
    width = 256 * num_blocks
    rows = random_rows(type, num_rows, width, seed)
    np.testing.assert_array_equal(dequantise(rows, type), ggml_dequantise(rows, type, width))


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_floats_are_widened_exactly(type: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType[type]
    stored = gguf.quants.quantize(values, qtype)
    rows = np.ascontiguousarray(stored).view(np.uint8).reshape(3, -1)
    np.testing.assert_array_equal(dequantise(rows, type), gguf.quants.dequantize(stored, qtype))


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="'IQ4_NL' cannot be read"):
        dequantise(np.zeros((1, 18), np.uint8), "IQ4_NL")
    with pytest.raises(ValueError, match="multiple of 144"):
        dequantise(np.zeros((1, 145), np.uint8), "Q4_K")
    assert dequantise(np.zeros((0, 144), np.uint8), "Q4_K").shape == (0, 256)

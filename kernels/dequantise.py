"""Rows of a quantised table as float32, bit for bit equal to ggml's ``dequantize_row_*``.

A row is a sequence of blocks, each with its scales (float16) and packed integers. Layouts: ggml project,
``ggml-common.h``; arithmetic: ``ggml-quants.c``, float32 in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def dequantise(rows: np.ndarray, type: str) -> np.ndarray:
    """Values of quantised rows.

    Args:
        rows: uint8 [N, bytes of a row], contiguous.
        type: ggml's name, one of ``ROW_TYPES``.

    Returns:
        float32 [N, values of a row].

    Raises:
        ValueError: another type, or rows that are not a whole number of blocks.
    """
    if type not in _FORMATS:
        raise ValueError(f"rows of type {type!r} cannot be read: use one of {', '.join(ROW_TYPES)}")
    block_values, block_bytes, unpack = _FORMATS[type]
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] % block_bytes:
        raise ValueError(
            f"{type} rows are uint8 [N, multiple of {block_bytes}], not {rows.dtype} {list(rows.shape)}"
        )
    num_blocks = rows.shape[1] // block_bytes
    values = unpack(np.ascontiguousarray(rows).reshape(-1, block_bytes))
    return values.reshape(len(rows), num_blocks * block_values)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte offset of every block: float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
    """Low halves of ``run`` bytes, then their high halves, run after run: uint8 [n, 2 · bytes]."""
    runs = packed.reshape(len(packed), packed.shape[1] // run, 1, run) >> np.array([[0], [4]], np.uint8)
    return (runs & 0x0F).reshape(len(packed), 2 * packed.shape[1])


def _bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The bytes' lowest ``width`` bits, then the next, ``count`` times: uint8 [n, count, bytes]."""
    shifts = np.arange(count, dtype=np.uint8)[:, None] * np.uint8(width)
    return (packed[:, None] >> shifts) & np.uint8((1 << width) - 1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """32 single bits from byte ``start``, in order, as 0 or 16: uint8 [n, 32]."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:], 16).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:], 16) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)
    return (values.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4)
    return values * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima of a K block, times their float16: float32 [n, 8, 1] each."""
    low, high, rest = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 0x3F, (rest & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minima = np.concatenate([high & 0x3F, (rest >> 4) | ((high >> 2) & 0x30)], axis=1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * minima)[..., None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks)
    return scales * _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32) - minima


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32)
    return scales * (low | _bits(blocks[:, 16:48], 1, 8) << np.uint8(4)) - minima


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Two halves of 128 values: low nibbles of 64 bytes, two more bits each from 32 others."""
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 32), 2, 4).reshape(-1, 2, 4, 32)
    values = (low | high << np.uint8(4)).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return scales[..., None] * values.reshape(-1, 16, 16)


# type → (values of a block, bytes of a block, how blocks are unpacked)
_FORMATS: dict[str, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": (1, 4, lambda blocks: blocks.view("<f4")),
    "F16": (1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    "BF16": (1, 2, lambda blocks: (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)),
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
ROW_TYPES = tuple(_FORMATS)
BLOCKS = {name: (values, size) for name, (values, size, _) in _FORMATS.items()}  # values and bytes of a block

"""The language model's input: rows of its quantised embedding table and injected rows in one batch."""

from __future__ import annotations

import numpy as np

from .choice import implementation
from .dequantise import BLOCKS
from .types import aligned, check_host

INJECTED = -1  # stands for an injected row among token ids


def pack_prompt(
    table: np.ndarray,
    type: str,
    token_ids: np.ndarray,
    injected: np.ndarray | None = None,
    *,
    out: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Make one batch of embeddings for llama.cpp, which takes either tokens or embeddings in one batch.

    Args:
        table: uint8 [vocab, bytes of a row]: the GGUF's token-embedding tensor as it lies in the file. It may
            be a memory map: only the requested rows are read.
        type: its ggml type, one of ``dequantise.ROW_TYPES``.
        token_ids: int32 [L]; -1 (``INJECTED``) stands for the next injected row.
        injected: float32 [K, D], K the number of -1 among the ids.
        out: C-contiguous float32 [L, D] to write to.
        threads: at most this many CPU threads work on it.

    Returns:
        float32 [L, D].

    Raises:
        ValueError: an unknown type, a row that is not a whole number of blocks, an id outside the table, or
            injected rows that do not fit.
    """
    check_host("pack_prompt", table, *(each for each in (injected, out) if each is not None))
    if type not in BLOCKS:
        raise ValueError(f"embedding tables of type {type} are not known: use one of {', '.join(BLOCKS)}")
    values, block_bytes = BLOCKS[type]
    if table.ndim != 2 or table.dtype != np.uint8 or table.shape[1] % block_bytes or 0 in table.shape:
        raise ValueError(
            f"a {type} table is uint8 [vocab, n * {block_bytes}], not {table.dtype} {list(table.shape)}"
        )
    if not table.flags.c_contiguous:
        raise ValueError("the embedding table must be C-contiguous: map it as it lies in the file")
    width = table.shape[1] // block_bytes * values
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise ValueError(f"token ids are integers [L], not {token_ids.dtype} {list(token_ids.shape)}")
    if len(token_ids) and not (token_ids.min() >= INJECTED and token_ids.max() < len(table)):
        raise ValueError(f"a token id lies outside the table of {len(table)} rows: re-run agpt export")
    injected = np.empty((0, width), np.float32) if injected is None else injected
    count = int((token_ids == INJECTED).sum())
    if injected.shape != (count, width) or injected.dtype != np.float32:
        raise ValueError(
            f"injected rows must be float32 {[count, width]}, not {injected.dtype} {list(injected.shape)}"
        )
    shape = (len(token_ids), width)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.carray:
        raise ValueError(
            f"out must be C-contiguous, writable float32 {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    ids = aligned(token_ids.astype(np.int32, copy=False))
    rows = aligned(injected)
    implementation().pack_prompt(table, type, ids, rows, out, threads)
    return out

"""One llama.cpp model with one context, through llama-cpp-python's low-level functions.

Only what judging needs: tokens and text, embeddings or a token in, logits out, the cache cut back. Everything
that knows about prompts and answers is in ``language.py``. Not thread-safe: one session, one thread.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from .errors import BundleError

ERROR_LEVEL = 4  # ggml_log_level
_last_error = ""


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _user_data: int) -> None:
    """llama.cpp writes pages to stderr; only the last error is worth keeping."""
    global _last_error
    if level == ERROR_LEVEL:
        _last_error = text.decode("utf-8", "replace").strip()


class LlamaSession:
    """Prefill with embeddings, continue with tokens, all in sequence 0."""

    def __init__(self, path: Path, num_context: int, width: int) -> None:
        """
        Args:
            path: a GGUF file that passed ``gguf_header``.
            num_context: positions that the cache holds; also the most that one prefill takes.
            width: the model's embedding width D.

        Raises:
            BundleError: llama.cpp refuses the file.
        """
        llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise BundleError(f"llama.cpp cannot load {path} ({_last_error}): re-run agpt export")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = num_context
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise BundleError(f"llama.cpp cannot make a context for {path} ({_last_error}): free some memory")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.num_context = num_context
        self._embeddings = llama_cpp.llama_batch_init(num_context, width, 1)
        self._token = llama_cpp.llama_batch_init(1, 0, 1)
        self._rows = np.ctypeslib.as_array(self._embeddings.embd, (num_context, width))
        self._positions = np.ctypeslib.as_array(self._embeddings.pos, (num_context,))
        self._wanted = np.ctypeslib.as_array(self._embeddings.logits, (num_context,))
        self._wanted[:] = 0
        for batch, size in ((self._embeddings, num_context), (self._token, 1)):
            for i in range(size):
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
        self._token.n_tokens = 1
        self._token.logits[0] = 1

    def close(self) -> None:
        """Free the native memory; the session cannot be used afterwards."""
        if self.context:
            llama_cpp.llama_batch_free(self._embeddings)
            llama_cpp.llama_batch_free(self._token)
            llama_cpp.llama_free(self.context)
            llama_cpp.llama_model_free(self.model)
            self.context = self.model = None

    def tokenise(self, text: str) -> list[int]:
        """Ids of a piece of text on its own: no BOS, and special tokens typed in it stay plain text."""
        data = text.encode()
        size = len(data) + 8
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, size, False, False)
        return list(ids[:count])

    def text(self, token_ids: list[int]) -> str:
        """What ids say, without special tokens and without the leading space."""
        ids = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        size = 64 * (len(token_ids) + 1)
        buffer = ctypes.create_string_buffer(size)
        count = llama_cpp.llama_detokenize(self.vocab, ids, len(token_ids), buffer, size, False, False)
        if count < 0:  # a vocabulary with very long pieces
            buffer = ctypes.create_string_buffer(-count)
            count = llama_cpp.llama_detokenize(self.vocab, ids, len(token_ids), buffer, -count, False, False)
        return buffer.raw[:count].decode("utf-8", "replace")

    def find_piece(self, piece: str) -> int | None:
        """Id of the token that is spelt exactly so."""
        wanted = piece.encode()
        for token in range(self.num_vocab):
            if llama_cpp.llama_vocab_get_text(self.vocab, token) == wanted:
                return token
        return None

    def prefill(self, rows: list[np.ndarray], start: int) -> int:
        """Append embeddings at position ``start`` as one batch; what was cached from there on is forgotten.

        Args:
            rows: float32 [n, D] each.
            start: positions to keep.

        Returns:
            The position after the last row; ``logits`` are that row's.
        """
        llama_cpp.llama_memory_seq_rm(self.memory, 0, start, -1)
        count = sum(map(len, rows))
        np.concatenate(rows, out=self._rows[:count])
        self._positions[:count] = np.arange(start, start + count)
        self._wanted[count - 1] = 1
        self._embeddings.n_tokens = count
        try:
            self._decode(self._embeddings)
        finally:
            self._wanted[count - 1] = 0
        return start + count

    def step(self, token: int, position: int) -> None:
        """Append one token."""
        self._token.token[0] = token
        self._token.pos[0] = position
        self._decode(self._token)

    def logits(self) -> np.ndarray:
        """Logits after the last position: float32 [vocab], a view that the next call overwrites."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.num_vocab,))

    def set_threads(self, threads: int) -> None:
        """CPU threads of every later pass."""
        llama_cpp.llama_set_n_threads(self.context, threads, threads)

    def _decode(self, batch: llama_cpp.llama_batch) -> None:
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status} ({_last_error})")

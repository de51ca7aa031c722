"""One llama.cpp model with one context, through llama-cpp-python's low-level functions.

It tokenises text, turns rows of embeddings into logits, and edits the key-value cache. Prompts and answers are handled
in ``model.py``. Not thread-safe: use a session from one thread at a time.

A cached position belongs to one or several sequences, and a row attends to the earlier positions of its first
sequence. Branches that continue the same text share its positions, so one pass can compute a whole tree. llama.cpp ends
the process when a size is wrong (GGML_ASSERT), so every size is checked here first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from ..common.errors import BundleError
from ..common.lifetime import Lifetime

ERROR_LEVEL = 4  # ggml_log_level
MAX_SEQUENCES = 64  # llama.cpp allows 256
MAX_OUTPUTS = 256  # rows of a pass with logits; memory is reserved, 1 MB for eight rows of LLaMA's vocabulary
_last_error = ""


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _user_data: int) -> None:
    """Keep llama.cpp's last error for messages, instead of its long log on stderr."""
    global _last_error
    if level == ERROR_LEVEL:
        _last_error = text.decode("utf-8", "replace").strip()


class LlamaSession:
    """Computes logits from rows of embeddings; the cache holds several sequences in one pool of positions.

    Attributes:
        num_vocab: size of the vocabulary.
        num_context: positions of the cache, all sequences together.
        num_sequences: sequences of the cache.
        max_outputs: the most rows of a pass whose logits can be requested.
    """

    def __init__(self, path: Path, num_context: int, width: int, num_sequences: int = 1) -> None:
        """
        Args:
            path: a GGUF file that ``gguf_header`` has checked.
            num_context: positions of the cache, all sequences together; also the most rows of a pass.
            width: the model's embedding width D.
            num_sequences: number of sequences, at most ``MAX_SEQUENCES``.

        Raises:
            BundleError: llama.cpp cannot load the file or has too little memory for the context.
        """
        llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p())
        model_params = llama_cpp.llama_model_default_params()
        # llama.cpp would keep a second copy of the weights in another memory layout. Without it, the layers of the 7B
        # model in q4_k_m take 0.7 of the time for a prompt with drafts (58 rows), and the weights are in memory only
        # once. Only q4_0 gains from the copy, and it is slower all the same.
        model_params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise BundleError(f"llama.cpp cannot load {path} ({_last_error}): re-run agpt export")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = num_context
        params.n_seq_max, params.kv_unified = num_sequences, True
        params.n_outputs_max = self.max_outputs = min(num_context, MAX_OUTPUTS)
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            llama_cpp.llama_model_free(self.model)
            raise BundleError(f"llama.cpp cannot make a context for {path} ({_last_error}): free some memory")
        self._lifetime = Lifetime("the language model")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.num_context = num_context
        self.num_sequences = num_sequences
        self._make_batch(num_context, width)

    def _make_batch(self, size: int, width: int) -> None:
        """A ``llama_batch`` whose arrays are NumPy's; the sequences of a row are a range of consecutive numbers."""
        self._rows = np.zeros((size, width), np.float32)
        self._positions = np.zeros(size, np.int32)
        self._num_sequences_of = np.ones(size, np.int32)
        self._all_sequences = np.arange(self.num_sequences, dtype=np.int32)
        self._sequences_of = np.zeros(size, np.uintp)
        self._wanted = np.zeros(size, np.int8)
        self._batch = llama_cpp.llama_batch(
            embd=self._rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos)),
            n_seq_id=self._num_sequences_of.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequences_of.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id))),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def close(self) -> None:
        """Free the native memory; the session cannot be used afterwards."""
        if self._lifetime.end():
            llama_cpp.llama_free(self.context)
            llama_cpp.llama_model_free(self.model)
            self.context = self.model = self.vocab = self.memory = None

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a text, without BOS. The spelling of a special token in the text stays plain text."""
        self._lifetime.check()
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, size, False, False)
        return list(ids[:count])

    def text(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens and without the leading space."""
        self._lifetime.check()
        ids = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        size = 64 * (len(token_ids) + 1)
        buffer = ctypes.create_string_buffer(size)
        count = llama_cpp.llama_detokenize(self.vocab, ids, len(token_ids), buffer, size, False, False)
        if count < 0:  # a vocabulary with very long pieces
            buffer = ctypes.create_string_buffer(-count)
            count = llama_cpp.llama_detokenize(self.vocab, ids, len(token_ids), buffer, -count, False, False)
        return buffer.raw[:count].decode("utf-8", "replace")

    def find_piece(self, piece: str) -> int | None:
        """Id of the token that is spelt exactly as ``piece``; None if there is none."""
        self._lifetime.check()
        wanted = piece.encode()
        for token in range(self.num_vocab):
            if llama_cpp.llama_vocab_get_text(self.vocab, token) == wanted:
                return token
        return None

    def decode(
        self,
        rows: Sequence[np.ndarray],
        positions: np.ndarray,
        first_sequence: np.ndarray | int,
        num_sequences: np.ndarray | int,
        wanted: np.ndarray,
    ) -> np.ndarray:
        """One pass of the model.

        Args:
            rows: arrays float32 [n, D], n_total rows in all.
            positions: int [n_total], each the next free position of the row's sequences.
            first_sequence: int [n_total], or one number for all rows: a row belongs to the sequences
                ``first_sequence … first_sequence + num_sequences - 1``.
            num_sequences: int [n_total], or one number for all rows; at least 1.
            wanted: int [num_wanted], indices of the rows whose logits are requested, ascending.

        Returns:
            float32 [num_wanted, vocab], a view that the next pass overwrites.

        Raises:
            ValueError: there are more rows, sequences or requested logits than the session allows.
            RuntimeError: llama.cpp failed.
            ClosedError: the session was closed.
        """
        self._lifetime.check()
        count = len(positions)
        last_sequence = int(np.max(np.add(first_sequence, num_sequences)))
        if count > self.num_context or last_sequence > self.num_sequences or len(wanted) > self.max_outputs:
            raise ValueError(
                f"a pass of {count} rows, {last_sequence} sequences and {len(wanted)} logits is over "
                f"{self.num_context}, {self.num_sequences} and {self.max_outputs}"
            )
        np.concatenate(rows, out=self._rows[:count])
        self._positions[:count] = positions
        self._num_sequences_of[:count] = num_sequences
        self._sequences_of[:count] = self._all_sequences.ctypes.data + 4 * np.asarray(
            first_sequence, np.uintp
        )
        self._wanted[:count] = 0
        self._wanted[wanted] = 1
        self._batch.n_tokens = count
        if status := llama_cpp.llama_decode(self.context, self._batch):
            raise RuntimeError(f"llama_decode returned {status} ({_last_error})")
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (len(wanted), self.num_vocab))

    def forget(self, start: int, sequence: int = -1) -> None:
        """Remove the positions from ``start`` on from one sequence, or from all (-1)."""
        self._lifetime.check()
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def share(self, source: int, target: int, start: int, end: int = -1) -> None:
        """Add the positions [start, end) of sequence ``source`` to sequence ``target``; no end when it is -1."""
        self._lifetime.check()
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, start, end)

    def set_threads(self, threads: int) -> None:
        """Set the number of CPU threads for all later passes."""
        self._lifetime.check()
        llama_cpp.llama_set_n_threads(self.context, threads, threads)

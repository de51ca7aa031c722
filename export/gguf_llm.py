"""The language model as GGUF: LoRA merged, rows in llama.cpp's order, tokenizer included, no chat template.

Tensors are merged and written one at a time, so that even a 13B model needs no more memory than its largest weight.
Source of the format and names: ggml's docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import sentencepiece
from torch import Tensor

from ..models.llama import Llama
from .keys import module_shapes
from .tensor_files import CheckpointError, Shape
from .vicuna import LlamaSource

FLOAT16_MAX = 65504.0
UNUSED_SCORE = -10000.0  # score that llama.cpp's converter gives to rows without a piece
POLL_SECONDS = 0.2
FULL_DISK_BYTES = 1 << 20  # with less than this free after a failed write, the disk is full

TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight$")
ROTATED = re.compile(r"\.(q_proj|k_proj)\.weight$")


@dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer that a GGUF stores: one entry per row of the embedding table."""

    pieces: list[bytes]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int


def write_gguf(
    source: LlamaSource, path: Path, name: str, advance: Callable[[str], None] = lambda tensor: None
) -> None:
    """Write the merged model in float16 (norms in float32, which llama.cpp requires).

    Args:
        source: the Vicuna folder and its LoRA.
        path: the file to write.
        name: ``general.name``.
        advance: called with each tensor's name before it is merged.

    Raises:
        CheckpointError: the tokenizer does not fit the weights, or a weight exceeds float16's range.
    """
    vocabulary = read_vocabulary(source.folder / "tokenizer.model", source.config.vocab_size)
    shapes = module_shapes(Llama, source.config)
    writer = gguf.GGUFWriter(path, "llama")
    describe_model(writer, source, name)
    describe_tokenizer(writer, vocabulary)
    for key, shape in shapes.items():
        dtype = np.dtype(stored_dtype(shape))
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(gguf_name(key), shape, dtype, num_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, shape in shapes.items():
        advance(key)
        writer.write_tensor_data(to_gguf(source.merged(key), key, source, stored_dtype(shape)))
    writer.close()


def quantise(
    source: Path,
    target: Path,
    precision: str,
    threads: int,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Quantise a float16 GGUF with llama.cpp's quantiser ("q4_k_m" …); token embeddings are stored in Q8_0.

    The runtime looks token embeddings up in the file itself. The quantiser runs for minutes without handling
    signals, so it runs in a daemon thread: an interruption ends the process at once.

    Args:
        progress: called every ``POLL_SECONDS`` with the number of bytes written.

    Raises:
        CheckpointError: the quantiser failed.
        OSError: the disk is full.
    """
    status: list[int] = []
    worker = threading.Thread(
        target=lambda: status.append(_run_quantiser(source, target, precision, threads)), daemon=True
    )
    worker.start()
    while worker.is_alive():
        worker.join(POLL_SECONDS)
        progress(target.stat().st_size if target.is_file() else 0)
    if status == [0] and target.is_file():
        return
    if shutil.disk_usage(target.parent).free < FULL_DISK_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise CheckpointError(
        f"llama.cpp could not quantise the model to {precision}: choose --llm-quant f16 or q8_0"
    )


def _run_quantiser(source: Path, target: Path, precision: str, threads: int) -> int:
    """Run llama.cpp's quantiser; its status, 0 for success."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision.upper()}")
    parameters.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    parameters.nthread = threads
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    return llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _user_data: int) -> None:
    """Discard llama.cpp's log: it reports every tensor on stderr."""


def describe_model(writer: gguf.GGUFWriter, source: LlamaSource, name: str) -> None:
    config = source.config
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def describe_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write the tokenizer without a chat template: some readers execute it, and the bundle's prompt is fixed."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_unk_token_id(vocabulary.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Open ``tokenizer.model``.

    Raises:
        CheckpointError: the file is missing, or not a sentencepiece model with BOS, EOS and unknown piece.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: copy it from the original LLaMA's folder")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: download it again") from error
    if min(tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) < 0:
        raise CheckpointError(
            f"{path} has no BOS, EOS or unknown piece: it is not LLaMA's tokenizer; copy that one"
        )
    return tokenizer


def read_vocabulary(path: Path, num_rows: int) -> Vocabulary:
    """Pieces with scores and types, padded to the embedding's rows (Vicuna v0 has one row more than pieces).

    BOS and EOS come from the tokenizer: old conversions of LLaMA have wrong ones in their JSON files.

    Raises:
        CheckpointError: the tokenizer has more pieces than the embedding has rows.
    """
    tokenizer = open_tokenizer(path)
    size = tokenizer.get_piece_size()
    if size > num_rows:
        raise CheckpointError(
            f"{path} has {size} pieces but the embedding only {num_rows} rows: tokenizer and weights belong to "
            "different models; copy both from the same one"
        )
    padding = range(size, num_rows)
    return Vocabulary(
        pieces=[tokenizer.id_to_piece(i).encode() for i in range(size)] + [b"[PAD%d]" % i for i in padding],
        scores=[tokenizer.get_score(i) for i in range(size)] + [UNUSED_SCORE for _ in padding],
        types=[token_type(tokenizer, i) for i in range(size)] + [gguf.TokenType.UNUSED for _ in padding],
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        unk_id=tokenizer.unk_id(),
    )


def token_type(tokenizer: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if tokenizer.is_unknown(token_id):
        return gguf.TokenType.UNKNOWN
    if tokenizer.is_control(token_id):
        return gguf.TokenType.CONTROL
    if tokenizer.is_unused(token_id):
        return gguf.TokenType.UNUSED
    if tokenizer.is_byte(token_id):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def gguf_name(key: str) -> str:
    """Hugging Face's key → GGUF's tensor name."""
    if match := LAYER_KEY.match(key):
        return f"blk.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    return TOP_NAMES[key]


def stored_dtype(shape: Shape) -> type[np.floating]:
    return np.float16 if len(shape) == 2 else np.float32


def to_gguf(weight: Tensor, key: str, source: LlamaSource, dtype: type[np.floating]) -> np.ndarray:
    """A merged float32 weight as it is stored in the file.

    Raises:
        CheckpointError: a value exceeds float16's range.
    """
    if ROTATED.search(key):
        weight = permute_rows(weight, source.config.num_attention_heads)
    if dtype is np.float16 and weight.abs().max() > FLOAT16_MAX:
        raise CheckpointError(
            f"{source.folder}: {key} does not fit in float16: its LoRA belongs to another model"
        )
    return weight.contiguous().numpy().astype(dtype)


def permute_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k from Hugging Face's half-split rotary order to llama.cpp's interleaved pairs.

    [out, in] → [out, in]; row (head, half, i) becomes row (head, i, half).
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

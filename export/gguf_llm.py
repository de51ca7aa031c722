"""The language model as GGUF: LoRA merged, rows in llama.cpp's order, tokenizer inside, no chat template.

Tensors are merged and written one at a time, so that a 13B model needs the memory of one weight.
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
UNUSED_SCORE = -10000.0  # as llama.cpp's converter scores rows without a piece
POLL_SECONDS = 0.2
FULL_DISK_BYTES = 1 << 20  # less than that is left where a tensor did not fit

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
    """What a GGUF stores of a tokenizer, one entry a row of the embedding table."""

    pieces: list[bytes]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int


def write_gguf(
    source: LlamaSource, path: Path, name: str, advance: Callable[[str], None] = lambda tensor: None
) -> None:
    """Write the merged model in float16 (norms in float32, as llama.cpp wants them).

    Args:
        source: the Vicuna folder and its LoRA.
        path: the file to write.
        name: ``general.name``.
        advance: called with each tensor's name before it is merged.

    Raises:
        CheckpointError: a tokenizer that does not fit, or a weight beyond float16's range.
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
    """Quantise a float16 GGUF with llama.cpp's own quantiser ("q4_k_m" …); token embeddings stay in Q8_0.

    The runtime looks token embeddings up in the file itself. The quantiser works minutes without a look at signals,
    so it has a thread of its own, which ends with the process: an interruption is heard at once.

    Args:
        progress: called now and then with the bytes that are written.

    Raises:
        CheckpointError: the quantiser refused.
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
    """llama.cpp's status, 0 for success."""
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
    """llama.cpp reports every tensor on stderr."""


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
    """No chat template: it is a program that some readers run, and the bundle's prompt is fixed anyway."""
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
        CheckpointError: missing, or not a sentencepiece model with BOS and EOS.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: copy it from the original LLaMA's folder")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: download it again") from error
    if min(tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) < 0:
        raise CheckpointError(f"{path} has no BOS, EOS or unknown piece: it is not LLaMA's tokenizer")
    return tokenizer


def read_vocabulary(path: Path, num_rows: int) -> Vocabulary:
    """Pieces with scores and types, padded to the embedding's rows (Vicuna v0 has one row more than pieces).

    BOS and EOS come from the tokenizer: old conversions of LLaMA carry wrong ones in their JSON files.
    """
    tokenizer = open_tokenizer(path)
    size = tokenizer.get_piece_size()
    if size > num_rows:
        raise CheckpointError(
            f"{path} has {size} pieces but the embedding only {num_rows} rows: tokenizer and weights are of "
            "different models"
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
    """A merged float32 weight as it lies in the file."""
    if ROTATED.search(key):
        weight = permute_rows(weight, source.config.num_attention_heads)
    if dtype is np.float16 and weight.abs().max() > FLOAT16_MAX:
        raise CheckpointError(f"{source.folder}: {key} does not fit in float16: its LoRA is of another model")
    return weight.contiguous().numpy().astype(dtype)


def permute_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k from Hugging Face's half-split rotary order to llama.cpp's interleaved pairs.

    [out, in] → [out, in]; row (head, half, i) becomes row (head, i, half).
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

"""Writes a quantised GGUF of a language model with LLaMA-7B's dimensions and random weights, within seconds.

    python -m tools.random_gguf OUT.gguf [--layers 2] [--vocabulary 32000] [--kind q4_k_m]

Every block contains random bits and one scale, so that the weights have the standard deviation of a trained model. The
model performs the operations of a trained model of these dimensions, with the same speed and memory. It generates one
fixed answer, as long as the original's "Yes, there is an anomaly …", with a trained model's confidence: the layers
change the residual stream little, so the last token's embedding reaches the output layer, where the row of each token
of the answer is the embedding of the token before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

from anomalygpt_edge.export.gguf_llm import describe_tokenizer, open_tokenizer, read_vocabulary
from anomalygpt_edge.kernels.dequantise import dequantise
from anomalygpt_edge.models import prompts

from .random_checkpoints import TOKENIZER

WIDTH, MLP_WIDTH, HEADS, CONTEXT = 4096, 11008, 32, 2048
WEIGHT_STD = 0.015
QUIET = ("attn_output", "ffn_down")  # the matrices whose outputs a layer adds to the residual stream
ANSWER = prompts.answer(["center"])
MATRICES = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (MLP_WIDTH, WIDTH), "ffn_up": (MLP_WIDTH, WIDTH), "ffn_down": (WIDTH, MLP_WIDTH),
}  # fmt: skip
Q4_K_STD = 8 * 4.61  # of (q - 7.5) · 8, q uniform in 0..15
Q6_K_STD = 18.5  # of q - 32, q uniform in 0..63, times a scale of 1
# The matrices that llama.cpp's mixture stores with higher precision.
FINER = {"q4_k_m": ("attn_v", "ffn_down")}


def write_random_gguf(
    path: Path, layers: int, vocabulary: int = 32000, kind: str = "q4_k_m", seed: int = 0, forced: bool = True
) -> None:
    """Write the model; ``kind`` is q4_k_m or f16. With ``forced`` False there is no fixed answer: the output (nonsense)
    depends on the prompt."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP_WIDTH)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_tokenizer(writer, read_vocabulary(TOKENIZER, vocabulary))

    def matrix(name: str, shape: tuple[int, int], fine: bool, std: float) -> None:
        if kind == "f16":
            writer.add_tensor(name, (rng.standard_normal(shape, np.float32) * std).astype(np.float16))
            return
        make, qtype = (q6_k, "Q6_K") if fine else (q4_k, "Q4_K")
        writer.add_tensor(name, make(rng, shape, std), raw_dtype=gguf.GGMLQuantizationType[qtype])

    embeddings = q4_k(rng, (vocabulary, WIDTH), 1.0)
    outputs = output_rows(rng, vocabulary, embeddings, forced)
    if kind == "f16":  # for llama.cpp's quantiser, which does not accept quantised tensors
        writer.add_tensor("token_embd.weight", dequantise(embeddings, "Q4_K").astype(np.float16))
        writer.add_tensor("output.weight", dequantise(outputs, "Q8_0").astype(np.float16))
    else:
        writer.add_tensor("token_embd.weight", embeddings, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.add_tensor("output.weight", outputs, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for layer in range(layers):
        for name, shape in MATRICES.items():
            fine = name in FINER.get(kind, ()) and (layer < layers // 8 or layer % 3 == 2)
            std = WEIGHT_STD / 50 if name in QUIET else WEIGHT_STD
            std = std if forced else 4 * WEIGHT_STD
            matrix(f"blk.{layer}.{name}.weight", shape, fine, std)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def output_rows(
    rng: np.random.Generator, vocabulary: int, embeddings: np.ndarray, forced: bool = True
) -> np.ndarray:
    """The output layer's rows as Q8_0: random, except those of the answer's tokens when ``forced``."""
    rows = rng.integers(0, 256, (vocabulary, WIDTH // 32, 34), np.uint8)
    rows[..., :2] = np.full(1, WEIGHT_STD / 74, "<f2").view(np.uint8)  # of -128..127, uniform
    rows = rows.reshape(vocabulary, -1)
    if not forced:
        return rows
    tokenizer = open_tokenizer(TOKENIZER)
    chain = tokenizer.encode(prompts.DEFAULT_QUESTION + prompts.PIECE_ASSISTANT)[-1:]
    for token in tokenizer.encode(ANSWER + prompts.STOP_STRING)[:-1]:
        while token in chain:  # a token has one successor only: replace a repeated token by another one
            token -= 1
        rows[token] = gguf.quants.quantize(
            dequantise(embeddings[chain[-1:]], "Q4_K") / WIDTH**0.5, gguf.GGMLQuantizationType.Q8_0
        )
        chain.append(token)
    return rows


def q4_k(rng: np.random.Generator, shape: tuple[int, int], std: float) -> np.ndarray:
    """Blocks of 256 random nibbles; scales of 8 and minima of 60 = 8 · 7.5, packed in 6 bits, make the mean zero."""
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), np.uint8)
    blocks[..., :4] = np.full(2, std / Q4_K_STD, "<f2").view(np.uint8)
    blocks[..., 4:16] = np.repeat(np.array([8, 60 | 0xC0, 8 | 12 << 4], np.uint8), 4)
    return blocks.reshape(rows, -1)


def q6_k(rng: np.random.Generator, shape: tuple[int, int], std: float) -> np.ndarray:
    """Blocks of 256 random 6-bit values with scales of 1."""
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows, columns // 256, 210), np.uint8)
    blocks[..., 192:208] = 1
    blocks[..., 208:] = np.full(1, std / Q6_K_STD, "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--kind", choices=("q4_k_m", "f16"), default="q4_k_m")
    options = parser.parse_args()
    write_random_gguf(options.out, options.layers, options.vocabulary, options.kind)


if __name__ == "__main__":
    main()

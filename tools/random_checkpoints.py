"""Writes checkpoints with random weights in the formats of AnomalyGPT's checkpoints, identical on every machine.

    python -m tools.random_checkpoints --seed 11 --out DIR [--layers 2] [--tiny]
    python -m tools.random_checkpoints --size 13b --layers 40 --distinct-layers 4 --pieces 32000 --out DIR

Full size has the original's dimensions except for the language model's layers and vocabulary: 5.5 GB. The weights are
not trained; their scales keep activations in a normal range, so that an error in any stage changes the results. The
second line writes a 13B model, each of whose shards stores the weights of four layers under the names of twenty: 26 GB
when read, 6 GB on disk.

A tensor depends only on the seed, its name and its shape: Philox4x64-10 keyed with (seed, crc32 of the name) gives
64-bit words; a word's four 16-bit fields, summed and centred, are an integer z of standard deviation ``SIGMA``,
nearly normal; the value is float32(z) · float32(std / SIGMA) + float32(mean). Only integer operations and single,
correctly rounded operations are used, so a value is the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

SIGMA = math.sqrt(4 * (2.0**32 - 1) / 12)  # standard deviation of a sum of four uniform 16-bit integers
CENTRE = 4 * (2**16 - 1) // 2
CHUNK_WORDS = 1 << 20
TOKENIZER = Path(__file__).parent.parent / "tests" / "golden" / "tokenizer_v2400.model"
MANIFEST = "manifest.json"
STOP_ID = 2277  # the original's stop token; its output row is scaled up so that random weights generate it
STOP_SCALE = 2.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Tower:
    """One of ImageBind's transformers; the hidden width of its MLP is four times its own."""

    width: int
    depth: int
    stds: tuple[float, float, float, float] = (0.02, 0.02, 0.02, 0.02)  # in_proj, out_proj, fc1, fc2
    bias_kv: bool = False  # an extra key and value, as ImageBind's smaller towers have


@dataclass(frozen=True)
class Sizes:
    """All dimensions. The defaults are the original's, except that the language model has two layers."""

    vision: Tower = Tower(1280, 32, (0.04, 0.01, 0.02, 0.02))
    text: Tower = Tower(1024, 24, (0.08, 0.06, 0.02, 0.02))
    audio: Tower = Tower(768, 12, bias_kv=True)
    depth: Tower = Tower(384, 12, bias_kv=True)
    thermal: Tower = Tower(768, 12, bias_kv=True)
    imu: Tower = Tower(512, 6, bias_kv=True)
    embed_dim: int = 1024
    grid: int = 16
    patch: int = 14
    text_vocab: int = 49408
    text_context: int = 77
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    layers: int = 2
    rank: int = 32
    channels: tuple[int, ...] = (4, 16, 64, 256, 1024)


TINY = Sizes(
    vision=Tower(64, 32, (0.04, 0.01, 0.02, 0.02)),
    text=Tower(32, 2, (0.08, 0.06, 0.02, 0.02)),
    audio=Tower(16, 1, bias_kv=True),
    depth=Tower(16, 1, bias_kv=True),
    thermal=Tower(16, 1, bias_kv=True),
    imu=Tower(16, 1, bias_kv=True),
    embed_dim=32,
    hidden=128,
    intermediate=192,
    heads=4,
    rank=8,
    channels=(4, 8, 8, 16, 16),
)

LLM_SIZES = {"7b": Sizes(), "13b": Sizes(hidden=5120, intermediate=13824, heads=40)}


@dataclass(frozen=True)
class Spec:
    """One tensor: random with ``std`` and ``mean``, or ``value`` unchanged."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.02
    mean: float = 0.0
    value: Tensor | None = None


@dataclass(frozen=True)
class Files:
    """The paths of a set of checkpoints; the fields are named as the options of ``agpt export``."""

    imagebind: Path
    vicuna: Path
    pandagpt: Path
    anomalygpt: Path

    @classmethod
    def below(cls, folder: Path) -> Files:
        return cls(
            folder / "imagebind_ckpt" / "imagebind_huge.pth",
            folder / "vicuna_ckpt" / "7b_v0",
            folder / "pandagpt_ckpt" / "7b" / "pytorch_model.pt",
            folder / "anomalygpt_ckpt" / "train_supervised" / "pytorch_model.pt",
        )


# -- numbers -------------------------------------------------------------------------------------------------


def draw(seed: int, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
    """The random float32 tensor for a seed and a full name."""
    key = np.array([seed % 2**64, zlib.crc32(name.encode())], np.uint64)
    words = np.random.Philox(key=key)
    values = np.empty(math.prod(shape), np.float32)
    scale, shift = np.float32(std / SIGMA), np.float32(mean)
    for start in range(0, len(values), CHUNK_WORDS):
        part = values[start : start + CHUNK_WORDS]
        fields = words.random_raw(len(part)).astype("<u8", copy=False).view("<u2").reshape(-1, 4)
        total = fields[:, 0].astype(np.int32)
        for column in range(1, 4):
            total += fields[:, column]
        np.multiply((total - CENTRE).astype(np.float32), scale, out=part)
        if mean:
            part += shift
    return torch.from_numpy(values.reshape(shape))


def crc32(tensor: Tensor) -> str:
    """CRC-32 of the tensor's bytes in memory, as eight hexadecimal digits."""
    flat = tensor.detach().contiguous().reshape(-1)
    return f"{zlib.crc32(flat.view(torch.uint8).numpy().data):08x}"


# -- tensors of each checkpoint --------------------------------------------------------------------------------


def imagebind_specs(sizes: Sizes) -> Iterator[Spec]:
    """ImageBind's complete state dict in its own order, as strict loading requires every modality."""
    towers = {name: getattr(sizes, name) for name in ("vision", "text", "audio", "depth", "thermal", "imu")}
    yield from preprocessor_specs(sizes)
    for name, tower in towers.items():
        if name == "vision":
            yield from norm("modality_trunks.vision.pre_transformer_layer.0", tower.width)
        yield from trunk_specs(f"modality_trunks.{name}.blocks", tower)
    for name, tower in towers.items():
        text, last = name == "text", {"text": 1, "imu": 3}.get(name, 2)
        head = f"modality_heads.{name}." + ("proj." if text else "")
        yield from norm(f"{head}0", tower.width)
        yield Spec(f"{head}{last}.weight", (sizes.embed_dim, tower.width))
    scale = "modality_postprocessors.{}.1.log_logit_scale"
    yield Spec(scale.format("text"), (), 0.01, math.log(100.0) - 0.05)
    for name, value in (("audio", 20.0), ("depth", 5.0), ("thermal", 10.0), ("imu", 5.0)):
        yield Spec(scale.format(name), (), value=torch.tensor(np.float32(math.log(value))))


def preprocessor_specs(sizes: Sizes) -> Iterator[Spec]:
    vision, text = "modality_preprocessors.vision.", "modality_preprocessors.text."
    width, patch, context = sizes.vision.width, sizes.patch, sizes.text_context
    yield Spec(f"{vision}cls_token", (1, 1, width), 0.30)
    yield Spec(f"{vision}rgbt_stem.proj.1.weight", (width, 3, 2, patch, patch), 0.05)
    yield Spec(f"{vision}pos_embedding_helper.pos_embed", (1, sizes.grid**2 + 1, width), 0.10)
    mask = torch.full((context, context), -math.inf).triu(1)
    yield Spec(f"{text}pos_embed", (1, context, sizes.text.width), 0.02)
    yield Spec(f"{text}mask", (context, context), value=mask)
    yield Spec(f"{text}token_embedding.weight", (sizes.text_vocab, sizes.text.width), 0.10)
    for name, stem, positions in (("audio", "rgbt", 229), ("depth", "depth", 197), ("thermal", "rgbt", 197)):
        prefix, width = f"modality_preprocessors.{name}.", getattr(sizes, name).width
        yield Spec(f"{prefix}cls_token", (1, 1, width))
        yield Spec(f"{prefix}{stem}_stem.proj.weight", (width, 1, 16, 16))
        yield from norm(f"{prefix}{stem}_stem.norm_layer", width)
        yield Spec(f"{prefix}pos_embedding_helper.pos_embed", (1, positions, width))
    prefix, width = "modality_preprocessors.imu.", sizes.imu.width
    yield Spec(f"{prefix}pos_embed", (1, 251, width))
    yield Spec(f"{prefix}cls_token", (1, 1, width))
    yield Spec(f"{prefix}imu_stem.proj.weight", (width, 48))
    yield from norm(f"{prefix}imu_stem.norm_layer", width)


def trunk_specs(prefix: str, tower: Tower) -> Iterator[Spec]:
    width, hidden = tower.width, 4 * tower.width
    in_proj, out_proj, fc1, fc2 = tower.stds
    for index in range(tower.depth):
        block = f"{prefix}.{index}."
        yield Spec(f"{block}attn.in_proj_weight", (3 * width, width), in_proj)
        yield Spec(f"{block}attn.in_proj_bias", (3 * width,))
        if tower.bias_kv:
            yield Spec(f"{block}attn.bias_k", (1, 1, width))
            yield Spec(f"{block}attn.bias_v", (1, 1, width))
        yield Spec(f"{block}attn.out_proj.weight", (width, width), out_proj)
        yield Spec(f"{block}attn.out_proj.bias", (width,))
        yield from norm(f"{block}norm_1", width)
        yield Spec(f"{block}mlp.fc1.weight", (hidden, width), fc1)
        yield Spec(f"{block}mlp.fc1.bias", (hidden,))
        yield Spec(f"{block}mlp.fc2.weight", (width, hidden), fc2)
        yield Spec(f"{block}mlp.fc2.bias", (width,))
        yield from norm(f"{block}norm_2", width)


def norm(prefix: str, width: int) -> Iterator[Spec]:
    """The weight and bias of a LayerNorm."""
    yield Spec(f"{prefix}.weight", (width,), 0.10, 1.0)
    yield Spec(f"{prefix}.bias", (width,), 0.05)


def llama_specs(sizes: Sizes, vocab_size: int) -> Iterator[Spec]:
    """The language model's tensors in Hugging Face's names and order, with the rotary buffer of old conversions."""
    hidden, wide = sizes.hidden, sizes.intermediate
    head_dim = hidden // sizes.heads
    frequencies = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    yield Spec("model.embed_tokens.weight", (vocab_size, hidden), 0.05)
    for index in range(sizes.layers):
        layer = f"model.layers.{index}."
        for projection, std in zip(PROJECTIONS, (0.020, 0.020, 0.015, 0.020), strict=True):
            yield Spec(f"{layer}self_attn.{projection}.weight", (hidden, hidden), std)
        yield Spec(f"{layer}self_attn.rotary_emb.inv_freq", (head_dim // 2,), value=frequencies)
        yield Spec(f"{layer}mlp.gate_proj.weight", (wide, hidden), 0.015)
        yield Spec(f"{layer}mlp.down_proj.weight", (hidden, wide), 0.010)
        yield Spec(f"{layer}mlp.up_proj.weight", (wide, hidden), 0.015)
        yield Spec(f"{layer}input_layernorm.weight", (hidden,), 0.10, 1.0)
        yield Spec(f"{layer}post_attention_layernorm.weight", (hidden,), 0.10, 1.0)
    yield Spec("model.norm.weight", (hidden,), 0.10, 1.0)
    yield Spec("lm_head.weight", (vocab_size, hidden), 0.03)


def pandagpt_specs(sizes: Sizes) -> Iterator[Spec]:
    """The LoRA matrices of every layer under the names of peft 0.3, then the projection."""
    hidden, rank = sizes.hidden, sizes.rank
    for index in range(sizes.layers):
        for projection in PROJECTIONS:
            prefix = f"llama_model.base_model.model.model.layers.{index}.self_attn.{projection}."
            yield Spec(f"{prefix}lora_A.default.weight", (rank, hidden), 0.016)
            yield Spec(f"{prefix}lora_B.default.weight", (hidden, rank), 0.040)
    yield Spec("llama_proj.weight", (hidden, sizes.embed_dim), 0.05)
    yield Spec("llama_proj.bias", (hidden,))


def anomalygpt_specs(sizes: Sizes) -> Iterator[Spec]:
    """The tensors of the image decoder and the prompt learner."""
    for index in range(4):
        yield Spec(f"image_decoder.fc.{index}.weight", (sizes.embed_dim, sizes.vision.width), 0.03)
        yield Spec(f"image_decoder.fc.{index}.bias", (sizes.embed_dim,))
    yield Spec("prompt_learner.base_prompts", (9, sizes.hidden), 1.0)
    channels = (1, *sizes.channels, sizes.hidden)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        side = 5 if index == len(sizes.channels) else 3
        gain = 1.5 if index < 2 else 1.0
        std = math.sqrt(2.0 / (inputs * side * side)) * gain
        yield Spec(f"prompt_learner.meta_net.{3 * index}.weight", (outputs, inputs, side, side), std)
        yield Spec(f"prompt_learner.meta_net.{3 * index}.bias", (outputs,), 0.05)


# -- files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Generates tensors and collects their checksums."""

    seed: int
    checksums: dict[str, str]

    def tensor(self, role: str, spec: Spec, dtype: torch.dtype) -> Tensor:
        """One tensor of a checkpoint, rounded to its dtype; given values are not changed."""
        if spec.value is not None:
            tensor = spec.value
        else:
            drawn = draw(self.seed, f"{role}.{spec.name}", spec.shape, spec.std, spec.mean)
            if spec.name == "lm_head.weight" and spec.shape[0] > STOP_ID:
                drawn[STOP_ID] *= STOP_SCALE
            tensor = drawn.to(dtype)
        self.checksums[f"{'vicuna' if role == 'llama' else role}/{spec.name}"] = crc32(tensor)
        return tensor


def write_checkpoints(
    seed: int,
    folder: Path,
    sizes: Sizes | None = None,
    tokenizer: Path = TOKENIZER,
    num_pieces: int | None = None,
    distinct_layers: int | None = None,
) -> Files:
    """Write a complete set below ``folder``; a complete set with the same arguments is kept.

    Args:
        seed: the seed of the weights.
        folder: ``manifest.json``, with every tensor's crc32, is written to it last and marks the set as complete.
        sizes: the original's when None.
        tokenizer: sentencepiece model; the embedding has one more row ("[PAD]"), as in Vicuna v0.
        num_pieces: extend the tokenizer to this many pieces with unused ones; None: leave it unchanged.
        distinct_layers: number of the language model's layers with weights of their own in a shard; the others are
            the same weights under other names. None: all.
    """
    sizes = sizes or Sizes()
    files = Files.below(folder)
    described: dict[str, object] = {"seed": seed, "sizes": repr(sizes)}
    chosen = {"num_pieces": num_pieces, "distinct_layers": distinct_layers}
    described |= {name: value for name, value in chosen.items() if value is not None}
    if (folder / MANIFEST).is_file():
        found = json.loads((folder / MANIFEST).read_text())
        if {key: found[key] for key in found if key != "crc32"} == described:
            return files
        raise SystemExit(f"{folder} contains other checkpoints: choose another folder or empty it")
    for path in (files.imagebind, files.vicuna / "config.json", files.pandagpt, files.anomalygpt):
        path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(seed, {})
    specs = imagebind_specs(sizes)
    torch.save(
        OrderedDict((s.name, writer.tensor("imagebind", s, torch.float32)) for s in specs), files.imagebind
    )
    pieces = filled_tokenizer(tokenizer, num_pieces)
    write_vicuna(writer, files.vicuna, sizes, pieces, distinct_layers or sizes.layers)
    write_delta(writer, "pandagpt", pandagpt_specs(sizes), files.pandagpt)
    write_delta(writer, "anomalygpt", anomalygpt_specs(sizes), files.anomalygpt)
    (folder / MANIFEST).write_text(json.dumps({**described, "crc32": writer.checksums}))
    return files


def filled_tokenizer(path: Path, num_pieces: int | None) -> bytes:
    """A sentencepiece model, extended by unused pieces.

    In its format (a protocol buffer) field 1 is a piece (its field 1 is the text, 3 the type; type 5 is unused), and a
    field appended to the message is appended to the list of pieces.
    """
    model = path.read_bytes()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    for index in range(size, num_pieces or size):
        text = f"<unused {index}>".encode()
        piece = bytes([0x0A, len(text), *text, 0x18, 5])
        model += bytes([0x0A, len(piece), *piece])
    return model


def write_vicuna(writer: Writer, folder: Path, sizes: Sizes, tokenizer: bytes, distinct_layers: int) -> None:
    """Write a Hugging Face folder like Vicuna v0's: two float16 shards and an index, one shard in memory at a time."""
    (folder / "tokenizer.model").write_bytes(tokenizer)
    num_pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    specs = list(llama_specs(sizes, num_pieces + 1))
    second = next(
        (
            i
            for i, spec in enumerate(specs)
            if spec.name.startswith(f"model.layers.{(sizes.layers + 1) // 2}.")
        ),
        len(specs) - 2,
    )
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate((specs[:second], specs[second:]), start=1):
        shard = draw_shard(writer, part, distinct_layers)
        torch.save(shard, folder / f"pytorch_model-0000{number}-of-00002.bin")
        weight_map |= dict.fromkeys(shard, f"pytorch_model-0000{number}-of-00002.bin")
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": num_pieces + 1,
        **ids,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ("added_tokens.json", {"[PAD]": num_pieces}),
        ("pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2))


def draw_shard(writer: Writer, specs: Iterable[Spec], distinct_layers: int) -> OrderedDict[str, Tensor]:
    """Name → tensor. Layers beyond the distinct ones share their storages, which torch.save writes once."""
    drawn: dict[str, Tensor] = {}
    shard = OrderedDict()
    for spec in specs:
        source = LAYER.sub(lambda match: f"layers.{int(match[1]) % distinct_layers}.", spec.name)
        if source not in drawn:
            drawn[source] = writer.tensor("llama", replace(spec, name=source), torch.float16)
        shard[spec.name] = drawn[source]
    return shard


def write_delta(writer: Writer, role: str, specs: Iterable[Spec], path: Path) -> None:
    """Write float16 parameters as views into one flat storage labelled cuda:0, as DeepSpeed saves them."""
    tensors = [(spec.name, writer.tensor(role, spec, torch.float16)) for spec in specs]
    count = sum(tensor.numel() for _, tensor in tensors)
    flat = torch.zeros(count + -count % 4, dtype=torch.float16)
    saved, offset = OrderedDict(), 0
    for name, tensor in tensors:
        view = flat[offset : offset + tensor.numel()]
        view.copy_(tensor.reshape(-1))
        saved[name] = nn.Parameter(view.view(tensor.shape))
        offset += tensor.numel()
    with mock.patch.object(torch.serialization, "location_tag", return_value="cuda:0"):
        torch.save(saved, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=LLM_SIZES, default="7b", help="the language model's width")
    parser.add_argument("--layers", type=int, default=Sizes().layers, help="7B has 32, 13B has 40")
    parser.add_argument(
        "--distinct-layers",
        type=int,
        help="number of layers with weights of their own in each shard; default: all",
    )
    parser.add_argument(
        "--pieces", type=int, help="size of the vocabulary, extended by unused pieces; default: 2400"
    )
    parser.add_argument("--tiny", action="store_true", help="a few megabytes, for tests")
    options = parser.parse_args(arguments)
    sizes = replace(TINY if options.tiny else LLM_SIZES[options.size], layers=options.layers)
    files = write_checkpoints(
        options.seed,
        options.out,
        sizes,
        num_pieces=options.pieces,
        distinct_layers=options.distinct_layers,
    )
    print(*vars(files).values(), sep="\n", file=sys.stdout)


if __name__ == "__main__":
    main()

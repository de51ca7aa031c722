"""``agpt doctor --checkpoints``: reports whether four checkpoints fit each other and what exporting them takes.

Only headers, shapes and a few small tensors are read, which takes seconds. Unlike ``agpt export``, which stops at the
first mistake, it checks every file and reports all mistakes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from ..models.anomalygpt import AnomalyGPTConfig
from ..models.image_decoder import ImageDecoder
from ..models.llama import DecoderLayer, Llama, LlamaConfig
from ..models.original_names import LORA_KEY
from ..models.prompt_learner import PromptLearner
from ..runtime.common.machine import Finding, memory_gib
from .checkpoints import check_role, open_networks, read_learner_config
from .gguf_llm import open_tokenizer
from .imagebind import has_text_tower, read_text_config, read_vision_config
from .keys import module_shapes, shape_of
from .lite import is_lite, read_lite_config
from .options import LLM_PRECISIONS
from .tensor_files import CheckpointError, Tensors, open_tensors
from .vicuna import SIZE_LAYERS, SIZES, open_llama, size_name

GB = 1e9
VICUNA_V0_ROWS = 32001
SETUPS = {
    "supervised": "supervised",
    "mvtec": "MVTec-AD",
    "visa": "VisA",
}  # word in a folder's name → training setup
MAX_PARENTS = 2  # parent folders whose names are searched for the setup
# Bits per weight in llama.cpp's formats, averaged over all tensors of LLaMA-7B.
LLM_BITS = {"f16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.85, "q4_0": 4.6}
# Largest size of the networks' converted files, relative to float32; int8 may leave any layer in float32.
NETWORK_SHARES = {"fp32": 0.0, "fp16": 0.5, "int8": 1.0}


@dataclass(frozen=True)
class Needs:
    """Bytes that an export takes."""

    networks: float  # size in the bundle in float32
    language: float  # size in the bundle in float16
    memory: float  # peak of the export

    def bundle(self, precision: str) -> float:
        """Size of the bundle with the language model in this precision and the networks in float32."""
        return self.networks + self.language * llm_share(precision)

    def disk(self, precision: str, networks: str = "fp32") -> float:
        """Disk space during the export, when converted files lie beside their sources."""
        converted = self.networks * NETWORK_SHARES[networks]
        return self.bundle(precision) + converted + (self.language if precision != "f16" else 0)


def llm_share(precision: str) -> float:
    """Size of the language model in a precision, relative to float16."""
    return LLM_BITS[precision] / LLM_BITS["f16"]


def report_checkpoints(imagebind: Path, vicuna: Path, pandagpt: Path, anomalygpt: Path) -> list[Finding]:
    """Findings about each checkpoint, about their fit, and about disk and memory. A damaged checkpoint raises nothing;
    its finding describes the error."""
    findings = [
        check_one("ImageBind", lambda: describe_imagebind(open_as(imagebind, "ImageBind"))),
        check_one("Vicuna", lambda: describe_vicuna(vicuna)),
        check_one("PandaGPT", lambda: describe_pandagpt(open_as(pandagpt, "PandaGPT"))),
        check_one("AnomalyGPT", lambda: describe_anomalygpt(open_as(anomalygpt, "AnomalyGPT"))),
    ]
    if any(finding.fix for finding in findings):
        return [*findings, Finding("together", "not checked", fix="correct the files above first")]
    try:
        config = open_networks(imagebind, vicuna, pandagpt, anomalygpt).config
    except CheckpointError as error:
        return [*findings, Finding("together", "they do not fit", fix=str(error))]
    together = Finding("together", f"they fit: an AnomalyGPT with {model_name(config.llama)}")
    return [*findings, together, *resources(needs_of(config))]


def check_one(role: str, describe: Callable[[], str]) -> Finding:
    """The finding about one checkpoint: its description, or the error that ``describe`` raises."""
    try:
        return Finding(role, describe())
    except CheckpointError as error:
        return Finding(role, "not usable", fix=str(error))


WITHOUT_TEXT_TOWER = "no text tower, so agpt export needs --text-features"


def open_as(path: Path, role: str) -> Tensors:
    """Open a file that must be this role's checkpoint.

    Raises:
        CheckpointError: it is not, or it is damaged.
    """
    tensors = open_tensors(path)
    check_role(tensors, role)
    return tensors


def describe_imagebind(tensors: Tensors) -> str:
    if is_lite(tensors):
        lite = read_lite_config(tensors)
        return f"encoder of lite, {lite.image_size} px, taps {list(lite.tap_blocks)}; {WITHOUT_TEXT_TOWER}"
    vision = read_vision_config(tensors)
    if has_text_tower(tensors):
        text = read_text_config(tensors, vision.embed_dim)
        tower = f"text tower of {text.depth} blocks"
    else:
        tower = WITHOUT_TEXT_TOWER
    return f"vision tower of {vision.depth} blocks, width {vision.width}; {tower}"


def describe_vicuna(folder: Path) -> str:
    config, _ = open_llama(folder)
    num_pieces = open_tokenizer(folder / "tokenizer.model").get_piece_size()
    if num_pieces > config.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {num_pieces} pieces but its embedding {config.vocab_size} rows: "
            "they belong to different models; copy both from the same one"
        )
    name = f"{model_name(config)}; {config.vocab_size} rows, {num_pieces} pieces"
    if config.hidden_size in SIZES and config.vocab_size == VICUNA_V0_ROWS - 1:
        # Shapes cannot decide: v1.1 and LLaMA itself have the same number of rows.
        name += f"; Vicuna v0 was published with {VICUNA_V0_ROWS} rows, make sure that this is v0"
    return name


def describe_pandagpt(tensors: Tensors) -> str:
    width, embed_dim = shape_of(tensors, "llama_proj.weight", dims=2)
    matches = [match for key in tensors if (match := LORA_KEY.search(key))]
    layers = len({match["layer"] for match in matches})
    lora = f"LoRA for {layers} layers" if layers else "no LoRA"
    return f"delta for width {width}{size_name(width)}, image embeddings of {embed_dim}; {lora}"


def describe_anomalygpt(tensors: Tensors) -> str:
    learner = read_learner_config(tensors)
    width = learner.llm_width
    optional = (("evidence", learner.evidence_width), ("the picture", learner.look_channels))
    inputs = " and ".join(name for name, width in optional if width)
    reads = f"; its prompt learner reads {inputs} beside the map" if inputs else ""
    return f"delta for width {width}{size_name(width)}{reads}; setup: {setup_of(tensors.path)}"


def setup_of(path: Path) -> str:
    """What the delta was trained on, from the names of its parent folders: all setups have the same shapes."""
    for folder in list(path.absolute().parents)[:MAX_PARENTS]:
        for word, setup in SETUPS.items():
            if word in folder.name.lower():
                return f"{setup}, from the folder name {folder.name}"
    return "unknown, no parent folder names it"


def model_name(config: LlamaConfig) -> str:
    """ "a LLaMA of 7B" or 13B, or the dimensions of any other model."""
    size = SIZES.get(config.hidden_size)
    if size and config.num_hidden_layers == SIZE_LAYERS[size]:
        return f"a LLaMA of {size}"
    return f"a LLaMA of {config.num_hidden_layers} layers, width {config.hidden_size}"


def needs_of(config: AnomalyGPTConfig) -> Needs:
    """The needs of an export, computed from the shapes alone."""
    vision, learner = config.vision, config.prompt_learner
    encoder = 4 * num_weights(vision.new_encoder)
    projection = 4 * config.llama.hidden_size * (vision.embed_dim + 1)
    decoder = 4 * num_weights(ImageDecoder, vision.width, vision.embed_dim, len(vision.tap_layers))
    deltas = projection + decoder + 4 * num_weights(PromptLearner, learner)
    # Memory-mapped files do not count. The reference and onnxruntime hold the deltas at the same time, and onnxruntime
    # holds the encoder twice while opening it; later the reference holds two layers and the head in float32.
    layer = 4 * num_weights(DecoderLayer, config.llama)
    head = 4 * config.llama.vocab_size * config.llama.hidden_size
    memory = 2 * deltas + max(2 * encoder, 2 * layer + head)
    return Needs(encoder + deltas, 2 * num_weights(Llama, config.llama), memory)


def num_weights(kind: Callable[..., nn.Module], *args: object) -> int:
    return sum(map(prod, module_shapes(kind, *args).values()))


def resources(needs: Needs) -> list[Finding]:
    """Findings about disk and memory: what exporting takes, compared with what this machine has."""
    bundle = by_precision(needs.bundle)
    most = max(needs.disk(name) for name in LLM_PRECISIONS)
    free = shutil.disk_usage(Path.cwd()).free
    memory = memory_gib() * 2**30
    disk_fix = "" if free > most else "free some space, or give --out on a larger disk"
    memory_fix = "" if not memory < needs.memory else "close other programs, or export on a larger machine"
    return [
        Finding("bundle", f"GB by --llm-quant: {bundle}"),
        Finding(
            "disk",
            f"GB during the export: {by_precision(needs.disk)}; {free / GB:.1f} free here",
            disk_fix,
            needed=False,
        ),
        Finding(
            "memory",
            f"about {needs.memory / GB:.1f} GB, {memory / GB:.1f} in this machine",
            memory_fix,
            needed=False,
        ),
    ]


def by_precision(size: Callable[[str], float]) -> str:
    """ "f16 16.9, q8_0 10.6, …": gigabytes for each precision of the language model."""
    return ", ".join(f"{name} {size(name) / GB:.1f}" for name in LLM_PRECISIONS)

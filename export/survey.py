"""``agpt doctor --checkpoints``: do these four belong together, and what will exporting them take?

Only headers, shapes and a few small tensors are read, so it answers in seconds. Unlike ``agpt export``, which
stops at the first mistake, it looks at every file and names them all.
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
from ..models.imagebind import VisionEncoder
from ..models.llama import DecoderLayer, Llama, LlamaConfig
from ..models.original_names import LORA_KEY
from ..models.prompt_learner import PromptLearner
from ..runtime.common.machine import Finding, memory_gib
from .checkpoints import check_role, open_networks, read_learner_config
from .gguf_llm import open_tokenizer
from .imagebind import has_text_tower, read_text_config, read_vision_config
from .keys import module_shapes, shape_of
from .options import LLM_PRECISIONS
from .tensor_files import CheckpointError, Tensors, open_tensors
from .vicuna import SIZE_LAYERS, SIZES, open_llama, size_name

GB = 1e9
VICUNA_V0_ROWS = 32001
SETUPS = {"supervised": "supervised", "mvtec": "MVTec-AD", "visa": "VisA"}  # in a folder's name → trained on
MAX_PARENTS = 2  # how far up a folder may name the setup
# Bits a weight takes in llama.cpp's formats, a LLaMA of 7B over all its tensors.
LLM_BITS = {"f16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.85, "q4_0": 4.6}
# Size of the networks' converted files, against float32; int8 may leave any layer as it is.
NETWORK_SHARES = {"fp32": 0.0, "fp16": 0.5, "int8": 1.0}


@dataclass(frozen=True)
class Needs:
    """Bytes that an export takes."""

    networks: float  # in the bundle, float32
    language: float  # in the bundle, float16
    memory: float  # the most that is held at a time

    def bundle(self, precision: str) -> float:
        return self.networks + self.language * llm_share(precision)

    def disk(self, precision: str, networks: str = "fp32") -> float:
        """While exporting: what is converted lies beside what it is made from."""
        converted = self.networks * NETWORK_SHARES[networks]
        return self.bundle(precision) + converted + (self.language if precision != "f16" else 0)


def llm_share(precision: str) -> float:
    """Size of the language model in a precision, against float16."""
    return LLM_BITS[precision] / LLM_BITS["f16"]


def survey(imagebind: Path, vicuna: Path, pandagpt: Path, anomalygpt: Path) -> list[Finding]:
    """Look at each checkpoint, then at all together; nothing is raised for a bad one, its line says it."""
    findings = [
        look("ImageBind", lambda: describe_imagebind(open_as(imagebind, "ImageBind"))),
        look("Vicuna", lambda: describe_vicuna(vicuna)),
        look("PandaGPT", lambda: describe_pandagpt(open_as(pandagpt, "PandaGPT"))),
        look("AnomalyGPT", lambda: describe_anomalygpt(open_as(anomalygpt, "AnomalyGPT"))),
    ]
    if any(finding.fix for finding in findings):
        return [*findings, Finding("together", "not examined", fix="put right the files above")]
    try:
        config = open_networks(imagebind, vicuna, pandagpt, anomalygpt).config
    except CheckpointError as error:
        return [*findings, Finding("together", "they do not fit", fix=str(error))]
    together = Finding("together", f"they fit: an AnomalyGPT with {model_name(config.llama)}")
    return [*findings, together, *resources(needs_of(config))]


def look(role: str, describe: Callable[[], str]) -> Finding:
    """One checkpoint's line."""
    try:
        return Finding(role, describe())
    except CheckpointError as error:
        return Finding(role, "not usable", fix=str(error))


def open_as(path: Path, role: str) -> Tensors:
    """Open a file that must be this role's checkpoint."""
    tensors = open_tensors(path)
    check_role(tensors, role)
    return tensors


def describe_imagebind(tensors: Tensors) -> str:
    vision = read_vision_config(tensors)
    if has_text_tower(tensors):
        text = read_text_config(tensors, vision.embed_dim)
        tower = f"text tower of {text.depth} blocks"
    else:
        tower = "no text tower, so export needs --text-features"
    return f"vision tower of {vision.depth} blocks, {vision.width} wide; {tower}"


def describe_vicuna(folder: Path) -> str:
    config, _ = open_llama(folder)
    num_pieces = open_tokenizer(folder / "tokenizer.model").get_piece_size()
    if num_pieces > config.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {num_pieces} pieces but its embedding {config.vocab_size} rows: "
            "they are of different models"
        )
    name = f"{model_name(config)}; {config.vocab_size} rows, {num_pieces} pieces"
    if config.hidden_size in SIZES and config.vocab_size == VICUNA_V0_ROWS - 1:
        # Shapes cannot tell: v1.1 and LLaMA itself have as many.
        name += f"; Vicuna v0 was published with {VICUNA_V0_ROWS}, make sure that this is v0"
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
    beside = (("evidence", learner.evidence_width), ("the picture", learner.look_channels))
    read = " and ".join(what for what, width in beside if width)
    reads = f"; its prompt learner reads {read} beside the map" if read else ""
    return f"delta for width {width}{size_name(width)}{reads}; setup: {setup_of(tensors.path)}"


def setup_of(path: Path) -> str:
    """What the delta was trained on. All setups have the same shapes, so only a folder's name can tell."""
    for folder in list(path.absolute().parents)[:MAX_PARENTS]:
        for word, setup in SETUPS.items():
            if word in folder.name.lower():
                return f"{setup}, by its folder's name {folder.name}"
    return "unknown, no folder name tells"


def model_name(config: LlamaConfig) -> str:
    """ "a LLaMA of 7B", or the dimensions of what is neither size."""
    size = SIZES.get(config.hidden_size)
    if size and config.num_hidden_layers == SIZE_LAYERS[size]:
        return f"a LLaMA of {size}"
    return f"a LLaMA of {config.num_hidden_layers} layers, {config.hidden_size} wide"


def needs_of(config: AnomalyGPTConfig) -> Needs:
    """From the shapes alone."""
    vision, learner = config.vision, config.prompt_learner
    encoder = 4 * num_weights(VisionEncoder, vision)
    projection = 4 * config.llama.hidden_size * (vision.embed_dim + 1)
    decoder = 4 * num_weights(ImageDecoder, vision.width, vision.embed_dim, len(vision.tap_layers))
    deltas = projection + decoder + 4 * num_weights(PromptLearner, learner)
    # Mapped files do not count. The networks' deltas are held by the reference and by onnxruntime at a time, which
    # unpacks the encoder beside its copy of it; later the reference holds two layers and the head in float32.
    layer = 4 * num_weights(DecoderLayer, config.llama)
    head = 4 * config.llama.vocab_size * config.llama.hidden_size
    memory = 2 * deltas + max(2 * encoder, 2 * layer + head)
    return Needs(encoder + deltas, 2 * num_weights(Llama, config.llama), memory)


def num_weights(kind: type[nn.Module], *args: object) -> int:
    return sum(map(prod, module_shapes(kind, *args).values()))


def resources(needs: Needs) -> list[Finding]:
    """Disk and memory: what exporting takes against what this machine has."""
    bundle = by_precision(needs.bundle)
    most = max(needs.disk(name) for name in LLM_PRECISIONS)
    free = shutil.disk_usage(Path.cwd()).free
    memory = memory_gib() * 2**30
    disk_fix = "" if free > most else "free some, or give --out on a larger disk"
    memory_fix = "" if not memory < needs.memory else "close other programs, or export on a larger machine"
    return [
        Finding("bundle", f"GB by --llm-quant: {bundle}"),
        Finding(
            "disk",
            f"GB while exporting: {by_precision(needs.disk)}; {free / GB:.1f} free here",
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

"""The three networks in front of the language model, as ONNX graphs with a dynamic batch.

Tried with torch 2.13: the ``torch.export``-based exporter produces clean graphs (LayerNormalization and Gelu as one
node each). It writes the source paths of this machine into the nodes; they are stripped here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from ..models.anomalygpt import AnomalyGPT
from ..models.image_decoder import ImageDecoder
from ..runtime.bundles.bundle import Component, TensorSpec

OPSET = 20  # the newest that TensorRT 10.3 (JetPack 6) parses; these graphs need nothing newer
EXTERNAL_DATA_BYTES = 1_500_000_000  # protobuf's limit is 2 GiB
BATCH = "B"
MAX_BATCH = 1024
NOISY_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class EncoderGraph(nn.Module):
    """Vision tower and ``llama_proj`` as one graph: the runtime needs the image embedding only projected."""

    def __init__(self, model: AnomalyGPT) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.llama_proj = model.llama_proj

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] → [B, D] and [B, T, grid², V]."""
        embedding, patch_features = self.encoder(pixels)
        return self.llama_proj(embedding), patch_features


class DecoderGraph(nn.Module):
    """The image decoder up to its logits: ``kernels.localise`` computes the map from them on every device."""

    def __init__(self, decoder: ImageDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, patch_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, T, grid², V] and [2, E] → [B, T, grid², 2]."""
        return self.decoder.patch_logits(patch_features, text_features)


@dataclass(frozen=True)
class Graph:
    """One network to export, with example inputs. Every input but those in ``fixed`` has a batch axis."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    fixed: tuple[str, ...] = ()


def graphs(model: AnomalyGPT) -> list[Graph]:
    """Encoder, decoder and prompt learner. The examples' batch is 2: torch would freeze a batch of 1."""
    vision = model.config.vision
    size = vision.image_size
    taps = torch.zeros(2, len(vision.tap_layers), vision.grid**2, vision.width)
    # Not zeros: their norm of 0 would give NaN if the examples were run, though torch.export only traces them.
    text = torch.ones(2, vision.embed_dim) / vision.embed_dim**0.5
    size_of = {"anomaly_map": (vision.map_size, vision.map_size), "num_samples": (), "pixels": (3, size, size)}
    read = {name: torch.zeros(2, *size_of[name]) for name in model.config.prompt_learner.inputs}
    return [
        Graph(
            "encoder",
            EncoderGraph(model),
            {"pixels": torch.zeros(2, 3, size, size)},
            ("image_embedding", "patch_features"),
        ),
        Graph(
            "decoder",
            DecoderGraph(model.image_decoder),
            {"patch_features": taps, "text_features": text},
            ("patch_logits",),
            fixed=("text_features",),
        ),
        Graph(
            "prompt_learner",
            model.prompt_learner,
            read,
            ("prompt_embeddings",),
        ),
    ]


def export_graph(graph: Graph, folder: Path) -> Component:
    """Write ``<name>.onnx`` (and ``<name>.onnx.data`` when it is large), check it and describe it.

    Returns:
        The component with the tensors as the written file declares them.
    """
    model = trace(graph)
    strip_residue(model)
    path = folder / f"{graph.name}.onnx"
    num_bytes = sum(t.numel() * t.element_size() for t in graph.module.state_dict().values())
    external = f"{path.name}.data" if num_bytes > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    onnx.checker.check_model(str(path), full_check=True)
    return describe(path)


def trace(graph: Graph) -> onnx_ir.Model:
    """Convert a torch module to an ONNX model in memory; the weights are shared with the module, not copied."""
    batch = torch.export.Dim(BATCH, min=1, max=MAX_BATCH)
    shapes = tuple(None if name in graph.fixed else {0: batch} for name in graph.inputs)
    with quiet_exporter():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program.model


def strip_residue(model: onnx_ir.Model) -> None:
    """Remove the exporter's debugging information: class names, stack traces with this machine's paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def describe(path: Path, precision: str = "fp32") -> Component:
    """Names, dtypes and shapes of a graph file's inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    return Component(
        file=path.name,
        precision=precision,
        inputs=specs(graph.input),
        outputs=specs(graph.output),
    )


def specs(values: Sequence[onnx.ValueInfoProto]) -> list[TensorSpec]:
    return [tensor_spec(value) for value in values]


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(value.name, dtype, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim])


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages about optional packages that this export does not use."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

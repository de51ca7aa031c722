"""INT8 as Q/DQ nodes in the ONNX graph: weights per output channel, activations per tensor, both symmetric.

Every large MatMul with constant weights gets int8 weights and an int8 input. Its output stays float32, and so does all
between the MatMuls: LayerNorm, softmax, GELU, attention's own products. One file serves every device: TensorRT takes
symmetric scales only, and onnxruntime on x86 turns the signed inputs into the unsigned ones that VNNI multiplies.

Outlier channels: the channels of an input that a LayerNorm makes are equalised, channel j divided by s_j and row j of
the weights multiplied by it, s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant, Xiao et al., ICML 2023); the LayerNorm
takes the division in. Of several α that one is used that leaves the smallest error of the layer's output on tokens of
the calibration images, and a layer whose error stays large is left in float32. onnxruntime's own quantiser is not
used: it holds the model in memory several times over, and its equalising takes another framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ..runtime.bundle import Component
from .onnx_graphs import describe

LEVELS = 127
MIN_WEIGHTS = 1 << 10  # a smaller MatMul is not worth two nodes
TOKEN_STEP = 32  # every so many tokens of a calibration image are kept, the CLS token among them
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # α; 0: not equalised
MAX_ERROR = 0.1  # of a layer's output, relative (RMS): a layer above it stays float32
TINY = np.float32(1e-12)


@dataclass
class Group:
    """The MatMuls that share one input x of K channels; what calibration saw of it."""

    nodes: list[ir.Node]
    peaks: np.ndarray  # float32 [K]: largest |x| of each channel, over all tokens
    tokens: np.ndarray  # float32 [R, K]: some of them

    @property
    def input(self) -> ir.Value:
        return _input(self.nodes[0], 0)

    @property
    def norm(self) -> ir.Node | None:
        """The LayerNorm that makes the input for these MatMuls alone."""
        node = self.input.producer()
        if node is None or node.op_type != "LayerNormalization" or len(node.inputs) < 3:
            return None
        alone = len(self.input.uses()) == len(self.nodes) and not self.input.is_graph_output()
        constant = all(_constant(node, i) is not None for i in (1, 2))
        return node if alone and constant else None


@dataclass
class Quantised:
    """x @ weight, in int8.

    Attributes:
        weight: int8 [K, N].
        weight_scale: float32 [N].
        input_scale: float32 [], of the equalised x.
        shares: float32 [K]: channel j of x is divided by shares[j].
        error: of the output on the calibration tokens, relative (RMS).
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    input_scale: np.ndarray
    shares: np.ndarray
    error: float


def to_int8(source: Path, target: Path, batches: Iterable[dict[str, np.ndarray]]) -> Component:
    """Quantise a float32 graph.

    Args:
        source: the graph; only read.
        target: the graph to write, with its weights beside it in ``<target>.data``.
        batches: inputs by name, of normal parts, run one after the other; at least one.

    Returns:
        The written component; its inputs and outputs are the source's.
    """
    model = ir.load(source)
    for group in calibrate(model, source, batches):
        quantised = quantise(group)
        if quantised.error <= MAX_ERROR:
            replace(model.graph, group, quantised)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=MIN_WEIGHTS)
    onnx.checker.check_model(str(target), full_check=True)
    return describe(target, "int8")


def calibrate(model: ir.Model, source: Path, batches: Iterable[dict[str, np.ndarray]]) -> list[Group]:
    """Run the float32 graph on the batches and watch the inputs of every MatMul that is worth quantising."""
    linears: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if is_linear(node):
            linears.setdefault(str(_input(node, 0).name), []).append(node)
    observed = source.with_name(f".calibration.{source.name}")  # beside the source's external data
    try:
        outputs = write_observed(source, list(linears), observed)
        session = ort.InferenceSession(observed, providers=["CPUExecutionProvider"])
        seen = [session.run(outputs, batch) for batch in batches]
    finally:
        observed.unlink(missing_ok=True)
    return [
        Group(
            nodes,
            peaks=np.max([values[2 * i] for values in seen], axis=0),
            tokens=np.concatenate([values[2 * i + 1].reshape(-1, values[2 * i].size) for values in seen]),
        )
        for i, nodes in enumerate(linears.values())
    ]


def is_linear(node: ir.Node) -> bool:
    """A MatMul by a constant matrix that no other node uses."""
    if node.op_type != "MatMul" or node.domain:
        return False
    weight = _constant(node, 1)
    return (
        weight is not None
        and len(weight.shape) == 2
        and weight.size >= MIN_WEIGHTS
        and len(_input(node, 1).uses()) == 1
    )


def write_observed(source: Path, names: list[str], target: Path) -> list[str]:
    """The graph with two more outputs for each named value [B, L, K]: peaks [K] and every 32nd token [B, l, K].

    Returns:
        The new outputs' names, two for each value.
    """
    model = ir.load(source)
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    constants = {
        name: _register(graph, f"observed.{name}", np.array(numbers, np.int64))
        for name, numbers in {
            "axes": [0, 1],
            "start": [0],
            "end": [1 << 31],
            "axis": [1],
            "step": [TOKEN_STEP],
        }.items()
    }
    outputs = []
    for name in names:
        value = values[name]
        absolute = ir.node("Abs", [value])
        peaks = ir.node("ReduceMax", [absolute.outputs[0], constants["axes"]], attributes={"keepdims": 0})
        slicing = [constants[part] for part in ("start", "end", "axis", "step")]
        tokens = ir.node("Slice", [value, *slicing])
        graph.extend([absolute, peaks, tokens])
        for node, kind in ((peaks, "peaks"), (tokens, "tokens")):
            node.outputs[0].name = f"{name}.{kind}"
            node.outputs[0].type = value.type
            graph.outputs.append(node.outputs[0])
            outputs.append(f"{name}.{kind}")
    ir.save(model, target)
    return outputs


def quantise(group: Group) -> Quantised:
    """The strength that leaves the smallest error; only a LayerNorm's output can be equalised for nothing."""
    weight = np.concatenate([_array(node, 1) for node in group.nodes], axis=1)
    exact = group.tokens @ weight
    tried = (
        quantise_at(strength, group, weight, exact)
        for strength in (STRENGTHS if group.norm else STRENGTHS[:1])
    )
    return min(tried, key=lambda quantised: quantised.error)


def quantise_at(strength: float, group: Group, weight: np.ndarray, exact: np.ndarray) -> Quantised:
    """Equalise, round, and measure against ``exact`` = tokens @ weight."""
    shares = np.ones_like(group.peaks)
    if strength:
        shares = np.maximum(group.peaks, TINY) ** strength
        shares /= np.maximum(np.abs(weight).max(axis=1), TINY) ** (1 - strength)
        shares /= np.exp(np.log(shares).mean())  # the LayerNorm's scale keeps its size
    scaled = weight * shares[:, None]
    input_scale = np.maximum((group.peaks / shares).max(), TINY) / LEVELS
    weight_scale = np.maximum(np.abs(scaled).max(axis=0), TINY) / LEVELS
    rounded = np.rint(scaled / weight_scale).astype(np.int8)
    tokens = np.clip(np.rint(group.tokens / (shares * input_scale)), -LEVELS - 1, LEVELS)
    found = (tokens @ rounded.astype(np.float32)) * (weight_scale * input_scale)
    error = float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), TINY))
    return Quantised(rounded, weight_scale, np.asarray(input_scale, np.float32), shares, error)


def replace(graph: ir.Graph, group: Group, quantised: Quantised) -> None:
    """Q/DQ around the input, int8 weights behind a DequantizeLinear, shares taken in by the LayerNorm."""
    norm, x = group.norm, group.input
    if norm is not None:
        for index in (1, 2):
            equalised = _array(norm, index) / quantised.shares
            _swap(graph, norm, index, _register(graph, f"{x.name}.norm{index}", equalised))
    scale = _register(graph, f"{x.name}.scale", quantised.input_scale)
    zero = _register(graph, f"{x.name}.zero", np.zeros((), np.int8))
    rounded = ir.node("QuantizeLinear", [x, scale, zero])
    restored = ir.node("DequantizeLinear", [rounded.outputs[0], scale, zero])
    graph.insert_before(group.nodes[0], [rounded, restored])
    start = 0
    for node in group.nodes:
        stop = start + _array(node, 1).shape[1]
        name = _input(node, 1).name
        weight = _register(graph, f"{name}.int8", quantised.weight[:, start:stop])
        scales = _register(graph, f"{name}.scale", quantised.weight_scale[start:stop])
        widened = ir.node("DequantizeLinear", [weight, scales], attributes={"axis": 1})
        graph.insert_before(node, widened)
        _swap(graph, node, 0, restored.outputs[0])
        _swap(graph, node, 1, widened.outputs[0])
        start = stop


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = _input(node, index)
    return value.const_value if value.is_initializer() else None


def _array(node: ir.Node, index: int) -> np.ndarray:
    constant = _constant(node, index)
    assert constant is not None
    return constant.numpy()


def _swap(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value) -> None:
    """Another input; the old one goes where it was a constant."""
    old = _input(node, index)
    node.replace_input_with(index, value)
    if old.is_initializer() and not old.uses():
        graph.initializers.pop(str(old.name))


def _register(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
    )
    graph.register_initializer(value)
    return value

"""INT8 as Q/DQ nodes in the ONNX graph: weights per output channel, activations per token, both symmetric.

Every large MatMul with constant weights gets int8 weights and an int8 input. Its output stays float32, and so does all
between the MatMuls: LayerNorm, softmax, GELU, attention's own products. One file serves every device: TensorRT takes
symmetric constant scales only, and onnxruntime on x86 turns the signed inputs into the unsigned ones that VNNI
multiplies.

Each token is divided by its own largest value first, so the constant scale 1/127 fits all of them. A scale that
calibration fixes would clip what the calibration images do not have, and a defect is just that (measured at full size:
maps of images unlike the calibration's decorrelated five times more). What calibration gives is each channel's centre
and peak: the centre is taken off, its product with the weights goes into the bias, and outlier channels are equalised,
channel j divided by s_j and row j of the weights multiplied by it, s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant,
Xiao et al., ICML 2023). A LayerNorm takes both in for nothing.

How much is left alone is found by measurement (``to_int8``). A layer may be computed in two passes, its rounded input
and then what the rounding left, 254 times enlarged: 15 bits of input for two int8 products, half the time of float32
and none of its memory. Beyond that it stays float32. onnxruntime's own quantiser is not used: it holds the model in
memory several times over, and its equalising takes another framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ..runtime.bundle import Component
from .onnx_graphs import describe
from .unfold import unfold_convolutions

LEVELS = 127
MIN_WEIGHTS = 1 << 10  # a smaller MatMul is not worth its nodes
TOKEN_STEP = 32  # every so many tokens of a calibration image are kept, the CLS token among them
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # α; 0: not equalised
STEPS = 8  # rungs on the way from one pass to two, and from there to float32
TINY = np.float32(1e-12)


@dataclass
class Group:
    """The MatMuls that share one input x of K channels; what calibration saw of it."""

    nodes: list[ir.Node]
    lows: np.ndarray  # float32 [K]: smallest x of each channel, over all tokens
    highs: np.ndarray  # float32 [K]
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
    """x @ weight, in int8: y = (x - centre) / shares takes the place of x.

    Attributes:
        weight: int8 [K, N].
        weight_scale: float32 [N].
        centre: float32 [K].
        shares: float32 [K].
        bias: float32 [N]: centre @ the exact weight.
        error: of the output on the calibration tokens, relative (RMS).
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    centre: np.ndarray
    shares: np.ndarray
    bias: np.ndarray
    error: float


def to_int8(
    source: Path,
    target: Path,
    batches: Iterable[dict[str, np.ndarray]],
    accept: Callable[[Component], bool] = lambda component: True,
) -> Component:
    """Quantise a float32 graph, as much of it as ``accept`` allows.

    Layers are ordered by what they are likely to cost: the error of their output times the share of the network that
    still follows it (in an encoder with taps, an early error is in all of them). On the ladder from all layers in one
    pass, over all in two, to all in float32, the lowest rung that is accepted is found by bisection.

    Args:
        source: the graph; only read.
        target: the graph to write, with its weights beside it in ``<target>.data``.
        batches: inputs by name, of normal parts, run one after the other; at least one.
        accept: measures what was written; float32 throughout is not asked for.

    Returns:
        The written component; its inputs and outputs are the source's.
    """
    groups = calibrate(load(source), source, batches)
    found = {group.input.name: quantise(group) for group in groups}
    costs = [found[g.input.name].error * (1 - i / len(groups)) for i, g in enumerate(groups)]
    order = [groups[i].input.name for i in np.argsort(costs)[::-1]]
    low, high, written = 0, 2 * STEPS, -1
    while low < high:
        rung = (low + high) // 2 if written >= 0 else 0  # most are accepted as they are
        component = write(source, target, found, order, rung)
        written = rung
        low, high = (low, rung) if accept(component) else (rung + 1, high)
    return component if written == low else write(source, target, found, order, low)


def write(
    source: Path, target: Path, found: dict[str | None, Quantised], order: Sequence[str | None], rung: int
) -> Component:
    """The graph at a rung: up to ``STEPS`` so many of them have two passes, beyond that so many stay float32."""
    count = [min(max(rung - first, 0), STEPS) * len(order) // STEPS for first in (0, STEPS)]
    twice, alone = set(order[: count[0]]), set(order[: count[1]])
    model = load(source)
    for name, nodes in linears(model.graph).items():
        if name not in alone:
            replace(model.graph, Group(nodes, *[np.empty(0)] * 3), found[name], name in twice)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=MIN_WEIGHTS)
    onnx.checker.check_model(str(target), full_check=True)
    return describe(target, "int8")


def load(source: Path) -> ir.Model:
    """The graph with its convolutions unfolded where they can be."""
    model = ir.load(source)
    unfold_convolutions(model.graph)
    return model


def linears(graph: ir.Graph) -> dict[str | None, list[ir.Node]]:
    """The MatMuls that are worth quantising, by their input's name."""
    found: dict[str | None, list[ir.Node]] = {}
    for node in graph:
        if is_linear(node):
            found.setdefault(_input(node, 0).name, []).append(node)
    return found


def calibrate(model: ir.Model, source: Path, batches: Iterable[dict[str, np.ndarray]]) -> list[Group]:
    """Run the float32 graph on the batches and watch the inputs of every MatMul that is worth quantising."""
    groups = linears(model.graph)
    observed = source.with_name(f".calibration.{source.name}")  # beside the source's external data
    data = observed.with_name(f"{observed.name}.data")
    try:
        outputs = write_observed(source, list(groups), observed)
        session = ort.InferenceSession(observed, providers=["CPUExecutionProvider"])
        seen = [session.run(outputs, batch) for batch in batches]
    finally:
        observed.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    return [
        Group(
            nodes,
            lows=np.min([values[3 * i] for values in seen], axis=0),
            highs=np.max([values[3 * i + 1] for values in seen], axis=0),
            tokens=np.concatenate([values[3 * i + 2].reshape(-1, values[3 * i].size) for values in seen]),
        )
        for i, nodes in enumerate(groups.values())
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


def write_observed(source: Path, names: Sequence[str | None], target: Path) -> list[str]:
    """The graph with three more outputs for each named value [B, L, K]: lows [K], highs [K] and every 32nd token
    [B, l, K].

    Returns:
        The new outputs' names, three for each value.
    """
    model = load(source)
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
    slicing = [constants[part] for part in ("start", "end", "axis", "step")]
    outputs = []
    for name in names:
        value = values[name]
        lows = ir.node("ReduceMin", [value, constants["axes"]], attributes={"keepdims": 0})
        highs = ir.node("ReduceMax", [value, constants["axes"]], attributes={"keepdims": 0})
        tokens = ir.node("Slice", [value, *slicing])
        graph.extend([lows, highs, tokens])
        for node, kind in ((lows, "lows"), (highs, "highs"), (tokens, "tokens")):
            node.outputs[0].name = f"{name}.{kind}"
            node.outputs[0].type = value.type
            graph.outputs.append(node.outputs[0])
            outputs.append(f"{name}.{kind}")
    ir.save(model, target)
    return outputs


def quantise(group: Group) -> Quantised:
    """The strength that leaves the smallest error; only a LayerNorm's output is centred and equalised for nothing."""
    weight = np.concatenate([_array(node, 1) for node in group.nodes], axis=1)
    centre = group.tokens.mean(axis=0) if group.norm else np.zeros_like(group.lows)
    bias = centre @ weight
    exact = group.tokens @ weight
    tried = (
        quantise_at(strength, group, weight, centre, bias, exact)
        for strength in (STRENGTHS if group.norm else (0.0,))
    )
    return min(tried, key=lambda quantised: quantised.error)


def quantise_at(
    strength: float,
    group: Group,
    weight: np.ndarray,
    centre: np.ndarray,
    bias: np.ndarray,
    exact: np.ndarray,
) -> Quantised:
    """Equalise, round, and measure against ``exact`` = tokens @ weight."""
    shares = np.ones_like(centre)
    if strength:
        peaks = np.maximum(group.highs - centre, centre - group.lows)
        shares = np.maximum(peaks, TINY) ** strength
        shares /= np.maximum(np.abs(weight).max(axis=1), TINY) ** (1 - strength)
        shares /= np.exp(np.log(shares).mean())  # the LayerNorm's scale keeps its size
    scaled = weight * shares[:, None]
    weight_scale = np.maximum(np.abs(scaled).max(axis=0), TINY) / LEVELS
    rounded = np.rint(scaled / weight_scale).astype(np.int8)
    tokens = (group.tokens - centre) / shares
    scales = np.maximum(np.abs(tokens).max(axis=1, keepdims=True), TINY) / LEVELS
    found = (np.rint(tokens / scales) @ rounded.astype(np.float32)) * (scales * weight_scale) + bias
    error = float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), TINY))
    return Quantised(rounded, weight_scale, centre, shares, bias, error)


def replace(graph: ir.Graph, group: Group, quantised: Quantised, twice: bool) -> None:
    """Tokens to their largest value, Q/DQ, int8 weights behind a DequantizeLinear, and back to size.

    Args:
        twice: what the first rounding leaves goes through the same product, as more tokens.
    """
    x, norm, first = group.input, group.norm, group.nodes[0]
    name = str(x.name)
    if norm is not None:
        for index, array in ((1, _array(norm, 1)), (2, _array(norm, 2) - quantised.centre)):
            taken_in = _register(graph, f"{name}.norm{index}", array / quantised.shares)
            _swap(graph, norm, index, taken_in)

    def add(op: str, inputs: list[ir.Value], attributes: dict | None = None, before: ir.Node = first) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        graph.insert_before(before, node)
        return node.outputs[0]

    def constant(name: str, value: float | np.ndarray, dtype: type = np.float32) -> ir.Value:
        return graph.initializers.get(name) or _register(graph, name, np.asarray(value, dtype))

    def rounded(value: ir.Value) -> ir.Value:
        levels = add("QuantizeLinear", [value, scale, zero])
        return add("DequantizeLinear", [levels, scale, zero])

    last, middle = constant("int8.last", np.array([-1]), np.int64), -2
    scale, zero = constant("int8.scale", 1 / LEVELS), constant("int8.zero", 0, np.int8)
    peak = add("ReduceMax", [add("Abs", [x]), last])
    size = add("Max", [peak, constant("int8.tiny", TINY)])
    y = add("Div", [x, size])
    if twice:
        rest = add("Sub", [y, rounded(y)])
        enlarged = add("Mul", [rest, constant("int8.enlarge", 2 * LEVELS)])
        y = add("Concat", [y, enlarged], {"axis": middle})
    y = rounded(y)
    start = 0
    for node in group.nodes:
        stop = start + _array(node, 1).shape[1]
        weight_name = _input(node, 1).name
        weight = constant(f"{weight_name}.int8", quantised.weight[:, start:stop], np.int8)
        scales = constant(f"{weight_name}.scale", quantised.weight_scale[start:stop])
        widened = add("DequantizeLinear", [weight, scales], {"axis": 1}, before=node)
        _swap(graph, node, 0, y)
        _swap(graph, node, 1, widened)
        result = node.outputs[0]
        users = list(result.uses())
        behind = users[0].node
        product = result
        if twice:
            result.shape = None  # twice the tokens
            halves = ir.node("Split", [product], {"axis": middle, "num_outputs": 2}, num_outputs=2)
            graph.insert_before(behind, halves)
            shrink = constant("int8.shrink", 1 / (2 * LEVELS))
            rest = add("Mul", [halves.outputs[1], shrink], before=behind)
            product = add("Add", [halves.outputs[0], rest], before=behind)
        product = add("Mul", [product, size], before=behind)
        bias = quantised.bias[start:stop]
        if bias.any():
            if len(users) == 1 and adds_constant(behind):
                added = constant(f"{weight_name}.bias", _array(behind, 1) + bias)
                _swap(graph, behind, 1, added)
            else:
                product = add("Add", [product, constant(f"{weight_name}.bias", bias)], before=behind)
        for user in users:
            user.node.replace_input_with(user.idx, product)
        start = stop


def adds_constant(node: ir.Node) -> bool:
    """A bias behind a product."""
    return node.op_type == "Add" and _constant(node, 1) is not None


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

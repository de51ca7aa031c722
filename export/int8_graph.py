"""Q/DQ nodes around the large MatMuls of an ONNX graph.

Every large MatMul with constant weights gets int8 weights and an int8 input. Its output stays float32, and so does
everything between the MatMuls: LayerNorm, softmax, GELU, attention's own products. One file serves every device:
TensorRT accepts symmetric constant scales only, and onnxruntime on x86 converts the signed inputs to the unsigned
ones that VNNI multiplies. onnxruntime's own quantiser is not used: it holds the model in memory several times, and
its equalisation needs another framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..runtime.bundles.bundle import Component
from .onnx_graphs import describe
from .rounding import LEVELS, TINY, Quantised
from .unfold import unfold_convolutions

MIN_WEIGHTS = 1 << 10  # smaller MatMuls are not quantised
TWICE = "twice"  # input of a probe graph that selects, per layer, one pass (0) or two (1)

Name = str | None
Passes = Mapping[Name, int]  # input's name → number of int8 passes; 0: float32


@dataclass
class Group:
    """The MatMuls that share one input x of K channels."""

    nodes: list[ir.Node]

    @property
    def input(self) -> ir.Value:
        return _input(self.nodes[0], 0)

    @property
    def weight(self) -> np.ndarray:
        """float32 [K, N]: the nodes' weights side by side."""
        return np.concatenate([_array(node, 1) for node in self.nodes], axis=1)

    @property
    def norm(self) -> ir.Node | None:
        """The LayerNorm whose output only these MatMuls use; None without one."""
        node = self.input.producer()
        if node is None or node.op_type != "LayerNormalization" or len(node.inputs) < 3:
            return None
        alone = len(self.input.uses()) == len(self.nodes) and not self.input.is_graph_output()
        constant = all(_constant(node, i) is not None for i in (1, 2))
        return node if alone and constant else None


def write(
    source: Path, target: Path, found: Mapping[Name, Quantised], passes: Passes, mask: str = ""
) -> Component:
    """Write the quantised graph.

    Args:
        source: the float32 graph.
        target: the graph to write, with its weights in ``<target>.data``.
        found: weights and codings of the layers, by their input's name.
        passes: how many passes compute each layer.
        mask: name of an additional graph input, float32 [layers], that multiplies the inputs of the second passes;
            "" adds none.
    """
    model = load(source)
    graph = model.graph
    if mask:
        kind = ir.TensorType(ir.DataType.FLOAT)
        graph.inputs.append(ir.Value(name=mask, type=kind, shape=ir.Shape([len(found)])))
    for index, (name, nodes) in enumerate(linears(graph).items()):
        if passes[name]:
            replace(graph, Group(nodes), found[name], passes[name] == 2, index if mask else None)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=MIN_WEIGHTS)
    onnx.checker.check_model(str(target), full_check=True)
    return describe(target, "int8")


def remove(graph: Path) -> None:
    """Delete a graph file and its data file."""
    for path in (graph, graph.with_name(f"{graph.name}.data")):
        path.unlink(missing_ok=True)


def load(source: Path) -> ir.Model:
    """The graph, with its convolutions unfolded where possible."""
    model = ir.load(source)
    unfold_convolutions(model.graph)
    return model


def linears(graph: ir.Graph) -> dict[Name, list[ir.Node]]:
    """The MatMuls to quantise, grouped by their input's name."""
    found: dict[Name, list[ir.Node]] = {}
    for node in graph:
        if is_linear(node):
            found.setdefault(_input(node, 0).name, []).append(node)
    return found


def is_linear(node: ir.Node) -> bool:
    """Whether a node is a MatMul by a large constant matrix that no other node uses."""
    if node.op_type != "MatMul" or node.domain:
        return False
    weight = _constant(node, 1)
    return (
        weight is not None
        and len(weight.shape) == 2
        and weight.size >= MIN_WEIGHTS
        and len(_input(node, 1).uses()) == 1
    )


def replace(
    graph: ir.Graph, group: Group, quantised: Quantised, twice: bool, index: int | None = None
) -> None:
    """Replace a group: scale each token to its size, add Q/DQ, store int8 weights behind a DequantizeLinear, and
    scale the products back.

    Args:
        twice: compute two passes: the rounding error of the first goes through the same product, as further tokens.
        index: of the mask's entry that the second pass is multiplied by.
    """
    x, norm, first = group.input, group.norm, group.nodes[0]
    coding, name = quantised.coding, str(x.name)
    if norm is not None:
        for position, array in ((1, _array(norm, 1)), (2, _array(norm, 2) - coding.centre)):
            absorbed = _register(graph, f"{name}.norm{position}", array / coding.shares)
            _swap(graph, norm, position, absorbed)

    def add(
        op: str, inputs: list[ir.Value], attributes: dict | None = None, before: ir.Node = first
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        graph.insert_before(before, node)
        return node.outputs[0]

    def constant(name: str, value: float | np.ndarray, dtype: type = np.float32) -> ir.Value:
        return graph.initializers.get(name) or _register(graph, name, np.asarray(value, dtype))

    def rounded(value: ir.Value) -> ir.Value:
        levels = add("QuantizeLinear", [value, scale, zero])
        return add("DequantizeLinear", [levels, scale, zero])

    kind, middle = f"int8.{coding.skew:g}", -2
    last = constant("int8.last", np.array([-1]), np.int64)
    scale, zero = constant(f"{kind}.scale", coding.scale), constant("int8.zero", 0, np.int8)
    below = add("Mul", [add("ReduceMin", [x, last]), constant(f"{kind}.skew", -coding.skew)])
    size = add("Max", [add("ReduceMax", [x, last]), below, constant("int8.tiny", TINY)])
    y = add("Div", [x, size])
    if coding.middle:
        y = add("Sub", [y, constant(f"{kind}.middle", coding.middle)])
    if twice:
        rest = add("Sub", [y, rounded(y)])
        factor = constant("int8.enlarge", 2 * LEVELS)
        if index is not None:
            mask = next(value for value in graph.inputs if value.name == TWICE)
            factor = add("Mul", [factor, add("Gather", [mask, constant(f"int8.{index}", index, np.int64)])])
        y = add("Concat", [y, add("Mul", [rest, factor])], {"axis": middle})
    y = rounded(y)
    start = 0
    for node in group.nodes:
        stop = start + _array(node, 1).shape[1]
        weight_name = _input(node, 1).name
        levels, steps = quantised.weight[:, start:stop], quantised.weight_scale[start:stop]
        weight = constant(f"{weight_name}.int8", levels, np.int8)
        widened = add(
            "DequantizeLinear", [weight, constant(f"{weight_name}.scale", steps)], {"axis": 1}, before=node
        )
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
        if coding.middle:
            lifted = coding.middle * steps * levels.sum(axis=0, dtype=np.int64)
            product = add("Add", [product, constant(f"{weight_name}.middle", lifted)], before=behind)
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
    """Whether a node adds a constant, such as the bias behind a product."""
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
    """Replace an input of a node; remove the old one from the graph if it is a constant without other users."""
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

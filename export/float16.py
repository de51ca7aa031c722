"""fp16 graphs: products with weights and attention's products in float16, everything else in float32.

The precision is written into the graph as Cast nodes, so that every strongly typed builder (TensorRT 10.3 to 11,
TensorRT-RTX) and onnxruntime compute the same. Operations that overflow float16 in vision transformers (LayerNorm,
softmax, the residual stream, biases, norms) stay in float32, and so do the projections of the one row that becomes
the image embedding; inputs and outputs keep their types.

A product with weights is computed on its input divided by 16, and the result is multiplied by 16 in float32: inputs
and results up to a million do not overflow, and a power of two does not change the rounding (values below float16's
normal range have an error of at most 2⁻²⁵ · 16 = 5e-7, far less than values near 1 have). Attention's own products
are not scaled: TensorRT fuses them only when nothing but a cast stands between product and softmax.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..runtime.bundles.bundle import Component
from .onnx_graphs import describe

HEADROOM = 16.0
LARGEST = float(np.finfo(np.float16).max)
HEAD_RANK = 4  # attention's operands are [B, heads, P, d]; text features are not


def export_float16(source: Path, target: Path) -> Component:
    """Convert a float32 graph file to float16 and check the result. Weights are stored as in the source: inside the
    graph file or in a data file beside it.

    Weights are read from the mapped source and converted one at a time.
    """
    model = ir.load(source)
    to_float16(model)
    external = f"{target.name}.data" if source.with_name(f"{source.name}.data").is_file() else None
    ir.save(model, target, external_data=external)
    onnx.checker.check_model(str(target), full_check=True)
    return describe(target, "fp16")


def to_float16(model: ir.Model) -> None:
    """Rewrite a float32 graph in place; a product whose weights exceed float16's range stays in float32."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Conv" and all(map(fits, node.inputs[1:])):
            halve(node)
        elif node.op_type == "MatMul" and fits(node.inputs[1]):
            scale(graph, node)
            halve(node)
        elif node.op_type == "MatMul" and all(rank(value) == HEAD_RANK for value in node.inputs):
            halve(node)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def fits(value: ir.Value | None) -> bool:
    """Whether this is a weight that float16 can hold."""
    weights = value.const_value if value is not None else None
    return weights is not None and float(np.abs(weights.numpy()).max()) <= LARGEST


def rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def scale(graph: ir.Graph, product: ir.Node) -> None:
    """x · W → 16 · ((x / 16) · W), both factors applied in float32."""
    x, result = product.inputs[0], product.outputs[0]
    assert x is not None
    down = ir.node("Mul", [x, constant(graph, "one_sixteenth", 1 / HEADROOM)])
    describe_as(down.outputs[0], x, ir.DataType.FLOAT, f"{result.name}_small")
    graph.insert_before(product, down)
    product.replace_input_with(0, down.outputs[0])
    insert_behind(product, ir.node("Mul", [result, constant(graph, "sixteen", HEADROOM)]), "scaled")


def halve(node: ir.Node) -> None:
    """Compute a node in float16: store its weights in float16, cast its other inputs to it and its result back."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for index, value in enumerate(node.inputs):
        assert value is not None
        half = half_weight(graph, value) if value.const_value is not None else half_input(node, value)
        node.replace_input_with(index, half)
    result = node.outputs[0]
    result.dtype = ir.DataType.FLOAT16
    insert_behind(node, ir.node("Cast", [result], {"to": ir.DataType.FLOAT}), "fp32")


def half_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """A value cast to float16; one Cast node serves all its users."""
    for user in value.consumers():
        if user.op_type == "Cast" and user.outputs[0].dtype == ir.DataType.FLOAT16:
            return user.outputs[0]
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
    describe_as(cast.outputs[0], value, ir.DataType.FLOAT16, f"{value.name}_fp16")
    assert isinstance(node.graph, ir.Graph)
    producer = value.producer()
    if producer is not None:
        node.graph.insert_after(producer, cast)
    else:
        node.graph.insert_before(node.graph[0], cast)
    return cast.outputs[0]


def half_weight(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The weight in float16, under a new name: other nodes may use it in float32."""
    name = f"{value.name}_fp16"
    if name not in graph.initializers:
        weights = value.const_value
        assert weights is not None

        def convert() -> ir.Tensor:
            return ir.Tensor(weights.numpy().astype(np.float16), name=name)

        tensor = ir.LazyTensor(convert, ir.DataType.FLOAT16, ir.Shape(weights.shape.numpy()), name=name)
        add_initializer(graph, name, tensor)
    return graph.initializers[name]


def constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    if name not in graph.initializers:
        add_initializer(graph, name, ir.Tensor(np.array(number, np.float32), name=name))
    return graph.initializers[name]


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> None:
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)


def insert_behind(node: ir.Node, new: ir.Node, suffix: str) -> None:
    """Insert a node between a node's result and the result's users. The graph's outputs keep their names."""
    result = node.outputs[0]
    users = [(user, index) for user, index in result.uses() if user is not new]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    describe_as(new.outputs[0], result, ir.DataType.FLOAT, f"{result.name}_{suffix}")
    graph.insert_after(node, new)
    for user, index in users:
        user.replace_input_with(index, new.outputs[0])
    if result in graph.outputs:
        graph.outputs[graph.outputs.index(result)] = new.outputs[0]
        name = result.name
        result.name = f"{name}_inner"
        new.outputs[0].name = name


def describe_as(value: ir.Value, like: ir.Value, dtype: ir.DataType, name: str) -> None:
    value.name, value.shape, value.dtype = name, like.shape, dtype

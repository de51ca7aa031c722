"""Converts convolutions over a few positions to matrix products, which can then be quantised to int8.

The prompt learner's last convolution is such a one: 5 × 5 over 7 × 7 positions of 1,024 channels gives 9 rows, and its
105 million weights are almost the whole network. As windows [9, 25600] × weights [25600, 4096] it is a MatMul by a
constant, which is quantised like any other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

MIN_WEIGHTS = 1 << 16  # smaller convolutions are not worth converting
MAX_REPEATS = (
    16  # how often the windows may repeat each input on average; 25 · 9 / 49 in the prompt learner's
)


def unfold_convolutions(graph: ir.Graph) -> None:
    """Rewrite every large unpadded Conv with constant weights over a small fixed area; other nodes are unchanged."""
    for node in list(graph):
        area = window_area(node)
        if area is not None:
            unfold(graph, node, *area)


def window_area(node: ir.Node) -> tuple[list[int], list[int]] | None:
    """Sizes of image and kernel if a node can be unfolded, else None."""
    if node.op_type != "Conv" or node.domain:
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None or x.shape is None or len(x.shape) != 4:
        return None
    image = [size for size in x.shape[2:] if isinstance(size, int)]
    if weight.const_value.size < MIN_WEIGHTS or len(image) < 2:
        return None
    kernel = list(weight.const_value.numpy().shape[2:])
    plain = (
        node.attributes.get_int("group", 1) == 1
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and not any(node.attributes.get_ints("pads", [0]))
        and all(stride == 1 for stride in node.attributes.get_ints("strides", [1]))
        and all(step == 1 for step in node.attributes.get_ints("dilations", [1]))
    )
    repeats = np.prod(kernel) * np.prod([i - k + 1 for i, k in zip(image, kernel, strict=True)])
    return (image, kernel) if plain and repeats <= MAX_REPEATS * np.prod(image) else None


def window_indices(image: list[int], kernel: list[int]) -> np.ndarray:
    """int64 [positions, kernel elements]: indices of each position's window in the flattened image."""
    rows = np.arange(image[0] - kernel[0] + 1)[:, None] + np.arange(kernel[0])
    columns = np.arange(image[1] - kernel[1] + 1)[:, None] + np.arange(kernel[1])
    indices = rows[:, None, :, None] * image[1] + columns[None, :, None, :]
    return indices.reshape(len(rows) * len(columns), -1)


def unfold(graph: ir.Graph, conv: ir.Node, image: list[int], kernel: list[int]) -> None:
    """Conv [B, C, h, w] → windows [B, positions, C · k], MatMul, bias, back to [B, N, h', w']."""
    x, weight, result = conv.inputs[0], conv.inputs[1], conv.outputs[0]
    assert x is not None
    assert weight is not None
    assert weight.const_value is not None
    name = f"{weight.name}.unfolded"
    kernels = weight.const_value.numpy()
    matrix = kernels.reshape(len(kernels), -1).T
    indices = window_indices(image, kernel)
    out = [i - k + 1 for i, k in zip(image, kernel, strict=True)]

    def constant(suffix: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"{name}.{suffix}")
        value = ir.Value(
            name=tensor.name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
        )
        graph.register_initializer(value)
        return value

    def shape(suffix: str, *sizes: int) -> ir.Value:
        return constant(suffix, np.array(sizes, np.int64))  # 0: unchanged

    flat = ir.node("Reshape", [x, shape("flat", 0, 0, -1)])
    windows = ir.node("Gather", [flat.outputs[0], constant("indices", indices)], {"axis": 2})
    ordered = ir.node("Transpose", [windows.outputs[0]], {"perm": [0, 2, 1, 3]})
    rows = ir.node("Reshape", [ordered.outputs[0], shape("rows", 0, 0, matrix.shape[0])])
    product = ir.node("MatMul", [rows.outputs[0], constant("matrix", matrix)])
    nodes = [flat, windows, ordered, rows, product]
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], conv.inputs[2]]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1]}))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape("image", 0, 0, *out)]))
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{number}"
        node.outputs[0].type = x.type
    graph.insert_before(conv, nodes)
    result.replace_all_uses_with(nodes[-1].outputs[0])
    graph.remove(conv, safe=True)
    if not weight.uses():
        graph.initializers.pop(str(weight.name))

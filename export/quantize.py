"""INT8 as Q/DQ nodes in the ONNX graph: weights per output channel, activations per token, both symmetric.

Every large MatMul with constant weights gets int8 weights and an int8 input. Its output stays float32, and so does all
between the MatMuls: LayerNorm, softmax, GELU, attention's own products. One file serves every device: TensorRT takes
symmetric constant scales only, and onnxruntime on x86 turns the signed inputs into the unsigned ones that VNNI
multiplies.

Each token is divided by its own largest value first, so a constant scale fits all of them. A scale that calibration
fixes would clip what the calibration images do not have, and a defect is just that (measured at full size: maps of
images unlike the calibration's decorrelated five times more). Where tokens are one-sided, as behind GELU, whose least
value is -0.17, half of a symmetric range would stay empty: they are moved down by a constant share of their size
(``SKEWS``; a quarter of the error's variance at full size).

Calibration gives the rest. Each channel's centre is taken off where a LayerNorm does that for nothing, and outlier
channels are equalised there, channel j divided by s_j and row j of the weights multiplied by it, s_j = max|x_j|^α /
max|w_j|^(1−α) (SmoothQuant, Xiao et al., ICML 2023). Weights are rounded one input channel after the other, each making
up for the errors of those before it on the calibration tokens (GPTQ, Frantar et al., ICLR 2023, as LDLQ, Chee et al.,
NeurIPS 2023); what is left of their mean goes into the bias.

How much is left alone is found by measurement (``choose_passes``). A layer may be computed in two passes, its rounded
input and then what the rounding left, 254 times enlarged: 15 bits of input for two int8 products, half the time of
float32 and none of its memory. Beyond that it stays float32. onnxruntime's own quantiser is not used: it holds the
model in memory several times over, and its equalising takes another framework.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from ..runtime.bundle import Component
from ..runtime.engines import Engine
from ..runtime.engines.onnxruntime import open_session
from ..runtime.inspector import default_threads
from .onnx_graphs import describe
from .unfold import unfold_convolutions

LEVELS = 127
MIN_WEIGHTS = 1 << 10  # a smaller MatMul is not worth its nodes
MAX_TOKENS = 2048  # of all calibration images together, evenly spread; an image's CLS token is the first
MAX_TRIED = 512  # tokens on which ways to code them are compared
MAX_CHANNELS = 5120  # whose covariance is held at once
DAMPING = 0.01  # of the mean variance, in every direction: calibration has not seen all there is
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)  # α; 0: not equalised
SKEWS = (1.0, 16.0)  # how much further tokens may reach upwards than downwards
DEPTHS = 8  # parts of the network, from input to output, whose layers of one shape are measured together
BLOCK = 128  # rows whose errors are passed on together
TINY = np.float32(1e-12)
TWICE = "twice"  # the input by which layers of a probe are computed in one pass (0) or two (1)

Name = str | None
Reach = Callable[[float], None]
Item = TypeVar("Item")
Passes = Mapping[Name, int]  # input's name → int8 products; 0: float32


class Trial(Protocol):
    """Measures a network in place of the float32 one."""

    @property
    def limit(self) -> float:
        """The largest error that is accepted."""
        ...

    def open(self, component: Component) -> Engine:
        """An engine for a file beside the float32 one."""
        ...

    def errors(self, engine: Engine, quick: bool = False) -> np.ndarray:
        """[S]: of every sample, or of a few; errors of independent parts add up."""
        ...


@dataclass
class Group:
    """The MatMuls that share one input x of K channels; what calibration saw of it."""

    nodes: list[ir.Node]
    tokens: np.ndarray  # float32 [R, K]

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
class Coding:
    """How a token x becomes int8: z = (x - centre) / shares, its size the larger of max z and -skew · min z; what is
    rounded is z / size - middle, in steps of ``scale``."""

    centre: np.ndarray  # float32 [K]
    shares: np.ndarray  # float32 [K]
    skew: float = 1.0

    @property
    def middle(self) -> float:
        return (1 - 1 / self.skew) / 2

    @property
    def scale(self) -> float:
        return (1 + 1 / self.skew) / 2 / LEVELS

    def spread(self, tokens: np.ndarray) -> np.ndarray:
        """z [R, K]."""
        return (tokens - self.centre) / self.shares

    def rounded(self, tokens: np.ndarray) -> np.ndarray:
        """z [R, K] as one pass sees it."""
        z = self.spread(tokens)
        size = np.maximum(z.max(axis=1, keepdims=True), -self.skew * z.min(axis=1, keepdims=True))
        size = np.maximum(size, TINY)
        return (np.rint((z / size - self.middle) / self.scale) * self.scale + self.middle) * size


@dataclass
class Quantised:
    """x @ W in int8.

    Attributes:
        weight: int8 [K, N].
        weight_scale: float32 [N].
        bias: float32 [N]: what the product lacks in the mean.
    """

    coding: Coding
    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray


def nowhere(share: float) -> None:
    """Nobody watches."""


def to_int8(
    source: Path,
    target: Path,
    batches: Sequence[dict[str, np.ndarray]],
    trial: Trial | None = None,
    reach: Reach = nowhere,
) -> Component:
    """Quantise a float32 graph.

    Args:
        source: the graph; only read.
        target: the graph to write, with its weights beside it in ``<target>.data``.
        batches: inputs by name, run one after the other; at least one.
        trial: decides which layers are computed in two passes or in float32; without it none is.
        reach: told which share of the work is done, 0 to 1.

    Returns:
        The written component; its inputs and outputs are the source's.
    """
    names = list(linears(load(source).graph))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".calibration.") as folder:
        run = watched(batches, len(batches), lambda share: reach(share / 3))
        groups = calibrate(source, run, Path(folder), max(1, MAX_TOKENS // len(batches)))
        rounded = watched(map(quantise, groups), len(names), lambda share: reach((1 + share) / 3))
        found = dict(zip(names, rounded, strict=True))
    passes = dict.fromkeys(found, 1)
    if trial:
        passes = choose_passes(source, target, found, trial, lambda share: reach((2 + share) / 3))
    return write(source, target, found, passes)


def watched(items: Iterable[Item], count: int, reach: Reach) -> Iterator[Item]:
    """The items; each is done when the next one is asked for."""
    for index, item in enumerate(items):
        reach(index / count)
        yield item


def choose_passes(
    source: Path, target: Path, found: Mapping[Name, Quantised], trial: Trial, reach: Reach = nowhere
) -> dict[Name, int]:
    """As few products as ``trial`` accepts: as many layers in two passes as it asks for; where two for all are not
    enough, as many in float32, in the same order."""
    probe = write(source, target.with_name(f".probe.{target.name}"), found, dict.fromkeys(found, 2), TWICE)
    try:
        order, count = choose_twice(trial.open(probe), found, trial, reach)
    finally:
        remove(target.with_name(probe.file))
    if count is not None:
        return {name: 2 if name in flat(order[:count]) else 1 for name in found}

    def passes_of(count: int) -> dict[Name, int]:
        return {name: 0 if name in flat(order[:count]) else 2 for name in found}

    def accepts(count: int) -> bool:
        component = write(source, target, found, passes_of(count))
        return bool(trial.errors(trial.open(component)).max() <= trial.limit)

    return passes_of(bisect_left(range(len(order)), True, key=accepts))


def choose_twice(
    probe: Engine, found: Mapping[Name, Quantised], trial: Trial, reach: Reach
) -> tuple[list[list[Name]], int | None]:
    """Layers, a few of one shape at a time, by what their second pass gains; how many get one.

    What a part adds to the error when it alone is computed in one pass, over the products that a second pass costs,
    orders the parts; how many get one is found by bisection. One graph that can compute any layers in one pass or
    two serves all measurements.

    Args:
        probe: the graph with the input ``TWICE``.

    Returns:
        All parts, the most rewarding first, and how many of them have to be computed in two passes; None where all
        of them are not enough.
    """

    def errors(twice: Iterable[Name], quick: bool = False) -> np.ndarray:
        return trial.errors(Masked(probe, found, twice), quick)

    def accepts(count: int) -> bool:
        return bool(errors(flat(order[:count])).max() <= trial.limit)

    order = parts_of(found)
    if accepts(0):
        return order, 0
    floor = errors(found, quick=True)
    gains = [
        (errors(set(found) - set(part), quick=True) - floor).sum()
        / sum(found[name].weight.size for name in part)
        for part in watched(order, len(order), reach)
    ]
    order = [order[i] for i in np.argsort(gains)[::-1]]
    count = bisect_left(range(1, len(order) + 1), True, key=accepts) + 1
    return order, count if count <= len(order) else None


def parts_of(found: Mapping[Name, Quantised]) -> list[list[Name]]:
    """The layers of one shape, cut into at most ``DEPTHS`` runs from input to output; of every shape."""
    shapes: dict[tuple[int, ...], list[Name]] = {}
    for name, quantised in found.items():
        shapes.setdefault(quantised.weight.shape, []).append(name)
    return [
        [names[i] for i in part]
        for names in shapes.values()
        for part in np.array_split(np.arange(len(names)), min(DEPTHS, len(names)))
    ]


def flat(parts: Iterable[Sequence[Name]]) -> set[Name]:
    return {name for part in parts for name in part}


class Masked:
    """A probe with these of its layers in two passes and the others in one; an engine like the network's own."""

    def __init__(self, probe: Engine, layers: Iterable[Name], twice: Iterable[Name]) -> None:
        chosen = set(twice)
        self._probe = probe
        self._mask = np.array([name in chosen for name in layers], np.float32)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Engine.run``."""
        return self._probe.run(**inputs, **{TWICE: self._mask})

    def close(self) -> None:
        """See ``Engine.close``."""
        self._probe.close()


def remove(graph: Path) -> None:
    for path in (graph, graph.with_name(f"{graph.name}.data")):
        path.unlink(missing_ok=True)


def write(
    source: Path, target: Path, found: Mapping[Name, Quantised], passes: Passes, mask: str = ""
) -> Component:
    """The graph with each layer in so many passes.

    Args:
        mask: name of an input [layers] that is multiplied with what the second passes see.
    """
    model = load(source)
    graph = model.graph
    if mask:
        kind = ir.TensorType(ir.DataType.FLOAT)
        graph.inputs.append(ir.Value(name=mask, type=kind, shape=ir.Shape([len(found)])))
    for index, (name, nodes) in enumerate(linears(graph).items()):
        if passes[name]:
            layer = Group(nodes, np.empty(0))
            replace(graph, layer, found[name], passes[name] == 2, index if mask else None)
    ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=MIN_WEIGHTS)
    onnx.checker.check_model(str(target), full_check=True)
    return describe(target, "int8")


def load(source: Path) -> ir.Model:
    """The graph with its convolutions unfolded where they can be."""
    model = ir.load(source)
    unfold_convolutions(model.graph)
    return model


def linears(graph: ir.Graph) -> dict[Name, list[ir.Node]]:
    """The MatMuls that are worth quantising, by their input's name."""
    found: dict[Name, list[ir.Node]] = {}
    for node in graph:
        if is_linear(node):
            found.setdefault(_input(node, 0).name, []).append(node)
    return found


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


def calibrate(
    source: Path, batches: Iterable[dict[str, np.ndarray]], folder: Path, tokens: int = MAX_TOKENS
) -> Iterator[Group]:
    """Run the float32 graph on the batches and watch the inputs of every MatMul that is worth quantising.

    Args:
        folder: keeps the tokens, gigabytes of them at full size, of which one group's are read at a time.
        tokens: so many of each batch's images are kept, evenly spread.
    """
    groups = linears(load(source).graph)
    observed = source.with_name(f".calibration.{source.name}")  # beside the source's external data
    try:
        write_observed(source, list(groups), observed)
        session = open_session(observed, "cpu", default_threads())
        for batch in batches:
            for index, values in enumerate(session.run(list(groups), batch)):
                length = values.shape[1]
                spread = np.linspace(0, length - 1, min(length, tokens)).astype(int)
                with open(folder / str(index), "ab") as file:
                    values[:, spread].tofile(file)
        del session
    finally:
        remove(observed)
    for index, nodes in enumerate(groups.values()):
        channels = _array(nodes[0], 1).shape[0]
        yield Group(nodes, np.memmap(folder / str(index), np.float32, "r").reshape(-1, channels))


def write_observed(source: Path, names: Sequence[Name], target: Path) -> None:
    """The graph with the named values [B, L, K] as more outputs."""
    model = load(source)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    ir.save(model, target)


def quantise(group: Group) -> Quantised:
    """Code the tokens in the way that leaves the smallest error on them, and round the weights to match."""
    weight = np.concatenate([_array(node, 1) for node in group.nodes], axis=1)
    tokens = np.asarray(group.tokens)
    coding = choose_coding(group, weight)
    scaled = weight * coding.shares[:, None]
    scale = scale_of(scaled)
    z = coding.spread(tokens)
    mean, z_mean = tokens.mean(axis=0), z.mean(axis=0)
    rounded = round_weights(scaled / scale, z - z_mean)
    bias = mean @ weight - (z_mean @ rounded.astype(np.float32)) * scale
    return Quantised(coding, rounded, scale, bias)


def choose_coding(group: Group, weight: np.ndarray) -> Coding:
    """Centred and equalised where a LayerNorm takes it in, elsewhere one-sided or not; by the error of the output."""
    tokens = group.tokens[:: -(-len(group.tokens) // MAX_TRIED)]
    exact = tokens @ weight
    if group.norm is None:
        zeros, ones = np.zeros_like(weight[:, 0]), np.ones_like(weight[:, 0])
        codings = [Coding(zeros, ones, skew) for skew in SKEWS]
    else:
        centre = group.tokens.mean(axis=0)
        peaks = np.abs(group.tokens - centre).max(axis=0)
        codings = [Coding(centre, shares_of(strength, peaks, weight)) for strength in STRENGTHS]

    def error(coding: Coding) -> float:
        scaled = weight * coding.shares[:, None]
        scale = scale_of(scaled)
        found = coding.rounded(tokens) @ (np.rint(scaled / scale) * scale) + coding.centre @ weight
        return float(np.linalg.norm(found - exact))

    return min(codings, key=error)


def shares_of(strength: float, peaks: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """s [K] of an equalisation; 1 for a strength of 0."""
    if not strength:
        return np.ones_like(peaks)
    shares = np.maximum(peaks, TINY) ** strength
    shares /= np.maximum(np.abs(weight).max(axis=1), TINY) ** (1 - strength)
    return shares / np.exp(np.log(shares).mean())  # the LayerNorm's scale keeps its size


def scale_of(weight: np.ndarray) -> np.ndarray:
    """A step [N] of each output channel."""
    return np.maximum(np.abs(weight).max(axis=0), TINY) / LEVELS


def round_weights(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[K, N] in steps → int8, so that tokens [R, K] @ it change little; ``MAX_CHANNELS`` of K at a time."""
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), MAX_CHANNELS):
        part = slice(start, start + MAX_CHANNELS)
        rounded[part] = round_in_turn(weight[part], feedback_of(tokens[:, part]))
    return rounded


def feedback_of(tokens: np.ndarray) -> np.ndarray:
    """[K, K], U of tokensᵀ tokens = U D Uᵀ, upper with a diagonal of 1: LDLQ's feedback."""
    covariance = tokens.T @ tokens
    diagonal = np.einsum("kk->k", covariance)
    diagonal += DAMPING * diagonal.mean() + TINY
    factor = np.linalg.cholesky(covariance[::-1, ::-1])[::-1, ::-1]
    return factor / np.diagonal(factor)


def round_in_turn(weight: np.ndarray, feedback: np.ndarray) -> np.ndarray:
    """Round row after row, each with the share of all earlier rows' errors that it can make up for."""
    rounded = np.empty(weight.shape, np.int8)
    errors = np.zeros_like(weight)
    for start in range(0, len(weight), BLOCK):
        stop = min(start + BLOCK, len(weight))
        wanted = weight[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for row in range(start, stop):
            exact = wanted[row - start] + feedback[start:row, row] @ errors[start:row]
            rounded[row] = np.clip(np.rint(exact), -LEVELS, LEVELS)
            errors[row] = weight[row] - rounded[row]
    return rounded


def replace(
    graph: ir.Graph, group: Group, quantised: Quantised, twice: bool, index: int | None = None
) -> None:
    """Tokens to their size, Q/DQ, int8 weights behind a DequantizeLinear, and back to size.

    Args:
        twice: what the first rounding leaves goes through the same product, as more tokens.
        index: of the mask's entry by which it is multiplied.
    """
    x, norm, first = group.input, group.norm, group.nodes[0]
    coding, name = quantised.coding, str(x.name)
    if norm is not None:
        for position, array in ((1, _array(norm, 1)), (2, _array(norm, 2) - coding.centre)):
            taken_in = _register(graph, f"{name}.norm{position}", array / coding.shares)
            _swap(graph, norm, position, taken_in)

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

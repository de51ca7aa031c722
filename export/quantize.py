"""Networks as int8, ONNX to ONNX, calibrated on images: ``rounding.py`` says how tokens and weights become int8,
``int8_graph.py`` writes the nodes, ``passes.py`` measures how much of it a network bears.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.bundles.bundle import Component
from ..runtime.common.machine import default_threads
from ..runtime.vision.engines.onnxruntime import open_session
from .int8_graph import Group, Name, linears, load, remove, write
from .passes import Trial, choose_passes
from .progress import Reach, nowhere, watched
from .rounding import quantise

MAX_TOKENS = 2048  # of all calibration images together, evenly spread; an image's CLS token is the first


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
        found_each = (quantise(np.asarray(t), group.weight, group.norm is not None) for group, t in groups)
        rounded = watched(found_each, len(names), lambda share: reach((1 + share) / 3))
        found = dict(zip(names, rounded, strict=True))
    passes = dict.fromkeys(found, 1)
    if trial:
        passes = choose_passes(source, target, found, trial, lambda share: reach((2 + share) / 3))
    return write(source, target, found, passes)


def calibrate(
    source: Path, batches: Iterable[dict[str, np.ndarray]], folder: Path, tokens: int = MAX_TOKENS
) -> Iterator[tuple[Group, np.ndarray]]:
    """Run the float32 graph on the batches and watch the inputs of every MatMul that is worth quantising.

    Args:
        folder: keeps the tokens, gigabytes of them at full size, of which one group's are read at a time.
        tokens: so many of each batch's images are kept, evenly spread.

    Returns:
        The MatMuls, and the tokens of their input, float32 [R, K].
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
        group = Group(nodes)
        yield group, np.memmap(folder / str(index), np.float32, "r").reshape(-1, len(group.weight))


def write_observed(source: Path, names: Sequence[Name], target: Path) -> None:
    """The graph with the named values [B, L, K] as more outputs."""
    model = load(source)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    ir.save(model, target)

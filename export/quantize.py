"""Converts networks to int8, ONNX to ONNX, calibrated on images: ``rounding.py`` quantises tokens and weights,
``int8_graph.py`` writes the nodes, ``passes.py`` measures which layers can be int8.
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
from .progress import OnProgress, ignore_progress, with_progress
from .rounding import quantise

MAX_TOKENS = 2048  # of all calibration images together, evenly spaced; an image's CLS token is its first


def to_int8(
    source: Path,
    target: Path,
    batches: Sequence[dict[str, np.ndarray]],
    trial: Trial | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Component:
    """Quantise a float32 graph.

    Args:
        source: the graph; only read.
        target: the graph to write, with its weights beside it in ``<target>.data``.
        batches: calibration inputs by name, run one after the other; at least one.
        trial: decides which layers are computed in two passes or in float32; without it, all take one pass.
        on_progress: called with the share of the work that is done, 0 to 1.

    Returns:
        The written component; its inputs and outputs are the source's.
    """
    names = list(linears(load(source).graph))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".calibration.") as folder:
        run = with_progress(batches, len(batches), lambda share: on_progress(share / 3))
        groups = calibrate(source, run, Path(folder), max(1, MAX_TOKENS // len(batches)))
        found_each = (quantise(np.asarray(t), group.weight, group.norm is not None) for group, t in groups)
        rounded = with_progress(found_each, len(names), lambda share: on_progress((1 + share) / 3))
        found = dict(zip(names, rounded, strict=True))
    passes = dict.fromkeys(found, 1)
    if trial:
        passes = choose_passes(source, target, found, trial, lambda share: on_progress((2 + share) / 3))
    return write(source, target, found, passes)


def calibrate(
    source: Path, batches: Iterable[dict[str, np.ndarray]], folder: Path, tokens: int = MAX_TOKENS
) -> Iterator[tuple[Group, np.ndarray]]:
    """Run the float32 graph on the batches and record the inputs of every MatMul to quantise.

    Args:
        source: the graph.
        batches: inputs by name.
        folder: for files with the tokens, gigabytes at full size; those of one group are read at a time.
        tokens: how many tokens of each image are kept, evenly spaced.

    Yields:
        The MatMuls that share an input, and the tokens of that input, float32 [R, K].
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
    """Write the graph with the named values [B, L, K] as additional outputs."""
    model = load(source)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    ir.save(model, target)

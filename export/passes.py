"""Chooses by measurement which layers of an int8 network are computed in one pass, in two, or in float32.

In two passes, a layer multiplies its rounded input, then the rounding error, enlarged 254 times: 15 bits of input for
two int8 products, in half the time of float32 and without its weights. If two passes are not enough, a layer stays
float32.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..runtime.bundles.bundle import Component
from ..runtime.vision.engines import Engine
from .int8_graph import TWICE, Name, remove, write
from .progress import OnProgress, ignore_progress, with_progress
from .rounding import Quantised

DEPTHS = (
    8  # groups along the network, from input to output; layers of one shape in a group are measured together
)


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
        """float [S]: the error of every sample, or of a few if ``quick``; errors of independent layers add up."""
        ...


def choose_passes(
    source: Path,
    target: Path,
    found: Mapping[Name, Quantised],
    trial: Trial,
    on_progress: OnProgress = ignore_progress,
) -> dict[Name, int]:
    """Passes of each layer (0: float32), with the fewest products that ``trial`` accepts.

    As many layers as necessary get two passes; if two passes for all layers are not enough, as many as necessary
    stay in float32, in the same order.
    """
    probe = write(source, target.with_name(f".probe.{target.name}"), found, dict.fromkeys(found, 2), TWICE)
    try:
        order, count = choose_twice(trial.open(probe), found, trial, on_progress)
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
    probe: Engine, found: Mapping[Name, Quantised], trial: Trial, on_progress: OnProgress
) -> tuple[list[list[Name]], int | None]:
    """Order groups of layers by the benefit of a second pass, and find how many groups need one.

    The benefit of a group is the error that it adds when it alone is computed in one pass, divided by the number of
    products of its second pass. The number of groups is found by bisection. One graph that can compute any layer in
    one pass or two serves all measurements.

    Args:
        probe: the graph with the input ``TWICE``.

    Returns:
        All groups, the largest benefit first, and how many of them need two passes; None if all of them are not
        enough.
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
        for part in with_progress(order, len(order), on_progress)
    ]
    order = [order[i] for i in np.argsort(gains)[::-1]]
    count = bisect_left(range(1, len(order) + 1), True, key=accepts) + 1
    return order, count if count <= len(order) else None


def parts_of(found: Mapping[Name, Quantised]) -> list[list[Name]]:
    """The layers of each shape, split into at most ``DEPTHS`` groups from input to output."""
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
    """An engine that runs the probe with the layers ``twice`` in two passes and the others in one."""

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

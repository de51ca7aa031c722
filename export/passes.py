"""Which layers of an int8 network are computed in one pass, in two, or not in int8 at all; by measurement.

A layer may be computed in two passes, its rounded input and then what the rounding left, 254 times enlarged: 15 bits of
input for two int8 products, half the time of float32 and none of its memory. Beyond that it stays float32.
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
from .progress import Reach, nowhere, watched
from .rounding import Quantised

DEPTHS = 8  # parts of the network, from input to output, whose layers of one shape are measured together


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

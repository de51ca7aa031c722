"""Networks run on a frame's views in batches, so that their memory does not grow with the number of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from .engines import Engine

# Matrix products work on blocks of rows, and round the last, incomplete block differently. With batches of a multiple
# of the usual blocks (4, 6 and 12 rows), every row is in the same block as in one batch, which gives the same bits.
BATCH_VIEWS = 12
LEAST_VIEWS = 4  # in the last batch; fewer are added to the batch before it

Progress = Callable[[str, int, int], None]  # the stage, views that have passed it, and views of the frame


def batches(num_views: int) -> list[slice]:
    """Consecutive slices of a frame's views: of 12 views, the last one of 4 to 15, or of all if there are fewer."""
    edges = [*range(0, num_views, BATCH_VIEWS), num_views]
    if len(edges) > 2 and num_views - edges[-2] < LEAST_VIEWS:
        del edges[-2]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def run_in_batches(
    engine: Engine,
    views: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray] | None = None,
    *,
    stage: str = "",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Run a network on all views of a frame.

    Args:
        engine: the network.
        views: its inputs whose first axis is the views.
        shared: its other inputs.
        stage: name of the stage for ``progress``.
        progress: called after each batch if there are several.

    Returns:
        Its outputs by name, with the views on the first axis; the same bits as of one batch.
    """
    shared = shared or {}
    num_views = len(next(iter(views.values())))
    parts = batches(num_views)
    if len(parts) == 1:
        return engine.run(**views, **shared)
    outputs: dict[str, np.ndarray] = {}
    for part in parts:
        found = engine.run(**{name: array[part] for name, array in views.items()}, **shared)
        for name, array in found.items():
            if name not in outputs:
                outputs[name] = np.empty((num_views, *array.shape[1:]), array.dtype)
            outputs[name][part] = array
        if progress is not None:
            progress(stage, part.stop, num_views)
    return outputs

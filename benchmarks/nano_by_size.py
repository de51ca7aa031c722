"""How small a defect does the bundled model catch?

Held-out products, one normal sample each: share of defective parts whose sentence says so, by the share of the
frame that is defective, and the share of good parts that are called defective.

    python benchmarks/nano_by_size.py
"""

from __future__ import annotations

import itertools

import numpy as np
from rich.console import Console
from rich.table import Table

from anomalygpt_edge.models.nano.data import held_out_families, held_out_samples
from anomalygpt_edge.runtime.inspector import Inspector
from anomalygpt_edge.runtime.verdict import Status

NUM_FAMILIES, NUM_PARTS = 44, 10  # as written by models.nano.holdout
NUM_REFERENCES = 4  # drawn there too, so that the queries are the same parts; only the first is enrolled
EDGES = (0.0, 0.002, 0.005, 0.02, 1.0)


def main() -> None:
    areas, caught, false_alarms = [], [], []
    with Inspector.open() as inspector:
        for family in held_out_families(NUM_FAMILIES):
            references, good, bad = held_out_samples(family, NUM_REFERENCES, NUM_PARTS, NUM_PARTS)
            inspector.use(inspector.make_bank([references[0].pixels]))
            false_alarms += [inspector.inspect(part.pixels).status == Status.FAIL for part in good]
            caught += [inspector.inspect(part.pixels).status == Status.FAIL for part in bad]
            areas += [part.mask.mean() for part in bad]
    table = Table("defective share of the frame", "parts", "caught", title="nano, 1 normal sample")
    for low, high in itertools.pairwise(EDGES):
        inside = (np.array(areas) >= low) & (np.array(areas) < high)
        table.add_row(f"{low:.1%} to {high:.1%}", str(inside.sum()), f"{np.array(caught)[inside].mean():.0%}")
    table.add_row("good parts called defective", str(len(false_alarms)), f"{np.mean(false_alarms):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()

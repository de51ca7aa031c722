"""How fast does the demo line run, and how long does each stage take?

Parts are drawn beforehand and inspected back to back, including the sentence, each with its product's memory bank.
Each row of the table is a stage of ``Inspector.inspect``; "whole" is the time of the complete inspection. "NumPy" is
the median with the NumPy references instead of the compiled kernels, measured alternately with them.

    python benchmarks/demo_line.py [--bundle DIR] [--inspections 500] [--threads N] [--device NAME]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from anomalygpt_edge import kernels
from anomalygpt_edge.runtime.cameras import Frame, open_camera
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.station.run import enroll_demo_products, identify

RESULTS = Path(__file__).parent / "results"
NUM_COMPARED = 100  # inspections with the NumPy references, each followed by one with the kernels
NUM_FRAMES = 60  # drawn once and inspected in turn
WARM_UP = 20
SHARES = (50, 90, 99, 99.9)
TARGET_PER_SECOND = 20.0


def main() -> None:
    options = parse_options()
    try:
        results = measure(options)
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print_table(results)
    path = options.results / f"{results['device']}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored, "demo_line": results}, indent=2) + "\n")
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="bundle folder; by default the bundled model")
    parser.add_argument(
        "--inspections",
        type=int,
        default=500,
        help="number of inspections; 459 within a limit bound the 99th percentile with 99 %% confidence",
    )
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads of an inspection")
    parser.add_argument("--device", default=device_name(), help="name of the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict:
    """All figures of the run; times in milliseconds."""
    with Inspector.open(options.bundle, threads=options.threads) as inspector:
        products = enroll_demo_products(inspector)
        frames = list(open_camera("demo", num_parts=min(NUM_FRAMES, options.inspections)).frames())

        def inspect(frame: Frame) -> dict[str, float]:
            started = time.perf_counter()
            inspector.use(products[frame.product])
            assert frame.pixels is not None
            verdict = inspector.inspect(frame.pixels)
            whole = 1e3 * (time.perf_counter() - started)
            statuses[verdict.status.value] = statuses.get(verdict.status.value, 0) + 1
            return {**verdict.timings_ms, "whole": whole}

        statuses: dict[str, int] = {}
        for index in range(WARM_UP):
            inspect(frames[index % len(frames)])
        statuses.clear()
        gc.collect()
        gc.freeze()
        load = os.getloadavg()[0]
        started = time.perf_counter()
        rows = [inspect(frames[index % len(frames)]) for index in range(options.inspections)]
        seconds = time.perf_counter() - started
        counted = dict(statuses)
        return {
            "device": options.device,
            "processor": processor_name(),
            "threads": options.threads,
            "load_before": round(load, 2),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("numpy", "onnxruntime", "llama-cpp-python")},
            "bundle": inspector.bundle.manifest.name,
            "bundle_sha256": identify(inspector.bundle).bundle_sha256,
            "inspections": options.inspections,
            "inspections_per_second": round(options.inspections / seconds, 2),
            "statuses": counted,
            "stages_ms": {stage: spread([row.get(stage, 0.0) for row in rows]) for stage in rows[0]},
            "in_turns_p50_ms": compare(inspect, frames, min(NUM_COMPARED, options.inspections)),
        }


def compare(
    inspect: Callable[[Frame], dict[str, float]], frames: list[Frame], count: int
) -> dict[str, dict[str, float]]:
    """Medians by stage with the NumPy references and with the kernels, alternately on the same frames."""
    rows: dict[str, list[dict[str, float]]] = {"reference": [], kernels.active(): []}
    # the first two are not counted: each implementation prepares the memory bank in its own layout
    for index in range(-2, count):
        for name, found in rows.items():
            with kernels.using(name):
                row = inspect(frames[index % len(frames)])
            if index >= 0:
                found.append(row)
    return {
        name: {
            stage: round(float(np.median([row.get(stage, 0.0) for row in found])), 3) for stage in found[0]
        }
        for name, found in rows.items()
    }


def spread(times_ms: list[float]) -> dict[str, float]:
    """Mean, percentiles and maximum."""
    figures = {"mean": float(np.mean(times_ms))}
    figures |= {f"p{share}": float(np.percentile(times_ms, share)) for share in SHARES}
    figures["max"] = max(times_ms)
    return {name: round(value, 3) for name, value in figures.items()}


def processor_name() -> str:
    """The processor's name in the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_name() -> str:
    """A file name for this machine: its processor and how many CPUs this process may use."""
    plain = re.sub(r"\(.*?\)|CPU|Processor|@.*", " ", processor_name())
    return re.sub(r"[^a-z0-9]+", "-", f"{plain} {default_threads()} cpu".lower()).strip("-")


def print_table(results: dict) -> None:
    title = f"{results['bundle']} on {results['processor']}, {results['threads']} threads"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("stage, ms")
    columns = list(results["stages_ms"]["whole"])
    for name in columns:
        table.add_column(name, justify="right")
    in_turns = results["in_turns_p50_ms"]
    for name in in_turns:
        table.add_column(f"{name}, p50" if name != "reference" else "NumPy, p50", justify="right")
    for stage, figures in results["stages_ms"].items():
        values = [figures[name] for name in columns] + [each[stage] for each in in_turns.values()]
        table.add_row(stage, *(f"{value:.2f}" for value in values), style="bold" if stage == "whole" else "")
    console = Console()
    console.print(table)
    rate = results["inspections_per_second"]
    counts = ", ".join(f"{count} {status}" for status, count in results["statuses"].items())
    print(f"{rate:.1f} inspections a second (target {TARGET_PER_SECOND:.0f}); {counts}")
    if results["load_before"] > 0.5:
        print(
            f"the load before the run was {results['load_before']}: other programs were running and may have slowed "
            "the inspections down"
        )


if __name__ == "__main__":
    main()

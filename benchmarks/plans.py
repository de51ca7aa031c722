"""What does building TensorRT-RTX plans without a GPU take? Reports seconds, memory and size of each network.

    python benchmarks/plans.py FOLDER [--capabilities 8.9] [--results DIR]

FOLDER contains the graphs of encoder, decoder and prompt learner in one precision: a bundle, or only graphs. Each plan
is built in a separate process, as by ``agpt export``; its peak resident memory is read when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("encoder", "decoder", "prompt_learner")


def main() -> None:
    options = parse_options()
    try:
        builder = version("tensorrt-rtx")
    except PackageNotFoundError:
        print("skipped: tensorrt-rtx is not installed (pip install 'anomalygpt-edge[tensorrt-rtx]')")
        return
    if options.folder is None:
        print("skipped: give a folder with the three graphs, such as a bundle")
        return
    figures = {
        name: measure(next(options.folder.glob(f"{name}*.onnx")), options.capabilities.split(","))
        for name in NETWORKS
    }
    entry = {"tensorrt_rtx": builder, "capabilities": options.capabilities, "networks": figures}
    path = options.results / "plans.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored, options.name: entry}, indent=2) + "\n")
    print(json.dumps({options.name: entry}, indent=2))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder with the three graphs")
    parser.add_argument("--name", default="fp16", help="name of the figures in the results' file")
    parser.add_argument("--capabilities", default="8.9", help="compute capabilities, comma-separated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    return parser.parse_args()


def measure(graph: Path, capabilities: list[str]) -> dict[str, float]:
    """Build one plan and measure its process (Linux: ru_maxrss is in KiB)."""
    from anomalygpt_edge.export.onnx_graphs import describe
    from anomalygpt_edge.export.tensorrt_plan import Job, PlanOptions

    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        target = Path(folder) / "network.plan"
        options = PlanOptions("tensorrt-rtx", tuple(capabilities))
        job = Job(str(graph), describe(graph), str(target), options, capabilities)
        command = [
            sys.executable,
            "-m",
            "anomalygpt_edge.export.tensorrt_plan",
            msgspec.json.encode(job).decode(),
        ]
        started = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"{Path(__file__).name}: {graph} does not build (status {status})")
        weights = graph.with_name(f"{graph.name}.data")
        return {
            "seconds": round(seconds, 1),
            "peak_resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
            "plan_mb": round(target.stat().st_size / 1e6, 1),
            "graph_mb": round(
                sum(path.stat().st_size for path in (graph, weights) if path.is_file()) / 1e6, 1
            ),
        }


if __name__ == "__main__":
    main()

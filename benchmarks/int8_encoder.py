"""How much faster is the int8 encoder than float32, in torch and in onnxruntime?

    python benchmarks/int8_encoder.py FP32/encoder.onnx INT8/encoder.int8.onnx [--threads 2,1] [--results DIR]

All three run alternately in one process, on the same pixels, with a batch of 1; the figures are medians. torch's
encoder has the same shape and random weights, as its time does not depend on them. Predicted for ViT-H/14 on two cores
before measuring: 323 GFLOP of products with weights at 700 GOP/s take 0.46 s, attention, GELU, softmax, norms and
memory copies 0.33 s: in total 0.79 s against torch's 1.9 s, 2.4 times faster. Measured: the products take the
predicted time, the rest half of it.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch

from anomalygpt_edge.export.onnx_graphs import describe
from anomalygpt_edge.models.imagebind import VisionConfig, VisionEncoder
from anomalygpt_edge.runtime.vision.engines import open_engine

RESULTS = Path(__file__).parent / "results"
RUNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("graphs", type=Path, nargs="*", help="the encoder in float32 and in int8")
    parser.add_argument("--threads", default="2,1", help="numbers of threads, comma-separated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    if len(options.graphs) != 2:
        print("skipped: give two graphs (see the top of this file)")
        return
    figures = {
        f"{threads} threads": measure(options.graphs, threads)
        for threads in map(int, options.threads.split(","))
    }
    packages = {name: version(name) for name in ("torch", "onnxruntime")}
    kinds = [node.op_type for node in onnx.load(options.graphs[1], load_external_data=False).graph.node]
    layers = {
        "one pass": kinds.count("QuantizeLinear") - 2 * kinds.count("Split"),
        "two passes": kinds.count("Split"),
    }
    path = options.results / "int8_encoder.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{layers['two passes']} of {sum(layers.values())} layers in two passes"
    results = {title: {**figures, "layers": layers, "packages": packages}}
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, **results}, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measure(graphs: list[Path], threads: int) -> dict[str, float]:
    """Median milliseconds of each, and its speed relative to torch."""
    names = ("onnxruntime fp32", "onnxruntime int8")
    engines = {
        name: open_engine(path, describe(path), threads) for name, path in zip(names, graphs, strict=True)
    }
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    torch.set_num_threads(threads)
    module, tensor = VisionEncoder(VisionConfig()).eval(), torch.from_numpy(pixels)

    def run_torch() -> None:
        with torch.inference_mode():
            module(tensor)

    runs = {"torch fp32": run_torch} | {
        name: (lambda engine=engine: engine.run(pixels=pixels)) for name, engine in engines.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(RUNS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if attempt:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = {f"{name}, times faster": medians["torch fp32"] / value for name, value in medians.items()}
    return {name: round(value, 2) for name, value in {**medians, **ratios}.items()}


if __name__ == "__main__":
    main()

"""How fast are the kernels, compared with usual implementations and with the limits of the machine?

Every figure is a median of runs that alternate with the implementations that it is compared with, in one process, on 1
and 2 threads.

Predictions from operations and bytes, made before writing the kernels, for a 2.6 GHz Zen 4 (32 FLOP and 128 int8
operations per cycle and core), with the measurements in brackets:

- preprocess, 1920 × 1080 BGR8, crop: the horizontal pass computes 1080 × 224 sums of 6 blocks of 4 taps. With vpdpbusd
  a block of four rows takes 1 load and 3 products: about 50 instructions for 4 sums, 3 million in total, plus 1 million
  for spreading the rows and 0.3 million for the vertical pass: 0.8 ms on one core, 0.45 ms on two. It reads 3.5 MB,
  which takes 0.3 ms to copy. (Measured: 0.97 and 1.33 ms alternating with the others, 0.85 and 0.5 to 0.6 ms back to
  back. After a pause the frame has to be read from memory and the second thread has to wake up, which the instruction
  count does not include.)
- match, 4 taps × 256 × 1280 × 1024: 2.7 GFLOP. A tile of 16 × 16 sums takes 16 products and 17 loads per step. Two load
  ports hide the loads, so it reaches the rate of the product unit, like the BLAS. int8 computes four times as many
  products per instruction but has to round the queries: 3 to 3.5 times as fast as float32. (Measured: 1.13 times the
  BLAS's rate, which also writes the similarities; int8 3.3 and 3.2 times.)
- match_places, 4 normal images, 2 taps of 28 × 28 patches × 64, radius 2: a vector of products for each of 4 × 2 × 784
  patches, 5 rows and 64 values, 2 million; at two a cycle 0.4 ms on one core, half of it on two, plus 0.1 ms to
  transpose the part's patches. (Measured on a busy machine with AVX2: 0.9 to 1.0 ms on one core.)
- localise, 4 taps: 200,000 sigmoids of about 25 vector operations over 16 lanes: 0.15 ms. The composition of standard
  operations computes full-size planes of two classes × four taps and two exponentials per value: over 2 ms.
- localise, second version, from 0.14 ms: an exponential of 9 vector operations instead of 17, one division for four
  taps instead of four by adding fractions, and column positions computed once for all rows: half the time, 0.07 ms.
  (Measured: 0.075 ms. It uses only one thread, as waking another takes about half of that time.)
- project, upright boxes: a column's position on the map does not depend on the row. With tables of columns, a pixel
  takes two loads and four operations, 1.5 ns, instead of two float64 coordinates and four comparisons. (Measured
  alternating with the earlier version: 25 → 2.9 ms for a 1080p frame cropped to its centre, 60 → 6.9 ms for nine tiles
  of it.)
- cell_peaks, nine cells of a map: 50,000 values, 16 lanes, 5 instructions: 6 us; NumPy's nine maxima 30 us.
  (Measured: 7 and 24 us.)
- zero-shot, nano's decoder with the map in its graph, against logits and localise: made so that one kernel computes
  every map; the gain was not predicted. (Measured: 7 to 11 ms against 0.4 to 0.6 ms, 5 to 7.5 ms on two threads.
  onnxruntime resizes eight planes value by value, and moves the classes to the inner axis and back for its softmax.)

    python benchmarks/kernels.py [--device NAME] [--results DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from anomalygpt_edge import kernels
from anomalygpt_edge.export.onnx_graphs import DecoderGraph, Graph, export_graph
from anomalygpt_edge.kernels import Box
from anomalygpt_edge.models.image_decoder import ImageDecoder
from anomalygpt_edge.runtime.vision.engines import open_engine

RESULTS = Path(__file__).parent / "results"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = 224
THREADS = (1, 2)
NUM_ROUNDS, RUNS_IN_A_ROW, PAUSE_SECONDS = 9, 4, 0.1
TAPS, PATCHES, WIDTH, BANK = 4, 256, 1280, 1024
NANO_WIDTH, NANO_EMBED = 128, 64
TARGETS = {  # smallest ratio
    "preprocess / Pillow": 3.0,
    "preprocess / OpenCV": 1.5,
    "8 boxes / one box": 1.0,
    "match float32 / sgemm": 0.8,
    "match int8 / float32": 2.5,
    "localise / torch": 5.0,
    "localise / NumPy": 5.0,
}


def main() -> None:
    from demo_line import device_name, processor_name

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default=device_name(), help="name of the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    results = {
        "processor": processor_name(),
        "implementation": kernels.active(),
        "threads": {str(threads): measure(threads) for threads in THREADS},
        "accuracy": accuracy(),
    }
    print_tables(results)
    path = options.results / f"{options.device}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored, "kernels": results}, indent=2) + "\n")
    print(f"written to {path}")


def measure(threads: int) -> dict:
    """Milliseconds, ratios and rates on this number of threads."""
    cv2.setNumThreads(threads)
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        parts = [pixels(threads), boxes(threads), matching(threads), maps(threads), zero_shot(threads)]
    times = {name: round(ms, 4) for part in parts for name, ms in part.items()}
    return {"ms": times, **derive(times)}


def derive(ms: dict[str, float]) -> dict:
    """Ratios and rates of a set of times."""
    flop, read = 2e-9 * TAPS * PATCHES * WIDTH * BANK, 1080 * 1080 * 3
    return {
        "ratios": {
            "preprocess / Pillow": ms["Pillow + NumPy"] / ms["preprocess"],
            "preprocess / OpenCV": ms["OpenCV area + blob, crop only"] / ms["preprocess"],
            "8 boxes / one box": ms["one box of 4K"] / (ms["8 boxes of 4K"] / 8),
            "match float32 / sgemm": ms["sgemm"] / ms["match float32"],
            "match int8 / float32": ms["match float32"] / ms["match int8"],
            "localise / torch": ms["localise by torch"] / ms["localise"],
            "localise / NumPy": ms["localise by NumPy"] / ms["localise"],
            "upsample / reference": ms["upsample by NumPy"] / ms["upsample"],
            "cell_peaks / NumPy": ms["cell_peaks by NumPy"] / ms["cell_peaks"],
            "zero-shot / map in the graph": ms["decoder with the map"] / ms["decoder and localise"],
        },
        "rates": {
            "preprocess, ns a pixel read": 1e6 * ms["preprocess"] / (1080 * 1080),
            "preprocess, GB/s read": 1e-6 * read / ms["preprocess"],
            "copy, GB/s read": 1e-6 * read / ms["copy of what is read"],
            "sgemm, GFLOP/s": 1e3 * flop / ms["sgemm"],
            **{
                f"match {name}, GOP/s": 1e3 * flop / ms[f"match {name}"]
                for name in ("float32", "float16", "int8")
            },
        },
    }


def take_turns(work: dict[str, Callable[[], object]], num_rounds: int = NUM_ROUNDS) -> dict[str, float]:
    """Median milliseconds of each function; they run alternately, so that disturbances affect all alike.

    There is a pause between two of them: the threads of BLAS and OpenMP spin for a while after their work, and would
    take a core from the next function.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(num_rounds):
        for name, function in work.items():
            time.sleep(PAUSE_SECONDS)
            function()
            for _ in range(RUNS_IN_A_ROW):
                started = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def pixels(threads: int) -> dict[str, float]:
    frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (MEAN, STD))
    copied = np.empty((1080, 1080, 3), np.uint8)

    def pillow() -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))
        image = image.resize((398, SIZE), Image.Resampling.BICUBIC).crop((87, 0, 87 + SIZE, SIZE))
        return (np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255 - mean) / std

    def opencv(cut: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        small = cv2.resize(cut, size, interpolation=cv2.INTER_AREA)
        left = (size[0] - SIZE) // 2
        blob = small[:, left : left + SIZE, ::-1].transpose(2, 0, 1).astype(np.float32)
        return (blob * np.float32(1 / 255) - mean) / std

    return take_turns(
        {
            "preprocess": lambda: kernels.preprocess(frame, SIZE, "crop", MEAN, STD, threads=threads),
            "preprocess, stretch": lambda: kernels.preprocess(
                frame, SIZE, "stretch", MEAN, STD, threads=threads
            ),
            "Pillow + NumPy": pillow,
            "OpenCV area + blob, whole frame": lambda: opencv(frame, (398, SIZE)),
            "OpenCV area + blob, crop only": lambda: opencv(frame[:, 420:1500], (SIZE, SIZE)),
            "copy of what is read": lambda: np.copyto(copied, frame[:, 420:1500]),
        }
    )


def boxes(threads: int) -> dict[str, float]:
    frame = np.random.default_rng(0).integers(0, 256, (2160, 3840, 3), dtype=np.uint8)
    eight = [Box(960 * (i % 4), 1080 * (i // 4), 960, 960) for i in range(8)]

    def cut(chosen: list[Box]) -> np.ndarray:
        return kernels.preprocess(frame, SIZE, "crop", MEAN, STD, boxes=chosen, threads=threads)

    # "one box" alternates between the eight boxes: the same pixels, so the same cache misses.
    turn = iter(range(10**9))
    return take_turns(
        {"one box of 4K": lambda: cut([eight[next(turn) % 8]]), "8 boxes of 4K": lambda: cut(eight)}
    )


def matching(threads: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, TAPS, PATCHES, WIDTH)).astype(np.float32)
    bank = rng.normal(size=(TAPS, BANK, WIDTH)).astype(np.float32)
    out = np.empty((PATCHES, BANK), np.float32)
    work: dict[str, Callable[[], object]] = {
        "sgemm": lambda: [np.matmul(features[0, tap], bank[tap].T, out=out) for tap in range(TAPS)],
    }
    for name in ("float32", "float16", "int8"):
        prepared = kernels.prepare_bank(bank, name)
        work[f"match {name}"] = lambda prepared=prepared: kernels.match(features, prepared, threads=threads)
    gains = rng.random((TAPS, BANK), np.float32)
    work["match_scaled int8"] = lambda: kernels.match_scaled(features, prepared, gains, threads=threads)
    normals = kernels.normalise(rng.normal(size=(4, 2, 784, 64)).astype(np.float32))  # lite: 28 x 28 patches
    part = rng.normal(size=(1, 2, 784, 64)).astype(np.float32)
    work["match_places"] = lambda: kernels.match_places(part, normals, 2, threads=threads)
    return take_turns(work)


def maps(threads: int) -> dict[str, float]:
    logits = np.random.default_rng(0).normal(size=(1, TAPS, PATCHES, 2)).astype(np.float32) * 5
    planes = torch.from_numpy(logits).permute(0, 1, 3, 2).reshape(TAPS, 2, 16, 16).contiguous()
    weights = np.maximum(0, 1 - np.abs(np.linspace(0, 15, SIZE)[:, None] - np.arange(16))).astype(np.float32)
    patch_map = np.ascontiguousarray(logits[:, 0, :, 0])
    found = kernels.localise(logits, SIZE)[0]

    def by_torch() -> torch.Tensor:
        large = F.interpolate(planes, size=SIZE, mode="bilinear", align_corners=True)
        return large.softmax(dim=1)[:, 1].mean(dim=0)

    def by_numpy() -> np.ndarray:
        large = weights @ planes.numpy() @ weights.T
        large = np.exp(large - large.max(axis=1, keepdims=True))
        return (large[:, 1] / large.sum(axis=1)).mean(axis=0)

    def by_reference() -> np.ndarray:
        with kernels.using("reference"):
            return kernels.upsample(patch_map, SIZE)

    def by_slices() -> list[float]:
        cells = [slice(0, 75), slice(75, 150), slice(150, SIZE)]
        return [float(found[rows, columns].max()) for rows in cells for columns in cells]

    return take_turns(
        {
            "localise": lambda: kernels.localise(logits, SIZE, threads=threads),
            "localise by torch": by_torch,
            "localise by NumPy": by_numpy,
            "upsample": lambda: kernels.upsample(patch_map, SIZE, threads=threads),
            "upsample by NumPy": by_reference,
            "summarise": lambda: kernels.summarise(found),
            "cell_peaks": lambda: kernels.cell_peaks(found, 3),
            "cell_peaks by NumPy": by_slices,
            "components": lambda: kernels.components(found, 0.6),
            "project to 1080p": lambda: kernels.project(
                found[None], None, "crop", (1080, 1920), threads=threads
            ),
        }
    )


def zero_shot(threads: int) -> dict[str, float]:
    """nano's decoder with random weights: as exported, and with upsampling, softmax and mean in its graph."""
    decoder = ImageDecoder(NANO_WIDTH, NANO_EMBED).requires_grad_(False)
    rng = np.random.default_rng(0)
    inputs = {
        "patch_features": torch.tensor(rng.normal(size=(2, TAPS, PATCHES, NANO_WIDTH)).astype(np.float32)),
        "text_features": F.normalize(torch.ones(2, NANO_EMBED), dim=-1),
    }
    one = {
        name: array.numpy()[:1] if name == "patch_features" else array.numpy()
        for name, array in inputs.items()
    }
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, module in (("patch_logits", DecoderGraph(decoder)), ("anomaly_map", decoder)):
            graph = Graph(name, module, inputs, (name,), fixed=("text_features",))
            component = export_graph(graph, Path(folder))
            engines[name] = open_engine(Path(folder) / component.file, component, threads)

    def in_two() -> np.ndarray:
        return kernels.localise(engines["patch_logits"].run(**one)["patch_logits"], SIZE, threads=threads)

    return take_turns(
        {"decoder and localise": in_two, "decoder with the map": lambda: engines["anomaly_map"].run(**one)}
    )


def accuracy() -> dict:
    """Errors of ``match`` against float64, on queries from near duplicates of the bank's patches to unrelated ones."""
    rng = np.random.default_rng(1)
    bank = rng.normal(size=(TAPS, BANK, WIDTH))
    query = bank[:, rng.integers(0, BANK, PATCHES)]
    query = query + rng.normal(size=query.shape) * np.linspace(0.1, 2, PATCHES)[:, None]
    query, bank = query.astype(np.float32), bank.astype(np.float32)
    unit = [each.astype(np.float64) for each in (query, bank)]
    unit = [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in unit]
    truth = 1 - (unit[0] @ unit[1].transpose(0, 2, 1)).max(axis=-1).mean(axis=0)
    found = {}
    for name in ("float32", "float16", "int8"):
        distance = kernels.match(query[None], kernels.prepare_bank(bank, name))[0].astype(np.float64)
        found[name] = {
            "largest error": float(np.abs(distance - truth).max()),
            "correlation": float(np.corrcoef(distance, truth)[0, 1]),
        }
    return found


def print_tables(results: dict) -> None:
    for title in ("ms", "ratios", "rates"):
        table = Table(title=f"{title}, {results['implementation']}", box=box.SIMPLE_HEAD)
        for column in (title, *(f"{threads} threads" for threads in THREADS), "target"):
            table.add_column(column, justify="right" if column != title else "left")
        columns = [results["threads"][str(threads)][title] for threads in THREADS]
        for name in columns[0]:
            goal = TARGETS.get(name) if title == "ratios" else None
            table.add_row(name, *(f"{each[name]:.3f}" for each in columns), f"{goal:.1f}" if goal else "")
        Console().print(table)
    for name, figures in results["accuracy"].items():
        print(f"match {name}: largest error {figures['largest error']:.1e}, r = {figures['correlation']:.6f}")


if __name__ == "__main__":
    main()

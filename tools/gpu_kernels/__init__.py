"""Checks the CUDA kernels on a GPU: results, compute-sanitizer, and speed relative to the GPU's ceilings.

    python -m tools.gpu_kernels [--json FILE]

The ceilings (memory copies, tensor cores) are measured in the same run; times are measured by events with a cold L2
cache. The exit status is 1 when a result is wrong, and 0 without a GPU. ``make gpu-check`` calls ``check_kernels``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from anomalygpt_edge import kernels
from anomalygpt_edge.kernels import Box, cuda, prepare_bank, tile_grid
from anomalygpt_edge.kernels.cuda import compiler, stages
from anomalygpt_edge.kernels.cuda.driver import DeviceArray, Driver, PycudaDriver, get, open_device, put
from anomalygpt_edge.kernels.dequantise import BLOCKS
from anomalygpt_edge.kernels.geometry import placements

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS = 600
REPEATS, WARM_UP = 50, 5
FLUSH_BYTES = 256 << 20  # at least twice the L2; filling it takes longer than queueing the launches
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Case:
    """One stage with its inputs and expected outputs.

    Attributes:
        arrays: the stage's arguments, on the device.
        outputs: the stage's outputs on the device, in the order of ``expected``.
        tolerance: largest absolute error.
        num_bytes: least number of bytes read and written.
        operations: multiplications and additions; 0 where only memory traffic is rated.
        ceiling: the tensor cores' type for these operations, "f16" or "i8".
    """

    name: str
    stage: Callable[..., DeviceArray]
    arrays: tuple[DeviceArray, ...]
    outputs: tuple[DeviceArray, ...]
    expected: tuple[np.ndarray, ...]
    tolerance: float
    num_bytes: int
    operations: int = 0
    ceiling: str = "f16"


@dataclass
class Result:
    """The result of one case; times in microseconds, None where it was not timed."""

    name: str
    error: float
    tolerance: float
    median_us: float | None = None
    p99_us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    of_copy_ceiling: float | None = None
    of_tensor_ceiling: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass
class Report:
    device: str = ""
    skipped: str = ""  # why nothing ran
    ceilings: dict[str, float] = field(default_factory=dict)  # GB/s copied, TFLOP/s f16, TOP/s i8
    results: list[Result] = field(default_factory=list)
    sanitizer: dict[str, str] = field(
        default_factory=dict
    )  # tool → "clean", its report, or why it did not run
    graph: str = ""

    @property
    def passed(self) -> bool:
        clean = all(text == "clean" or text.startswith("skipped") for text in self.sanitizer.values())
        return all(result.passed for result in self.results) and clean and not self.graph.startswith("wrong")


def check_kernels(say: Callable[[str], None] = print) -> Report:
    """Run all checks; ``say`` is called with a line for each result."""
    if not cuda.runs_here():
        say("kernels: skipped, because there is no NVIDIA GPU with its driver and pycuda")
        return Report(skipped="no NVIDIA GPU, driver or pycuda")
    driver = open_device()
    with driver.current():
        report = Report(device=driver.cuda.Device(0).name())
    report.ceilings = measure_ceilings(driver)
    units = {"copy": "GB/s copied", "f16": "TFLOP/s float16", "i8": "TOP/s int8"}
    reached = ", ".join(f"{value:.0f} {units[kind]}" for kind, value in report.ceilings.items())
    say(f"kernels on {report.device}: at most {reached}")
    if "f16" not in report.ceilings:
        say("the tensor cores' ceilings are not measured, because there is no nvcc")
    for case in cases(driver):
        result = check(driver, case)
        add_times(result, case, time_cold(driver, case), report.ceilings)
        report.results.append(result)
        say(line(result))
    report.graph = check_graph(driver)
    say(f"CUDA graph: {report.graph}")
    for tool in SANITIZER_TOOLS:
        report.sanitizer[tool] = run_sanitizer(tool)
        say(f"compute-sanitizer {tool}: {report.sanitizer[tool]}")
    return report


def check(driver: Driver, case: Case) -> Result:
    """Run a case once and compare its outputs."""
    case.stage(*case.arrays)
    error = 0.0
    for output, expected in zip(case.outputs, case.expected, strict=True):
        found = get(driver, output).astype(np.float64)
        both = np.isnan(found) & np.isnan(expected)
        error = float(
            np.maximum(error, np.where(both, 0, np.abs(found - expected)).max())
        )  # np.maximum keeps NaN
    return Result(case.name, error, case.tolerance)


def cases(driver: Driver, *, small: bool = False) -> Iterator[Case]:
    """Every stage at the sizes of docs/cuda.md, or at small sizes for a sanitizer."""
    yield from _preprocess_cases(driver, (270, 480) if small else (1080, 1920), 56 if small else 224)
    yield from _match_cases(driver, (1, 2, 64, 128) if small else (1, 4, 256, 1280), 300 if small else 1024)
    yield from _place_cases(driver, (1, 2, 49, 64) if small else (1, 2, 784, 64))
    if not small:
        yield from _match_cases(driver, (1, 4, 256, 1280), 20_000)
    yield from _map_cases(driver, 56 if small else 224, (108, 192) if small else (1080, 1920))
    for shape in ((56, 70),) if small else ((224, 224), (1080, 1920)):
        yield from _region_cases(driver, shape)
    yield from _coreset_cases(driver, (2, 60, 32) if small else (4, 2_000, 1280), 5 if small else 10)
    yield from _prompt_cases(driver, 8 if small else 100, 512 if small else 4096)


def _preprocess_cases(driver: Driver, frame_size: tuple[int, int], size: int) -> Iterator[Case]:
    height, width = frame_size
    rng = np.random.default_rng(0)
    tilted = [Box(width / 4, height / 4, width / 3, height / 2, 30.0)]
    every: list[tuple[Any, list[Box] | None]] = [
        *((format, None) for format in kernels.FORMATS),
        ("BGR8", tilted),
    ]
    for format, boxes in every:
        channels = {"BGR8": (3,), "RGB8": (3,), "YUYV": (2,)}.get(format, ())
        rows = height * 3 // 2 if format == "NV12" else height
        frame = rng.integers(0, 256, (rows, width, *channels), dtype=np.uint8)
        stage = stages.Preprocess(driver, frame_size, size, "crop", MEAN, STD, format=format, boxes=boxes)
        with kernels.using("reference"):
            expected = kernels.preprocess(
                frame, size, "crop", MEAN, STD, format=format, boxes=boxes, dtype=np.float16
            )
        share = height / width if boxes is None else 1 / 6  # share of the frame that is read
        yield Case(
            f"preprocess {format} {width}x{height}{' rotated' if boxes else ''}", stage, (put(driver, frame),),
            (stage.out,), (expected.astype(np.float64),), 0.0, int(frame.nbytes * share) + expected.nbytes,
        )  # fmt: skip


def _match_cases(driver: Driver, shape: tuple[int, int, int, int], num_rows: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(shape[1], num_rows, shape[3])).astype(np.float32)
    picks = rng.integers(0, num_rows, shape[:1] + shape[2:3])
    # Queries resemble rows of the bank, as patches of good parts do.
    near = raw[:, picks].transpose(1, 0, 2, 3)
    features = (near + rng.normal(size=shape)).astype(np.float16)
    operations = 2 * shape[0] * shape[2] * shape[1] * num_rows * shape[3]
    for dtype, tolerance in ((np.float16, 1e-3), (np.int8, 5e-3)):
        bank = prepare_bank(raw, dtype)
        stage = stages.Match(driver, stages.DeviceBank.of(driver, bank), shape)
        yield Case(
            f"match {np.dtype(dtype).name}, {num_rows:,} rows", stage, (put(driver, features),), (stage.distance,),
            (_distance(features, raw),), tolerance, bank.rows.nbytes + 3 * features.nbytes, operations,
            "i8" if dtype == np.int8 else "f16",
        )  # fmt: skip
    # Each query has one row that is much nearer than the others, so that the gains are known.
    gains = rng.random((shape[1], num_rows), np.float32)
    bank = prepare_bank(raw, np.int8)
    scaled = stages.Match(driver, stages.DeviceBank.of(driver, bank), shape, gains=gains)
    assert scaled.scaled is not None
    expected = sum(gains[tap, picks] * _distance(features[:, [tap]], raw[[tap]]) for tap in range(shape[1]))
    yield Case(
        f"match in units, {num_rows:,} rows", scaled, (put(driver, features),), (scaled.distance, scaled.scaled),
        (_distance(features, raw), expected), 5e-3 * shape[1], bank.rows.nbytes + 3 * features.nbytes, operations,
        "i8",
    )  # fmt: skip


def _place_cases(driver: Driver, shape: tuple[int, int, int, int]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=shape).astype(np.float16)
    reference = kernels.normalise(rng.normal(size=(4, *shape[1:])).astype(np.float32))
    stage = stages.MatchPlaces(driver, reference, shape, 2)
    expected = np.empty((shape[0], 4, *shape[1:3]), np.float32)
    kernels.reference.match_places(features.astype(np.float32), reference, 2, expected, 1)
    yield Case(
        "match_places, 4 images", stage, (put(driver, features),), (stage.distance,), (expected.astype(np.float64),),
        1e-5, reference.nbytes + features.nbytes + expected.nbytes,
    )  # fmt: skip


def _map_cases(driver: Driver, size: int, frame_size: tuple[int, int]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(1, 4, 256, 2)) * 5).astype(np.float16)
    localise = stages.Localise(driver, logits.shape, size)
    difference = logits[..., 1].astype(np.float64) - logits[..., 0]
    softmax = (1 / (1 + np.exp(-_upsample(difference[0], size)))).mean(axis=0)[None]
    yield Case(
        "localise",
        localise,
        (put(driver, logits),),
        (localise.out,),
        (softmax,),
        1e-5,
        localise.out.shape[1] ** 2 * 4,
    )
    patch_map = rng.random((1, 256)).astype(np.float32)
    upsample = stages.Upsample(driver, (1, 256), size)
    yield Case(
        "upsample", upsample, (put(driver, patch_map),), (upsample.out,),
        (_upsample(patch_map.astype(np.float64), size),), 1e-5, size * size * 4,
    )  # fmt: skip
    boxes = tile_grid(*frame_size, frame_size[0] // 2, 0.25)
    maps = rng.random((len(boxes), size, size)).astype(np.float32)
    project = stages.Project.of_boxes(driver, boxes, size, "stretch", frame_size)
    expected = np.zeros(frame_size, np.float32)
    kernels.reference.project(maps, placements(boxes, size, "stretch"), expected, 1)
    yield Case(
        f"project {len(boxes)} tiles", project, (put(driver, maps),), (project.out,), (expected.astype(np.float64),),
        1e-4, maps.nbytes + expected.nbytes,
    )  # fmt: skip
    values = rng.random((size, size)).astype(np.float32)
    count = max(1, round(0.01 * values.size))
    summarise = stages.Summarise(driver, values.size, count)
    highest = np.sort(values.ravel().astype(np.float64))[-count:].mean()
    figures = np.array([values.max(), values.min(), np.median(values.astype(np.float64)), highest])
    yield Case(
        "summarise",
        summarise,
        (put(driver, values),),
        (summarise.figures,),
        (figures,),
        1e-6,
        5 * values.nbytes,
    )


def _region_cases(driver: Driver, shape: tuple[int, int]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    coarse = rng.random((-(-shape[0] // 8), -(-shape[1] // 8)))
    values = coarse.repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]] + 0.3 * rng.random(shape)
    values = values.astype(np.float32)
    peaks = stages.CellPeaks(driver, shape, 3)
    components = stages.Components(driver, shape)
    with kernels.using("reference"):
        cells = kernels.cell_peaks(values, 3)
        found = kernels.components(values, 0.8)
    _, labels = cv2.connectedComponents((values >= np.float32(0.8)).astype(np.uint8), connectivity=8)
    first = np.sort(np.unique(labels, return_index=True)[1][1:])  # label 0 is the background
    x, y, width, height, area, peak = map(np.array, zip(*found, strict=True))
    bits = (peak.astype(np.float32).view(np.uint32) | 0x80000000).view(np.int32)  # peaks are positive
    expected = np.stack([first, x, x + width, y + height, area, bits], axis=1)
    regions = DeviceArray(components.regions.address, expected.shape, np.dtype(np.int32))
    size = f"{shape[1]}x{shape[0]}"
    yield Case(
        f"cell_peaks {size}", peaks, (put(driver, values),), (peaks.out,), (cells.astype(np.float64),), 0.0,
        values.nbytes,
    )  # fmt: skip
    yield Case(
        f"components {size}", lambda array: components(array, 0.8), (put(driver, values),),
        (components.count, regions), (np.array([len(found)], np.float64), expected.astype(np.float64)), 0.0,
         10 * values.nbytes,
    )  # fmt: skip


def _coreset_cases(driver: Driver, shape: tuple[int, int, int], picks: int) -> Iterator[Case]:
    rows = kernels.normalise(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    stage = stages.Coreset(driver, shape, picks)
    with kernels.using("reference"):
        expected = kernels.coreset(rows, picks)
    yield Case(
        f"coreset, {picks} of {shape[1]:,} rows", stage, (put(driver, rows),), (stage.chosen,),
        (expected.astype(np.float64),), 0.0, (picks + 2) * rows.nbytes, 2 * (picks + 1) * rows.size,
    )  # fmt: skip


def _prompt_cases(driver: Driver, length: int, width: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    injected = rng.normal(size=(length // 2, width)).astype(np.float32)
    for type, (values, block_bytes) in BLOCKS.items():
        # Bytes below 60 give no scale that is NaN.
        table = rng.integers(0, 60, (1000, width // values * block_bytes), dtype=np.uint8)
        ids = np.where(np.arange(length) % 2, -1, rng.integers(0, len(table), length))
        stage = stages.PackPrompt(driver, put(driver, table), type, ids)
        with kernels.using("reference"):
            expected = kernels.pack_prompt(table, type, ids, injected)
        yield Case(
            f"pack_prompt {type}", stage, (put(driver, injected),), (stage.out,), (expected.astype(np.float64),), 0.0,
            expected.nbytes + injected.nbytes + table[:length // 2].nbytes,
        )  # fmt: skip


def _distance(features: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """1 − largest cosine similarity, mean over taps, in float64."""
    queries = features.astype(np.float64)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    rows = raw.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return 1 - np.mean([(queries[:, tap] @ rows[tap].T).max(axis=-1) for tap in range(len(rows))], axis=0)


def _upsample(patches: np.ndarray, size: int) -> np.ndarray:
    """float64 [B, G * G] → [B, size, size], bilinear with aligned corners."""
    grid = round(patches.shape[1] ** 0.5)
    weights = np.maximum(0, 1 - np.abs(np.linspace(0, grid - 1, size)[:, None] - np.arange(grid)))
    return weights @ patches.reshape(-1, grid, grid) @ weights.T


def measure_ceilings(driver: PycudaDriver) -> dict[str, float]:
    """Measured throughput of copies and tensor cores: {"copy": GB/s read and written, "f16": TFLOP/s, "i8": TOP/s}.

    Without nvcc there is only "copy", because the tensor cores' kernel is compiled for the device.
    """
    source, target = (driver.allocate(FLUSH_BYTES) for _ in range(2))
    copies = _events(
        driver, lambda: driver.cuda.memcpy_dtod_async(target, source, FLUSH_BYTES, driver.stream)
    )
    target_code = "{}{}".format(*driver.compute_capability)
    kinds = (("f16", 16), ("i8", 32)) if compiler.find_nvcc() else ()
    code = compiler.compile_for_device("ceilings", target_code, Path(__file__).parent) if kinds else b""
    blocks, steps, warps, sums = 4 * driver.num_multiprocessors, 4096, 8, 8
    ceilings = {"copy": 2 * FLUSH_BYTES / np.median(copies) / 1e3}
    for kind, depth in kinds:
        with driver.current():
            kernel = driver.cuda.module_from_buffer(code).get_function(f"ceiling_{kind}")
            kernel.prepare("Pi")
        times = _events(driver, lambda: driver.launch(kernel, (blocks, 1, 1), (256, 1, 1), target, steps))  # noqa: B023
        ceilings[kind] = blocks * warps * steps * sums * 2 * 16 * 8 * depth / np.median(times) / 1e6
    for address in (source, target):
        driver.free(address)
    return ceilings


def time_cold(driver: PycudaDriver, case: Case) -> np.ndarray:
    """Microseconds of every repetition; before each, the L2 is filled with other data."""
    flush = driver.allocate(FLUSH_BYTES)
    words = FLUSH_BYTES // 4
    times = _events(
        driver, lambda: case.stage(*case.arrays),
        before=lambda: driver.cuda.memset_d32_async(flush, 0, words, driver.stream),
    )  # fmt: skip
    driver.free(flush)
    return times


def _events(
    driver: PycudaDriver, call: Callable[[], Any], before: Callable[[], Any] = lambda: None
) -> np.ndarray:
    with driver.current():
        pairs = [(driver.cuda.Event(), driver.cuda.Event()) for _ in range(WARM_UP + REPEATS)]
        for start, end in pairs:
            before()
            start.record(driver.stream)
            call()
            end.record(driver.stream)
        driver.stream.synchronize()
        return np.array([1e3 * end.time_since(start) for start, end in pairs[WARM_UP:]])


def add_times(result: Result, case: Case, times_us: np.ndarray, ceilings: dict[str, float]) -> None:
    result.median_us, result.p99_us = float(np.median(times_us)), float(np.percentile(times_us, 99))
    result.gb_per_s = case.num_bytes / result.median_us / 1e3
    result.of_copy_ceiling = result.gb_per_s / ceilings["copy"]
    if case.operations:
        result.tflop_per_s = case.operations / result.median_us / 1e6
        if case.ceiling in ceilings:
            result.of_tensor_ceiling = result.tflop_per_s / ceilings[case.ceiling]


def check_graph(driver: PycudaDriver) -> str:
    """Compare a frame's stages captured in one CUDA graph with single launches; returns the outcome and both times."""
    from anomalygpt_edge.runtime.vision.engines.gpu import Graph

    parts = list(_preprocess_cases(driver, (1080, 1920), 224))[:1] + list(
        _map_cases(driver, 224, (1080, 1920))
    )

    def enqueue() -> None:
        for part in parts:
            part.stage(*part.arrays)

    enqueue()
    one_by_one = [get(driver, output) for part in parts for output in part.outputs]
    graph = Graph()
    with driver.current():
        with graph.capture(driver.stream.handle):
            enqueue()
        for part in parts:
            for output in part.outputs:
                driver.cuda.memset_d32_async(
                    output.address, 0, get(driver, output).nbytes // 4, driver.stream
                )
        graph.launch(driver.stream.handle)
        captured = [get(driver, output) for part in parts for output in part.outputs]
        times = [
            np.median(_events(driver, call)) for call in (enqueue, lambda: graph.launch(driver.stream.handle))
        ]
        graph.close()
    if not all(np.array_equal(*pair, equal_nan=True) for pair in zip(one_by_one, captured, strict=True)):
        return "wrong: a captured frame differs from one launched kernel by kernel"
    return f"the same results; {times[0]:.0f} us launched one by one, {times[1]:.0f} us as a graph"


def run_sanitizer(tool: str) -> str:
    """Run all cases at small sizes in a process under compute-sanitizer; returns "clean" or why not."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return "skipped: compute-sanitizer was not found (the CUDA toolkit contains it)"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tools.gpu_kernels",
        "--small",
    ]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it took over {SANITIZER_SECONDS} s"
    return "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


def line(result: Result) -> str:
    verdict = "ok   " if result.passed else "WRONG"
    text = f"{verdict} {result.name:38} error {result.error:.1e} of {result.tolerance:.0e}"
    if result.median_us is not None:
        text += f"  {result.median_us:9.1f} us, p99 {result.p99_us:9.1f}"
        text += f"  {result.gb_per_s:7.0f} GB/s ({result.of_copy_ceiling:.0%} of copying)"
    if result.tflop_per_s is not None:
        text += f"  {result.tflop_per_s:6.1f} T/s"
    if result.of_tensor_ceiling is not None:
        text += f" ({result.of_tensor_ceiling:.0%} of tensor cores)"
    return text


def as_json(report: Report) -> dict[str, Any]:
    return {**asdict(report), "passed": report.passed}

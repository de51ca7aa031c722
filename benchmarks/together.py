"""How much time does judging several parts in one pass of the language model save?

``LanguageModel.answer_all`` judges 1, 2, 4 and 8 parts, alternately in one run: demo-line parts with the bundled model,
and parts of a model with the layers of LLaMA-7B (generated weights, q4_k_m). Calls of ``llama_decode`` are counted, and
the answers must equal those of the parts judged one by one.

    python benchmarks/together.py [--rounds 20] [--layers 2] [--gguf FILE] [--threads N] [--device NAME]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from demo_line import RESULTS, device_name, processor_name
from one_pass import demo_parts, describe
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.language.answer import Part
from anomalygpt_edge.runtime.language.model import LanguageModel

COUNTS = (1, 2, 4, 8)
WAYS = {"step by step": False, "with drafts": True}


def compare(model: LanguageModel, parts: list[Part], rounds: int) -> dict:
    """Milliseconds and passes per part, by way and number of parts; within a round, all judge the same eight parts."""
    decode = model.session.decode
    num_passes = 0

    def counted(*arguments: object) -> np.ndarray:
        nonlocal num_passes
        num_passes += 1
        return decode(*arguments)  # type: ignore[arg-type]

    model.session.decode = counted  # type: ignore[method-assign]
    times: dict[tuple[str, int], list[float]] = {(way, count): [] for way in WAYS for count in COUNTS}
    passes = dict.fromkeys(times, 0)
    different = 0
    for index in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        batch = [parts[(index * max(COUNTS) + i) % len(parts)] for i in range(max(COUNTS))]
        alone: list[tuple[int, ...]] = []
        for way, drafting in WAYS.items():
            model.decoder.drafting = drafting
            for count in COUNTS:
                num_passes = 0
                started = time.perf_counter()
                answers = [
                    answer
                    for start in range(0, len(batch), count)
                    for answer in model.answer_all(batch[start : start + count])
                ]
                token_ids = [answer.token_ids for answer in answers]
                alone = alone or token_ids
                different += sum(a != b for a, b in zip(token_ids, alone, strict=True))
                if index:  # the first round warms up
                    times[way, count].append(1e3 * (time.perf_counter() - started) / len(batch))
                    passes[way, count] += num_passes
    model.session.decode = decode  # type: ignore[method-assign]
    return {
        "rounds": rounds,
        "different_answers": different,
        "ms_a_part": {
            way: {str(count): round(float(np.median(times[way, count])), 3) for count in COUNTS}
            for way in WAYS
        },
        "passes_a_part": {
            way: {str(count): round(passes[way, count] / rounds / max(COUNTS), 3) for count in COUNTS}
            for way in WAYS
        },
    }


def nano(options: argparse.Namespace) -> dict:
    with Inspector.open(options.bundle, threads=options.threads) as inspector:
        return compare(inspector.language, demo_parts(inspector, 40, seed=1), options.rounds)


def large(options: argparse.Namespace) -> dict:
    layout = open_bundle(options.bundle).manifest.prompt
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = options.gguf or Path(folder) / "random.gguf"
        if options.gguf is None:
            command = [sys.executable, "-m", "tools.random_gguf", str(path), "--layers", str(options.layers)]
            subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
        expected = describe(path)
        model = LanguageModel.open(path, layout, expected, options.threads)
        parts = [
            Part(
                rng.normal(size=expected.width).astype(np.float32),
                rng.normal(size=(layout.num_prompts, expected.width)).astype(np.float32),
            )
            for _ in range(max(COUNTS))
        ]
        figures = compare(model, parts, max(1, options.rounds // 10))
        model.close()
    return figures


def print_table(title: str, figures: dict) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("ms per part")
    for count in COUNTS:
        table.add_column(f"{count} together", justify="right")
    for way in WAYS:
        times, passes = figures["ms_a_part"][way], figures["passes_a_part"][way]
        table.add_row(way, *(f"{times[str(count)]:.2f}" for count in COUNTS))
        table.add_row("  passes", *(f"{passes[str(count)]:.2f}" for count in COUNTS))
    Console().print(table)
    print(f"{figures['different_answers']} different answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="bundle folder; by default the bundled model")
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="rounds of eight demo-line parts (0: none); the large model takes a tenth as many",
    )
    parser.add_argument("--layers", type=int, default=2, help="layers of the large model; 0: without it")
    parser.add_argument(
        "--gguf", type=Path, help="large model that tools.random_gguf has written; default: a new one"
    )
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp")
    parser.add_argument("--scratch", type=Path, help="folder for the large model")
    parser.add_argument("--device", default=device_name(), help="name of the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    try:
        results = {"processor": processor_name(), "threads": options.threads}
        if options.rounds:
            results["demo_line"] = nano(options)
            print_table("the demo line's parts", results["demo_line"])
        if options.layers:
            name = f"{options.layers} layers of 7B, generated weights, q4_k_m"
            results[name] = large(options)
            print_table(name, results[name])
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    path = options.results / f"{options.device}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored["together"] = {**stored.get("together", {}), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Which GGUF should this machine run? Compares the quantisation types of one model: size, time and verdicts.

The model is a bundle's float16 language model (by default the bundled one), whose verdicts on demo-line parts are
compared with those of the quantised files; or a model with the layers of LLaMA-7B (``--layers``), which has generated
weights and so no verdicts to compare. llama.cpp's quantiser replaces a type whose blocks do not fit a tensor's rows, so
the types that the file contains are printed.

The recommendation: of the types whose verdict equals float16's on at least 99 % of the parts, those whose time per
answer is within 5 % of the shortest, and of these the smallest file. The time per answer is the time of the pass that
computes a prompt together with its drafts, plus 1/20 of the time of a single step.

    python benchmarks/choose_gguf.py [--bundle DIR | --layers 2] [--types q8_0,q4_k_m] [--parts 200] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from demo_line import RESULTS, device_name, processor_name
from one_pass import demo_parts, describe
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.export.gguf_llm import quantise
from anomalygpt_edge.export.tensor_files import CheckpointError
from anomalygpt_edge.runtime.bundles.bundle import Language, PromptLayout, open_bundle
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.language.answer import Part
from anomalygpt_edge.runtime.language.gguf_header import read_header
from anomalygpt_edge.runtime.language.model import LanguageModel

TYPES = ("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m")
SOURCE = "f16"
SIZES = (1, 4, 16, 38, 60, 96)  # positions per pass; 1: a step, 38: a prompt, 60: a prompt with its drafts
ONE_PASS = 60
MORE_STEPS = 1 / 20  # mean number of further steps per answer, for answers that no draft contains
LEAST_AGREEMENT = 0.99
ABOUT_AS_FAST = 1.05
NUM_RUNS = 5
MAX_CONTEXT = 512


def tensor_types(path: Path) -> dict[str, float]:
    """Share of the file's bytes by tensor type, the largest first."""
    sizes: Counter[str] = Counter()
    for info in read_header(path).tensors.values():
        sizes[info.type] += info.num_bytes
    return {type: round(count / sizes.total(), 3) for type, count in sizes.most_common()}


def time_passes(model: LanguageModel) -> dict[str, float]:
    """Median milliseconds of a pass, by its number of positions; the passes follow the prompt's constant prefix."""
    sizes = [size for size in SIZES if size <= model.decoder.room]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(NUM_RUNS + 1):
        for size in sizes:
            started = time.perf_counter()
            model.decoder.run_rows(size)
            times[size].append(1e3 * (time.perf_counter() - started))
    return {str(size): round(float(np.median(values[1:])), 3) for size, values in times.items()}


def measure(
    path: Path, layout: PromptLayout, expected: Language, parts: list[Part], threads: int
) -> tuple[dict, list[tuple[bool | None, str, float]]]:
    """Figures of one file, and the verdict, sentence and p(anomaly) of every part."""
    model = LanguageModel.open(path, layout, expected, threads, MAX_CONTEXT)
    figures = {
        "megabytes": round(path.stat().st_size / 1e6, 3),
        "types": tensor_types(path),
        "pass_ms": time_passes(model),
    }
    answers = [model.answer_all([part])[0] for part in parts]
    model.close()
    figures["answer_ms"] = round(figures["pass_ms"][str(ONE_PASS)] + MORE_STEPS * figures["pass_ms"]["1"], 3)
    return figures, [(answer.affirmative, answer.text, answer.p_anomaly) for answer in answers]


def compare(
    answers: list[tuple[bool | None, str, float]], exact: list[tuple[bool | None, str, float]]
) -> dict:
    """Shares of equal verdicts and sentences, and the mean change of p(anomaly); empty without parts."""
    pairs = list(zip(answers, exact, strict=True))
    if not pairs:
        return {}
    return {
        "verdicts_agree": round(float(np.mean([a[0] == b[0] for a, b in pairs])), 4),
        "sentences_agree": round(float(np.mean([a[1] == b[1] for a, b in pairs])), 4),
        "p_change": round(float(np.mean([abs(a[2] - b[2]) for a, b in pairs])), 4),
    }


def recommend(rows: dict[str, dict]) -> str:
    """The recommended type; see the top of the file for the rule."""
    fit = {name: row for name, row in rows.items() if row.get("verdicts_agree", 1) >= LEAST_AGREEMENT}
    least = min(row["answer_ms"] for row in fit.values())
    quick = {name: row for name, row in fit.items() if row["answer_ms"] <= ABOUT_AS_FAST * least}
    return min(quick, key=lambda name: quick[name]["megabytes"])


def run(options: argparse.Namespace, folder: Path) -> dict:
    bundle = open_bundle(options.bundle)
    layout, expected = bundle.manifest.prompt, bundle.manifest.language
    source = bundle.component_file("language_model")
    parts: list[Part] = []
    if options.layers:
        source = folder / "source.gguf"
        command = [sys.executable, "-m", "tools.random_gguf", str(source), "--kind", "f16"]
        command += ["--layers", str(options.layers)]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
        expected = describe(source)
    else:
        with Inspector.open(options.bundle, threads=options.threads) as inspector:
            parts = demo_parts(inspector, options.parts, seed=1)
    found = tensor_types(source)
    if not found.keys() <= {"F16", "F32"}:
        sys.exit(f"{Path(__file__).name}: {source} contains {', '.join(found)}: give an f16 bundle")
    rows: dict[str, dict] = {}
    rows[SOURCE], exact = measure(source, layout, expected, parts, options.threads)
    rows[SOURCE].update(compare(exact, exact))
    for name in track(options.types.split(","), "types", console=Console(stderr=True), transient=True):
        target = folder / f"{name}.gguf"
        try:
            quantise(source, target, name, options.threads)
            rows[name], answers = measure(target, layout, expected, parts, options.threads)
        except (CheckpointError, AgptError) as error:
            print(f"{name}: left out ({error})")
            continue
        finally:
            target.unlink(missing_ok=True)
        rows[name].update(compare(answers, exact))
    return {
        "processor": processor_name(),
        "threads": options.threads,
        "parts": len(parts),
        "types": rows,
        "recommended": recommend(rows),
    }


def print_table(title: str, results: dict) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    sizes = list(next(iter(results["types"].values()))["pass_ms"])
    names = (
        "type",
        "MB",
        "really",
        *(f"{size} pos." for size in sizes),
        "answer",
        "verdicts",
        "sentences",
        "p ±",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("type", "really") else "right")
    for name, row in results["types"].items():
        kinds = ", ".join(f"{type} {share:.0%}" for type, share in row["types"].items() if share >= 0.005)
        agreement = [row.get(key) for key in ("verdicts_agree", "sentences_agree", "p_change")]
        table.add_row(
            name, f"{row['megabytes']:.1f}", kinds, *(f"{ms:.2f}" for ms in row["pass_ms"].values()),
            f"{row['answer_ms']:.2f}", *("–" if value is None else f"{value:.3f}" for value in agreement),
        )  # fmt: skip
    Console(width=max(150, Console().width)).print(table)
    print(
        f"milliseconds by positions of a pass, {results['threads']} threads; recommended: {results['recommended']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--bundle",
        type=Path,
        help="bundle folder with an f16 language model; by default the bundled model",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="use a generated model with this many layers of 7B instead; 0: the bundle's",
    )
    parser.add_argument("--types", default=",".join(TYPES), help="quantisation types, comma-separated")
    parser.add_argument("--parts", type=int, default=200, help="number of demo-line parts")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp")
    parser.add_argument("--scratch", type=Path, help="folder for the quantised files")
    parser.add_argument("--device", default=device_name(), help="name of the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    title = f"{options.layers} layers of 7B, generated weights" if options.layers else "the bundle's model"
    try:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            results = run(options, Path(folder))
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print_table(title, results)
    path = options.results / f"{options.device}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored["choose_gguf"] = {**stored.get("choose_gguf", {}), title: results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

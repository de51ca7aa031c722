"""How many passes and how much time does an answer take, compared with decoding step by step?

Uses the demo line's parts with the bundled model, and a model with the layers of LLaMA-7B (generated weights, q4_k_m)
whose drafts contain its answer, as those of a trained model do. Each part is answered in three ways alternately: step
by step; with drafts; with llama-cpp-python's ``Llama.eval`` and ``sample`` after the same prompt of embeddings. The
answers must be the same.

    python benchmarks/one_pass.py [--parts 1000] [--layers 2] [--gguf FILE] [--threads N] [--device NAME]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from demo_line import RESULTS, device_name, processor_name
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.runtime.bundles.bundle import Language, open_bundle
from anomalygpt_edge.runtime.cameras import open_camera
from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.common.machine import default_threads
from anomalygpt_edge.runtime.common.places import PLACES
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.language.answer import Answer, MapReading, Part
from anomalygpt_edge.runtime.language.gguf_header import read_header
from anomalygpt_edge.runtime.language.model import LanguageModel
from anomalygpt_edge.runtime.station.run import enroll_demo_products

ANSWER_TOKENS = 64


class HighLevel:
    """llama-cpp-python's ``Llama``; it does not accept embeddings, so the prompt is decoded with the low-level API."""

    def __init__(self, model: LanguageModel, path: Path, threads: int) -> None:
        self._model = model
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=model.session.num_context, n_batch=512, n_threads=threads,
            n_threads_batch=threads, verbose=False, logits_all=False,
        )  # fmt: skip

    def answer(self, part: Part, max_tokens: int) -> tuple[int, ...]:
        model, llama = self._model, self._llama
        rows = np.concatenate([model.prompt.prefix, model.prompt(part)])
        llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        batch = llama_cpp.llama_batch_init(len(rows), rows.shape[1], 1)
        ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
        for i in range(len(rows)):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, 1, 0
            batch.logits[i] = i == len(rows) - 1
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(llama.ctx, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_batch_free(batch)
        llama.n_tokens = len(rows)
        tokens = [int(llama.sample(temp=0.0))]
        while tokens[-1] not in model.stops and len(tokens) < max_tokens:
            llama.eval(tokens[-1:])
            tokens.append(int(llama.sample(temp=0.0)))
        return tuple(tokens)

    def close(self) -> None:
        self._llama.close()


def compare(model: LanguageModel, path: Path, parts: list[Part], max_tokens: int, threads: int) -> dict:
    """Figures of answering every part in three ways alternately, after one round of warm-up."""
    other = HighLevel(model, path, threads)

    def answer(part: Part, drafting: bool) -> Answer:
        model.decoder.drafting = drafting
        return model.answer_all([part], max_tokens)[0]

    ways: dict[str, Callable[[Part], object]] = {
        "step by step": lambda part: answer(part, False),
        "with drafts": lambda part: answer(part, True),
        "Llama.eval": lambda part: other.answer(part, max_tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    drafted: list[Answer] = []
    different = 0
    for way in ways.values():
        way(parts[0])
    for part in track(parts, "answers", console=Console(stderr=True), transient=True):
        found = {}
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way(part)
            times[name].append(1e3 * (time.perf_counter() - started))
        plain, drafts = found["step by step"], found["with drafts"]
        assert isinstance(plain, Answer)
        assert isinstance(drafts, Answer)
        drafted.append(drafts)
        different += plain.token_ids != drafts.token_ids
    other.close()
    costs = model.decoder.costs
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "answers": len(parts),
        "different_answers": different,
        "settled_ties": sum(a.redecoded for a in drafted),
        "one_pass_share": round(float(np.mean([a.num_passes == 1 for a in drafted])), 4),
        "passes_per_answer": round(float(np.mean([a.num_passes for a in drafted])), 3),
        "steps_per_answer": round(float(np.mean([len(a.token_ids) for a in drafted])), 2),
        "drafted_tokens": round(float(np.mean([a.num_tokens_drafted for a in drafted])), 1),
        "accepted_tokens": round(float(np.mean([a.num_accepted for a in drafted])), 2),
        "times_ms": {
            name: {
                "mean": round(float(np.mean(values)), 3),
                "p50": round(medians[name], 3),
                "p99": round(float(np.percentile(values, 99)), 3),
            }
            for name, values in times.items()
        },
        "speedup_p50": {
            name: round(medians[name] / medians["with drafts"], 2) for name in ("step by step", "Llama.eval")
        },
        "pass_costs_ms": dict(
            zip(map(str, costs.sizes.tolist()), (1e3 * costs.times).round(3).tolist(), strict=True)
        ),
        "logits_ms": round(1e3 * costs.logits_seconds, 4),
        "noise": {"first": model.decoder.noise.first, "later": model.decoder.noise.later},
    }


def demo_parts(inspector: Inspector, count: int, seed: int) -> list[Part]:
    """The language model's inputs for the demo line's parts."""
    products = enroll_demo_products(inspector)
    parts = []
    frames = open_camera("demo", num_parts=count, seed=seed).frames()
    for frame in track(frames, "parts", total=count, console=Console(stderr=True), transient=True):
        inspector.use(products[frame.product])
        assert frame.pixels is not None
        parts.append(inspector.part(frame.pixels))
    return parts


def nano(options: argparse.Namespace) -> dict:
    with Inspector.open(options.bundle, threads=options.threads) as inspector:
        parts = demo_parts(inspector, options.parts, options.seed)
        path = inspector.bundle.component_file("language_model")
        return compare(inspector.language, path, parts, 64, 1)


def describe(path: Path) -> Language:
    """The manifest's description of a GGUF."""
    metadata = read_header(path).metadata
    names = ("embedding_length", "block_count", "context_length")
    width, layers, context = (metadata[f"llama.{name}"] for name in names)
    return Language(width, metadata["tokenizer.ggml.tokens"], layers, context)


def large(options: argparse.Namespace) -> dict:
    """Figures of a model with 7B's layers, whose drafter has learned the model's answer."""
    layout = open_bundle(options.bundle).manifest.prompt
    rng = np.random.default_rng(0)
    reading = MapReading(0.5, PLACES, (PLACES[0],))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = options.gguf or Path(folder) / "random.gguf"
        if options.gguf is None:
            command = [sys.executable, "-m", "tools.random_gguf", str(path), "--layers", str(options.layers)]
            subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
        expected = describe(path)
        model = LanguageModel.open(path, layout, expected, options.threads, max_context=512)
        embedding = rng.normal(size=expected.width).astype(np.float32)
        prompts = rng.normal(size=(layout.num_prompts, expected.width)).astype(np.float32)
        part = Part(embedding, prompts, reading=reading)
        size = path.stat().st_size
        model.decoder.drafting = False
        token_ids = model.answer_all([part], ANSWER_TOKENS)[0].token_ids
        for _ in range(50):
            model.drafter.learn(layout.question, reading, token_ids[:-1])
        figures = compare(model, path, [part] * options.answers, ANSWER_TOKENS, options.threads)
        model.close()
    return {"layers": expected.layers, "megabytes": size >> 20, **figures}


def print_table(title: str, figures: dict) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("ms per answer", "mean", "p50", "p99"):
        table.add_column(name, justify="right" if name != "ms per answer" else "left")
    for name, row in figures["times_ms"].items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("mean", "p50", "p99")))
    Console().print(table)
    faster = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in figures["speedup_p50"].items())
    print(
        f"{figures['answers']} answers, {figures['different_answers']} different, {figures['settled_ties']} near "
        f"ties settled; one pass: {figures['one_pass_share']:.1%}; {figures['passes_per_answer']} passes for "
        f"{figures['steps_per_answer']} tokens, {figures['drafted_tokens']} drafted, "
        f"{figures['accepted_tokens']} accepted; faster than: {faster}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="bundle folder; by default the bundled model")
    parser.add_argument("--parts", type=int, default=1000, help="number of demo-line parts; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="of the demo line")
    parser.add_argument("--layers", type=int, default=2, help="layers of the large model; 0: without it")
    parser.add_argument(
        "--gguf", type=Path, help="large model that tools.random_gguf has written; default: a new one"
    )
    parser.add_argument("--answers", type=int, default=6, help="number of answers of the large model")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp")
    parser.add_argument("--scratch", type=Path, help="folder for the large model")
    parser.add_argument("--device", default=device_name(), help="name of the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    try:
        results = {"processor": processor_name(), "threads": options.threads}
        if options.parts:
            results["demo_line"] = nano(options)
            print_table("the demo line's answers", results["demo_line"])
        if options.layers:
            name = f"{options.layers} layers of 7B, generated weights, q4_k_m"
            results[name] = large(options)
            print_table(name, results[name])
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    path = options.results / f"{options.device}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored["one_pass"] = {**stored.get("one_pass", {}), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

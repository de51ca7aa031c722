"""How much resident memory does a bundle take while it is open and inspects?

    python -m tools.random_gguf 7b.gguf --layers 32      (7B's true size in q4_k_m: 4 GB, in seconds)
    python benchmarks/runtime_memory.py BUNDLE [--gguf 7b.gguf] [--results DIR]

``--gguf`` replaces the bundle's language model by another one of the same width. The peak is the kernel's (VmHWM):
anonymous memory and the pages of mapped files that were resident at the same time, including the weights that llama.cpp
maps. Anonymous and mapped memory after the last answer are reported separately.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from anomalygpt_edge.runtime.bundles.bundle import Component, Language, open_bundle, seal
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.language.gguf_header import read_header

RESULTS = Path(__file__).parent / "results"
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?", help="bundle folder")
    parser.add_argument(
        "--gguf", type=Path, help="q4_k_m model to use instead of the bundle's language model"
    )
    parser.add_argument(
        "--inspections",
        type=int,
        default=1,
        help="number of inspections; opening a bundle already runs two answers",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    if options.bundle is None:
        print("skipped: give a bundle (see the top of this file)")
        return
    with ExitStack() as stack:
        if options.gguf:
            folder = Path(stack.enter_context(TemporaryDirectory(dir=options.bundle.absolute().parent)))
            options.bundle = with_language_model(options.bundle, options.gguf, folder)
        figures = measure(options)
    name = figures.pop("name")
    path = options.results / "runtime_memory.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored, name: figures}, indent=2) + "\n")
    print(json.dumps({name: figures}, indent=2))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Open the bundle, inspect a few frames, and read the kernel's memory figures."""
    before = time.perf_counter()
    with Inspector.open(options.bundle) as inspector:
        opened, after_opening = time.perf_counter() - before, resident_gb()
        frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        verdicts = [inspector.inspect(frame) for _ in range(options.inspections)]
        manifest = inspector.bundle.manifest
        anonymous, mapped = status_gb("RssAnon"), status_gb("RssFile")
    if any(verdict.p_anomaly is None for verdict in verdicts):
        sys.exit(f"{Path(__file__).name}: the bundle gave no answer ({verdicts[-1].reason})")
    precisions = {name: component.precision for name, component in manifest.components.items()}
    return {
        "name": f"{manifest.name}, {manifest.language.layers} layers, {precisions['encoder']} + "
        f"{precisions['language_model']}",
        "precisions": precisions,
        "bundle_gb": round(sum(record.bytes for record in manifest.files.values()) / GB, 2),
        "resident_after_opening_gb": after_opening,
        "peak_resident_gb": peak_gb(),
        "anonymous_gb": anonymous,
        "mapped_files_gb": mapped,
        "seconds_to_open": round(opened, 1),
        "seconds_by_stage": {k: round(v / 1e3, 2) for k, v in verdicts[-1].timings_ms.items()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("onnxruntime", "llama-cpp-python")},
    }


def with_language_model(bundle: Path, gguf: Path, folder: Path) -> Path:
    """Link the bundle's files and this language model into a folder on the same disk, and seal it as a bundle."""
    manifest = open_bundle(bundle).manifest
    replaced = manifest.components["language_model"].file
    for name in manifest.files:
        os.link(gguf if name == replaced else bundle / name, folder / name)
    header = read_header(gguf)
    language = Language(
        width=header.metadata["llama.embedding_length"],
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        layers=header.metadata["llama.block_count"],
        context_length=header.metadata["llama.context_length"],
    )
    components = {**manifest.components, "language_model": Component(replaced, "q4_k_m")}
    seal(folder, msgspec.structs.replace(manifest, language=language, components=components))
    return folder


def resident_gb() -> float:
    return status_gb("VmRSS")


def peak_gb() -> float:
    return status_gb("VmHWM")


def status_gb(name: str) -> float:
    """A figure of /proc/self/status, in GB (Linux)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {name}"
    return round(1024 * int(found[1]) / GB, 2)


if __name__ == "__main__":
    main()

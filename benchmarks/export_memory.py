"""How much memory does an export take?

    python -m tools.random_checkpoints --seed 11 --layers 32 --out DIR      (7B's true size: 18 GB)
    python benchmarks/export_memory.py DIR [--llm-quant f16] [--precision fp32] [--results DIR]

13B needs 26 GB for shards and as much again for the GGUF. Where the disk is too small for that, the shards can contain
the weights of four layers under the names of twenty; the export still reads, merges, writes and compares all of 13B:

    python -m tools.random_checkpoints --size 13b --layers 40 --distinct-layers 4 --pieces 32000 --out DIR

Two peaks are reported. Resident memory includes the pages of mapped files (checkpoints, the written GGUF) that the
kernel keeps as long as no other program needs the memory. Anonymous memory is what the export requires. A run in a
control group, for example with ``systemd-run --scope -p MemoryMax=8G``, where mapped pages count too, shows that the
export succeeds within that limit; the limit is recorded with the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROLES = {
    "imagebind": "imagebind_ckpt/imagebind_huge.pth",
    "vicuna": "vicuna_ckpt/7b_v0",
    "pandagpt": "pandagpt_ckpt/7b/pytorch_model.pt",
    "anomalygpt": "anomalygpt_ckpt/train_supervised/pytorch_model.pt",
}
PERIOD_SECONDS = 0.05
UNLIMITED = 1 << 60
GB = 1e9


def main() -> None:
    options = parse_options()
    if options.checkpoints is None:
        print("skipped: give the folder of generated checkpoints (see the top of this file)")
        return
    figures = measure(options)
    name = (
        f"{figures['layers']} layers of width {figures['width']}, {options.precision} + {options.llm_quant}"
    )
    path = options.results / "export.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stored, name: figures}, indent=2) + "\n")
    print(json.dumps({name: figures}, indent=2))
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "checkpoints", type=Path, nargs="?", help="folder written by tools.random_checkpoints"
    )
    parser.add_argument("--llm-quant", default="f16", help="precision of the language model")
    parser.add_argument("--precision", default="fp32", help="precision of the networks")
    parser.add_argument("--max-memory", help="--max-memory of the export, for example 8G")
    parser.add_argument("--classes", default="object,bottle", help="--classes of the export")
    parser.add_argument("--text-features", type=Path, help="npz file to use instead of the text tower")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    parser.add_argument(
        "--keep", action="store_true", help="keep the bundle, in the folder of the checkpoints"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Export once in a separate process and measure its memory."""
    out = options.checkpoints / "measured_bundle"
    shutil.rmtree(out, ignore_errors=True)
    files = [word for role, path in ROLES.items() for word in (f"--{role}", str(options.checkpoints / path))]
    command = [sys.executable, "-m", "anomalygpt_edge.export", *files, "--out", str(out)]
    command += ["--llm-quant", options.llm_quant, "--precision", options.precision]
    command += ["--classes", options.classes]
    if options.text_features:
        command += ["--text-features", str(options.text_features)]
    if options.max_memory:
        command += ["--max-memory", options.max_memory]
    started = time.monotonic()
    process = subprocess.Popen(command)
    peaks = watch(process)
    if process.returncode:
        sys.exit(f"{Path(__file__).name}: the export failed with status {process.returncode}")
    figures = describe(out, options.checkpoints) | {
        "seconds": round(time.monotonic() - started),
        "peak_anonymous_gb": round(peaks["RssAnon"] / GB, 2),
        "peak_resident_gb": round(peaks["VmHWM"] / GB, 2),
        "memory_limit_gb": memory_limit_gb(),
    }
    if not options.keep:
        shutil.rmtree(out)
    return figures


def watch(process: subprocess.Popen) -> dict[str, int]:
    """Peak anonymous and resident memory of a process in bytes, measured until it ends (Linux)."""
    status = Path(f"/proc/{process.pid}/status")
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            text = status.read_text()
        except OSError:
            break
        for name in peaks:
            if match := re.search(rf"{name}:\s+(\d+) kB", text):
                peaks[name] = max(peaks[name], 1024 * int(match[1]))
        time.sleep(PERIOD_SECONDS)
    process.wait()
    return peaks


def describe(bundle: Path, checkpoints: Path) -> dict[str, object]:
    """Sizes of checkpoints and bundle, parity, and versions of the packages."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = [path for path in checkpoints.rglob("*") if path.is_file() and bundle not in path.parents]
    stored = sum(path.stat().st_size for path in files)
    index = json.loads((checkpoints / ROLES["vicuna"] / "pytorch_model.bin.index.json").read_text())
    shards = sum(
        (checkpoints / ROLES["vicuna"] / name).stat().st_size for name in set(index["weight_map"].values())
    )
    return {
        "layers": manifest["language"]["layers"],
        "width": manifest["language"]["width"],
        "checkpoints_gb": round(stored / GB, 2),
        "read_gb": round((stored - shards + index["metadata"]["total_size"]) / GB, 2),
        "vocabulary": manifest["language"]["vocab_size"],
        "bundle_gb": round(sum(record["bytes"] for record in manifest["files"].values()) / GB, 2),
        "parity": manifest["parity"],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "llama-cpp-python")},
    }


def memory_limit_gb() -> float | None:
    """Memory limit of this process's control group; None without one."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for file in (
        Path(f"/sys/fs/cgroup/memory{groups.get('memory', '')}/memory.limit_in_bytes"),
        Path(f"/sys/fs/cgroup{groups.get('', '')}/memory.max"),
    ):
        if file.is_file() and (text := file.read_text().strip()).isdigit() and int(text) < UNLIMITED:
            return round(int(text) / GB, 2)
    return None


if __name__ == "__main__":
    main()

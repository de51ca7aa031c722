"""From .cu files to what a GPU loads.

A wheel that is built where nvcc is carries one ``.fatbin`` a file: machine code for every target below that the
compiler knows, and PTX, which the driver of any other GPU from Turing on compiles when it loads. Binaries of a
newer CUDA major than the device's driver do not load (a JetPack 6 driver is 12.x), and an installation from source
has none: then the device's own nvcc, part of JetPack, compiles the file for that device once, into the user's cache.

``python -m anomalygpt_edge.kernels.cuda.compiler`` prints what the compiler says of every kernel on every target.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
# Turing, A100, RTX 30, Orin, RTX 40, H100/H200, B200, Thor, RTX 50. Machine code runs on later minors of its major.
TARGETS = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
PTX_TARGET = "75"
FLAGS = ("-std=c++17", "-O3")
STRICT = ("-Werror", "all-warnings", "-Xptxas", "--warn-on-spills", "-Xptxas", "-v")  # what is shipped


def files() -> tuple[str, ...]:
    """Names of the .cu files, without suffix."""
    return tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))


def shipped_binary(file: str) -> Path:
    return SOURCES / f"{file}.fatbin"


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the PATH, or where NVIDIA's packages put it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return shutil.which(candidates[0]) or shutil.which("nvcc") or shutil.which(candidates[-1])


@lru_cache
def known_targets(nvcc: str) -> tuple[str, ...]:
    """Those of ``TARGETS`` that this compiler makes code for."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(target for target in TARGETS if f"sm_{target}" in listed)


def compile_fatbin(nvcc: str, file: str, out: Path, targets: Sequence[str], *, jobs: int = 1) -> str:
    """Machine code for ``targets`` and PTX in one file; returns what the assembler says of every kernel.

    Raises:
        RuntimeError: the compiler refused, warned, or spilled registers; with its words.
    """
    kinds = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    kinds.append(f"-gencode=arch=compute_{PTX_TARGET},code=compute_{PTX_TARGET}")
    return _run([nvcc, "-fatbin", *FLAGS, *STRICT, f"--threads={jobs}", *kinds], file, out)


def compile_all(folder: Path, *, jobs: int = 0) -> list[Path]:
    """Every file's fatbin into a folder; those that are there for the same source are kept.

    Raises:
        RuntimeError: there is no nvcc, or see ``compile_fatbin``.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not here: install the CUDA toolkit, or set CUDA_HOME to it")
    targets = known_targets(nvcc)

    def one(file: str) -> Path:
        cached = _cache_folder() / f"{file}-{_digest(file, nvcc, *targets)}.fatbin"
        if not cached.exists():
            compile_fatbin(nvcc, file, cached, targets)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(cached, folder / f"{file}.fatbin"))

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(one, files()))


def compile_for_device(file: str, target: str) -> bytes:
    """Machine code for one device, from the user's cache if it was made before.

    Raises:
        RuntimeError: there is no nvcc on this machine, or it does not know the device.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            f"this package brings no CUDA code that this machine's driver loads for sm_{target}, and there is no "
            "nvcc to make it: install the CUDA toolkit (on a Jetson: sudo apt install nvidia-jetpack)"
        )
    cached = _cache_folder() / f"{file}-{_digest(file, nvcc, target)}.cubin"
    if not cached.exists():
        _run([nvcc, "-cubin", *FLAGS, f"-arch=sm_{target}"], file, cached)
    return cached.read_bytes()


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor, as the assembler reports it."""

    file: str
    kernel: str
    target: str
    registers: int  # of a thread
    spilled: int  # bytes
    shared: int  # bytes of a block


_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<target>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def resources(file: str, report: str) -> Iterator[Resources]:
    """The kernels of ``compile_fatbin``'s report."""
    for found in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Resources(
            file, found["kernel"], found["target"], int(found["registers"]),
            int(found["stores"]) + int(found["loads"]), int(shared[1]) if shared else 0,
        )  # fmt: skip


def _run(command: list[str], file: str, out: Path) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        made = Path(work, out.name)
        done = subprocess.run(
            [*command, f"{file}.cu", "-o", str(made)], cwd=SOURCES, capture_output=True, text=True
        )
        if done.returncode != 0 or not made.exists():
            raise RuntimeError(f"nvcc does not compile {file}.cu:\n{done.stdout}{done.stderr}")
        made.replace(out)
    return done.stdout + done.stderr


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "anomalygpt-edge", "cuda")


def _digest(file: str, nvcc: str, *targets: str) -> str:
    """Of everything that the result depends on."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    sources = [SOURCES / f"{file}.cu", *sorted(SOURCES.glob("*.cuh"))]
    parts = [version, *(path.read_bytes() for path in sources), *map(str.encode, (*FLAGS, *targets))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

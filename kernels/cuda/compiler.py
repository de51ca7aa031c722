"""Compiles .cu files to what a GPU loads.

A wheel that is built on a machine with nvcc holds one ``.fatbin`` a file: machine code for every target below that the
compiler knows, and PTX, which the driver of any other GPU from Turing on compiles when it loads. Binaries of a
newer CUDA major than the device's driver do not load (a JetPack 6 driver is 12.x), and an installation from source
has none: then the device's own nvcc, part of JetPack, compiles the file for that device once, into the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

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
    """The CUDA compiler: in CUDA_HOME, on the PATH, or where NVIDIA's packages put it."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return shutil.which(candidates[0]) or shutil.which("nvcc") or shutil.which(candidates[-1])


@lru_cache
def known_targets(nvcc: str) -> tuple[str, ...]:
    """Those of ``TARGETS`` that this compiler makes code for."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return tuple(target for target in TARGETS if f"sm_{target}" in listed)


def compile_all(folder: Path, *, jobs: int = 0) -> dict[str, str]:
    """Compile every file to a fatbin in a folder, or copy it from the user's cache if nothing has changed.

    Args:
        folder: where the fatbins go.
        jobs: compilers at a time; as many as there are CPUs when 0.

    Returns:
        For each file the assembler's report on its kernels (``tools/cuda_resources.py`` reads it).

    Raises:
        RuntimeError: there is no nvcc, or it fails, warns, or spills registers; the message has its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not here: install the CUDA toolkit, or set CUDA_HOME to it")
    targets = known_targets(nvcc)
    kinds = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    kinds.append(f"-gencode=arch=compute_{PTX_TARGET},code=compute_{PTX_TARGET}")
    folder.mkdir(parents=True, exist_ok=True)

    def one(file: str) -> str:
        cached = _cache_folder() / f"{file}-{_digest(file, nvcc, *STRICT, *targets)}.fatbin"
        report = cached.with_suffix(".txt")
        if not (cached.exists() and report.exists()):
            report.parent.mkdir(parents=True, exist_ok=True)
            words = _run([nvcc, "-fatbin", *FLAGS, *STRICT, *kinds], file, cached)
            report.write_text(words, encoding="utf-8")
        shutil.copyfile(cached, folder / f"{file}.fatbin")
        return report.read_text(encoding="utf-8")

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return dict(zip(files(), pool.map(one, files()), strict=True))


def compile_for_device(file: str, target: str, folder: Path = SOURCES) -> bytes:
    """Machine code for one device, from the user's cache if it was compiled before.

    Raises:
        RuntimeError: there is no nvcc on this machine, or it does not know the device.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            f"this package brings no CUDA code that this machine's driver loads for sm_{target}, and there is no "
            "nvcc to make it: install the CUDA toolkit (on a Jetson: sudo apt install nvidia-jetpack)"
        )
    cached = _cache_folder() / f"{file}-{_digest(file, nvcc, target, folder=folder)}.cubin"
    if not cached.exists():
        _run([nvcc, "-cubin", *FLAGS, f"-I{SOURCES}", f"-arch=sm_{target}"], file, cached, folder)
    return cached.read_bytes()


def _run(command: list[str], file: str, out: Path, folder: Path | None = None) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        made = Path(work, out.name)
        done = subprocess.run(
            [*command, f"{file}.cu", "-o", str(made)], cwd=folder or SOURCES, capture_output=True, text=True
        )
        if done.returncode != 0 or not made.exists():
            raise RuntimeError(f"nvcc does not compile {file}.cu:\n{done.stdout}{done.stderr}")
        made.replace(out)
    return done.stdout + done.stderr


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "anomalygpt-edge", "cuda")


def _digest(file: str, nvcc: str, *targets: str, folder: Path | None = None) -> str:
    """Digest of everything that the result depends on."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    sources = [(folder or SOURCES) / f"{file}.cu", *sorted(SOURCES.glob("*.cuh"))]
    parts = [version, *(path.read_bytes() for path in sources), *map(str.encode, (*FLAGS, *targets))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

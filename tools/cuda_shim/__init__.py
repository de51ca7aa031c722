"""Runs kernels/cuda/*.cu on a CPU: compiled with g++ and ``host_shim.h``, in a process that acts as the device.

What it detects (``tests/kernels/test_cuda_shim.py`` has a faulty kernel for each):

- accesses outside a buffer or a ``__shared__`` array, byte-exact within AddressSanitizer's red zones (at least 16
  bytes on each side), use after free, undefined arithmetic ("address"); unaligned 16-byte copies and ldmatrix rows;
- data races in shared and global memory, such as a missing barrier, in any order of threads ("thread");
- barriers and warp operations that some threads never reach; reads of shared memory that was not written, or whose
  asynchronous copy was not waited for (as NaN or -1); results that depend on the order of threads (``seed``).

It does not detect races between blocks (they run one after another; ``seed`` 1 reverses their order) or a missing
fence beside an atomic (atomics order all accesses here), and does not reproduce the rounding of tensor cores' sums
or the speed of a GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SHIM = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-Wall",
    "-Werror",
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",
)
SANITIZERS = {
    "none": (),
    "ucontext": (),  # switches fibres in the way used on processors other than x86-64
    "address": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fsanitize-sections=shim_shared",
    ),
    "thread": ("-fsanitize=thread",),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
}
_ENTRY = re.compile(r'extern "C" __global__ void\s+(\w+)\s*\(')


class DeviceError(RuntimeError):
    """A launch failed, or the device process ended with a sanitizer's report."""


@lru_cache
def entry_points(source: Path) -> list[str]:
    """Names of a .cu file's kernels, found after its macros are expanded."""
    flags = ("-E", "-P", "-x", "c++", "-D__launch_bounds__(...)=", f"-I{KERNELS}")
    expanded = subprocess.run(["g++", *flags, source], capture_output=True, text=True, check=True)
    return _ENTRY.findall(expanded.stdout)


@lru_cache
def build(sanitizer: str = "none", sources: tuple[Path, ...] = ()) -> Path:
    """The path of the server program, which is compiled once for the same sources and sanitizer."""
    sources = sources or tuple(sorted(KERNELS.glob("*.cu")))
    parts = [*sources, *sorted(KERNELS.glob("*.cuh")), *sorted(SHIM.glob("*.*"))]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts))
    folder = Path(tempfile.gettempdir()) / f"anomalygpt-cuda-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{sanitizer}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("g++")
    assert compiler, "the shim needs g++"
    flags = (*FLAGS, f"-I{KERNELS}", f"-I{SHIM}")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        switch = ("-DSHIM_UCONTEXT",) if sanitizer == "ucontext" else ()
        jobs: list[tuple[Path, tuple[str, ...]]] = [(SHIM / "host_shim.cpp", (*flags, *switch))]
        for source in sources:
            wrapper = Path(work, source.stem + ".cpp")
            register = "\n".join(f"SHIM_REGISTER({name})" for name in entry_points(source))
            wrapper.write_text(
                f'#include "host_shim.h"\n#include "registry.h"\nnamespace {{\n#include "{source}"\n{register}\n}}\n'
            )
            jobs.append((wrapper, (*flags, *SANITIZERS[sanitizer])))
        objects = [Path(work, f"{index}.o") for index in range(len(jobs))]
        running = [
            subprocess.Popen([compiler, *arguments, "-c", file, "-o", out], stderr=subprocess.PIPE, text=True)
            for (file, arguments), out in zip(jobs, objects, strict=True)
        ]
        for process in running:
            report = process.communicate()[1]
            assert process.returncode == 0, report
        linked = Path(work, "shim")
        subprocess.run([compiler, *objects, *SANITIZERS[sanitizer], "-o", linked], check=True)
        linked.replace(program)
    return program


class ShimDriver:
    """``anomalygpt_edge.kernels.cuda.driver.Driver`` on the CPU."""

    num_multiprocessors = 4  # few, so that small inputs are split as large inputs are on a GPU

    def __init__(self, sanitizer: str = "none", seed: int = 0, sources: tuple[Path, ...] = ()) -> None:
        self.seed = seed
        self.launches: list[tuple[Any, ...]] = []
        self.allocated: dict[int, int] = {}
        self._process = subprocess.Popen(
            [build(sanitizer, sources)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def kernel(self, file: str, name: str, arguments: str) -> tuple[str, str]:
        assert name in entry_points(KERNELS / f"{file}.cu"), f"{file}.cu has no kernel {name}"
        return name, arguments

    def launch(
        self,
        kernel: tuple[str, str],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *arguments: Any,
    ) -> None:
        name, types = kernel
        assert len(types) == len(arguments), f"{name}: {types} does not describe {arguments}"
        self.launches.append((name, grid, block))
        message = b"l" + _text(name.encode()) + struct.pack("<7I", *grid, *block, self.seed)
        packed = [struct.pack(kind, argument) for kind, argument in zip(types, arguments, strict=True)]
        self._send(message + struct.pack("<I", len(packed)) + b"".join(map(_text, packed)))
        (length,) = struct.unpack("<I", self._receive(4))
        if length:
            raise DeviceError(self._receive(length).decode())

    def allocate(self, nbytes: int) -> int:
        self._send(b"a" + struct.pack("<Q", nbytes))
        (address,) = struct.unpack("<Q", self._receive(8))
        self.allocated[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.allocated[address]
        if self.alive:
            self._send(b"f" + struct.pack("<Q", address))

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.allocated[address]
        self._send(b"w" + struct.pack("<QQ", address, array.nbytes) + array.tobytes())

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.allocated[address]
        self._send(b"r" + struct.pack("<QQ", address, array.nbytes))
        array[...] = np.frombuffer(self._receive(array.nbytes), array.dtype).reshape(array.shape)

    def _send(self, data: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_ended()

    def _receive(self, length: int) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(length)
        if len(data) < length:
            self._raise_ended()
        return data

    def _raise_ended(self) -> None:
        report = self._process.communicate()[1].decode()
        raise DeviceError(report or f"the device's process ended with {self._process.returncode}")


def _text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data

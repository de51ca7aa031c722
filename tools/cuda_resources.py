"""Resource use of each CUDA kernel on every target, for docs/cuda.md: python -m tools.cuda_resources"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from anomalygpt_edge.kernels.cuda import compiler


class Resources(NamedTuple):
    """The resources of a multiprocessor that a kernel uses, as the assembler reports them."""

    file: str
    kernel: str
    target: str
    registers: int  # per thread
    spilled: int  # bytes
    shared: int  # bytes per block

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's threads that can be resident, 0..1."""
        threads, blocks, shared = MULTIPROCESSORS[self.target]
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are allocated in units of 256
        blocks = min(blocks, threads // THREADS, 65536 // (per_warp * THREADS // 32))
        if self.shared:
            reserved = 0 if self.target == "75" else 1024  # bytes that CUDA reserves per block
            blocks = min(blocks, shared // (self.shared + reserved))
        return blocks * THREADS / threads


THREADS = 256  # per block, for every kernel

# Target → resident threads, resident blocks, bytes of shared memory. CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
MULTIPROCESSORS = {
    "75": (1024, 16, 64 << 10),
    "80": (2048, 32, 164 << 10),
    "86": (1536, 16, 100 << 10),
    "87": (1536, 16, 164 << 10),
    "89": (1536, 24, 100 << 10),
    "90": (2048, 32, 228 << 10),
    "100": (2048, 32, 228 << 10),
    "110": (1536, 24, 228 << 10),
    "120": (1536, 24, 100 << 10),
}

_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<target>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def read_report(file: str, report: str) -> Iterator[Resources]:
    """The resources of every kernel and target in the assembler's report on one file."""
    for found in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Resources(
            file, found["kernel"], found["target"], int(found["registers"]),
            int(found["stores"]) + int(found["loads"]), int(shared[1]) if shared else 0,
        )  # fmt: skip


def compile_all(folder: Path) -> list[Resources]:
    """Compile every file into a folder as ``compiler.compile_all``; sorted by kernel and target within each file."""
    return [
        each
        for file, report in compiler.compile_all(folder).items()
        for each in sorted(read_report(file, report))
    ]


def resource_table(resources: Sequence[Resources]) -> str:
    """A Markdown table with "registers, occupancy" of each kernel on every target.

    Kernels whose names differ only in their types share a row, with the figures of the one with most registers.
    """
    targets = [target for target in compiler.TARGETS if any(each.target == target for each in resources)]
    rows: dict[str, dict[str, Resources]] = {}
    for each in resources:
        base = _VARIANT.sub("", each.kernel) if each.file != "match" else each.kernel
        most = rows.setdefault(base, {})
        if each.target not in most or most[each.target].registers < each.registers:
            most[each.target] = each
    lines = ["| kernel | shared memory | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
    lines.append("|---" * (len(targets) + 2) + "|")
    for name, most in rows.items():
        shared = max(each.shared for each in most.values())
        cells = [f"{most[target].registers}, {most[target].occupancy:.0%}" for target in targets]
        lines.append(f"| {name} | {shared / 1024:.1f} KB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_VARIANT = re.compile(r"(_(f32|f16|i8|BGR8|RGB8|Mono8|NV12|YUYV|BayerRG8|BF16|F32|F16|Q\d_\w))+$")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(resource_table(compile_all(Path(scratch))))

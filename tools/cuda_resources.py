"""What each CUDA kernel takes of a multiprocessor on every target, for docs/cuda.md: python -m tools.cuda_resources"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from anomalygpt_edge.kernels.cuda import compiler


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor, as the assembler reports it."""

    file: str
    kernel: str
    target: str
    registers: int  # of a thread
    spilled: int  # bytes
    shared: int  # bytes of a block

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's threads that can be resident, 0..1."""
        threads, blocks, shared = MULTIPROCESSORS[self.target]
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out 256 at a time
        blocks = min(blocks, threads // THREADS, 65536 // (per_warp * THREADS // 32))
        if self.shared:
            blocks = min(
                blocks, shared // (self.shared + (0 if self.target == "75" else 1024))
            )  # CUDA keeps 1 KB
        return blocks * THREADS / threads


THREADS = 256  # of every kernel's blocks

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
    """Every kernel and target of the assembler's report on one file."""
    for found in _KERNEL.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Resources(
            file, found["kernel"], found["target"], int(found["registers"]),
            int(found["stores"]) + int(found["loads"]), int(shared[1]) if shared else 0,
        )  # fmt: skip


def compile_all(folder: Path) -> list[Resources]:
    """Every file into a folder, as ``compiler.compile_all``; by file, kernel and target."""
    return [
        each
        for file, report in compiler.compile_all(folder).items()
        for each in sorted(read_report(file, report))
    ]


def resource_table(resources: Sequence[Resources]) -> str:
    """Markdown: for each kernel "registers, occupancy" on every target.

    Kernels whose names differ by their types only are one row, with the figures of the one that takes most.
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

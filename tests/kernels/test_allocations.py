"""After the first call of a size the C++ kernels take no more working memory: malloc counts its own calls, in a process
of its own, for every level that this machine runs. What the binding notes of a call's arguments (less than a row of
any array here) is not counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COUNTER = r"""
#define _GNU_SOURCE
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t),
    *__libc_memalign(size_t, size_t);
static volatile long calls;
long allocations(void) { return calls; }
static void count(size_t n) { if (n >= 512) __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED); }
void *malloc(size_t n) { count(n); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(n * m); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(n); return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { count(n); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) { count(n); *p = __libc_memalign(a, n); return *p ? 0 : 12; }
"""

SCRIPT = r"""
import ctypes
import numpy as np
from anomalygpt_edge.kernels import Box, dequantise, normalise, prepare_bank
from anomalygpt_edge.kernels.cpu import levels
from anomalygpt_edge.kernels.geometry import placements
from anomalygpt_edge.kernels.sampling import normalisation_table, sampling

allocations = ctypes.CDLL(None).allocations
allocations.restype = ctypes.c_long
rng = np.random.default_rng(0)
frame = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
boxes = (Box(0, 0, 640, 480), Box(10, 20, 200, 150, 30.0), *(Box(40 * i, 30, 90, 80) for i in range(6)))
cuts = [sampling(box, 64, "stretch") for box in boxes]
table = normalisation_table((0.5,) * 3, (0.2,) * 3)
pixels = np.empty((len(boxes), 3, 64, 64), np.float32)
features = rng.normal(size=(3, 4, 64, 32)).astype(np.float32)
rows = normalise(rng.normal(size=(4, 500, 32)).astype(np.float32))
distance, nearest = np.empty((3, 64), np.float32), np.empty((3, 4, 64), np.int32)
gains, scaled = rng.random((4, 500), np.float32), np.empty((3, 64), np.float32)
normals, placed = normalise(features[:2]), np.empty((3, 2, 4, 64), np.float32)
chosen = np.empty((4, 20), np.int32)
logits, grids = rng.normal(size=(3, 4, 256, 2)).astype(np.float32), rng.random((3, 256), np.float32)
maps = np.empty((3, 300, 300), np.float32)
tiles = rng.random((len(boxes), 50, 50), np.float32)
places, framed = placements(boxes, 50, "stretch"), np.zeros((480, 640), np.float32)
embeddings = rng.integers(0, 255, (30, 144), dtype=np.uint8)
ids, injected = np.array([1, -1, 7, 3] * 9, np.int32), np.zeros((9, 256), np.float32)
batch = np.empty((36, 256), np.float32)
cells = np.empty((3, 3), np.float32)

for level in levels():
    banks = [level.pack_bank(prepare_bank(rows, dtype)) for dtype in ("float32", "float16", "int8")]
    for threads in (1, 2):
        work = {
            "preprocess": lambda: level.preprocess(frame, "BGR8", cuts, table, pixels, threads),
            "match": lambda: [level.match(features, bank, distance, None, threads) for bank in banks],
            "match, indices": lambda: [level.match(features, bank, distance, nearest, threads) for bank in banks],
            "match, scaled": lambda: [
                level.match(features, bank, distance, nearest, threads, gains, scaled) for bank in banks
            ],
            "match_places": lambda: level.match_places(features, normals, 2, placed, threads),
            "coreset": lambda: level.coreset(rows, chosen, threads),
            "localise": lambda: level.localise(logits, maps, threads),
            "upsample": lambda: level.upsample(grids, maps, threads),
            "project": lambda: level.project(tiles, places, framed, threads),
            "summarise": lambda: level.summarise(maps[0], 900),
            "cell_peaks": lambda: level.cell_peaks(maps[0], cells),
            "pack_prompt": lambda: level.pack_prompt(embeddings, "Q4_K", ids, injected, batch, threads),
        }
        for name, call in work.items():
            call(), call()
            before = allocations()
            for _ in range(20):
                call()
            print(level.name, threads, name, allocations() - before, sep="\t")
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs a C compiler"
)
def test_no_kernel_allocates_after_its_first_call_of_a_size(tmp_path: Path) -> None:
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer has a malloc of its own")
    (tmp_path / "counter.c").write_text(COUNTER)
    library = tmp_path / "counter.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, tmp_path / "counter.c"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    counts = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(counts) >= 2 * 12
    assert [line for line in counts if int(line[-1])] == []

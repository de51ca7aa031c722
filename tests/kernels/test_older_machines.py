"""The extension of this checkout on x86-64 machines without AVX-512 or AVX2, which an emulator stands in for (Debian:
qemu-user): it finds their levels and never touches an instruction that they lack."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest

EMULATOR = shutil.which("qemu-x86_64")
SCRIPT = """
import numpy as np
from anomalygpt_edge import kernels

rng = np.random.default_rng(0)
frame = rng.integers(0, 256, (97, 131, 3), dtype=np.uint8)
features = rng.normal(size=(1, 2, 20, 24)).astype(np.float32)
rows = rng.normal(size=(2, 40, 24)).astype(np.float32)
logits = rng.normal(size=(1, 2, 16, 2)).astype(np.float32)

def work():
    pixels = kernels.preprocess(frame, 28, "crop", (0.5,) * 3, (0.2,) * 3, boxes=[(0, 0, 131, 97), (9, 9, 50, 40, 30)])
    yield pixels
    for dtype in ("float32", "float16", "int8"):
        yield kernels.match(features, kernels.prepare_bank(rows, dtype), threads=2)
    yield kernels.match_places(features[:, :, :16], kernels.normalise(features[:, :, 4:]), 1, threads=2)
    yield kernels.match_scaled(features, rows, np.ones((2, 40), np.float32), threads=2)[1]
    maps = kernels.localise(logits, 28)
    yield maps
    yield kernels.upsample(np.ascontiguousarray(logits[:, 0, :, 0]), 28)
    yield kernels.project(maps, None, "crop", (97, 131))
    yield np.array(kernels.summarise(maps[0]))
    yield kernels.cell_peaks(maps[0], 3)
    yield np.array(kernels.components(maps[0], 0.5))
    yield kernels.pack_prompt(np.full((4, 144), 9, np.uint8), "Q4_K", np.array([0, 3]))

for name in kernels.available()[:-1]:
    with kernels.using(name):
        found = list(work())
    with kernels.using("reference"):
        for one, other in zip(found, work(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
print(*kernels.available())
"""


@pytest.mark.skipif(not EMULATOR or platform.machine() != "x86_64", reason="no emulator of x86-64 here")
@pytest.mark.parametrize(
    ("machine", "levels"),
    [("Nehalem", "cpu-baseline reference"), ("Haswell", "cpu-avx2 cpu-baseline reference")],
)
def test_an_older_machine_runs_its_levels(machine: str, levels: str) -> None:
    assert EMULATOR is not None
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [EMULATOR, "-cpu", machine, sys.executable, "-W", "error", "-c", SCRIPT]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == levels

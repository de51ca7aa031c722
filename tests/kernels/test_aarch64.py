"""NEON code, compiled for aarch64 and run by an emulator where both are installed (Debian: g++-aarch64-linux-gnu,
qemu-user); the same check of this machine's baseline always runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


def check_level(compiler: str, level: str, flags: list[str], tmp_path: Path, runner: list[str]) -> str:
    program = tmp_path / "check"
    defines = [f"-DLEVEL={level}", f"-DKERNELS={level}_kernels", f"-DWITH_{level.upper()}"]
    sources = [ROOT / "tests/kernels/level_check.cpp", ROOT / "kernels/cpu/level.cpp"]
    options = ["-std=gnu++17", "-O2", "-static", "-ffp-contract=off", "-Wall", "-Wextra"]
    subprocess.run([compiler, *options, *flags, *defines, *map(str, sources), "-o", str(program)], check=True)
    ran = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout[-500:]
    return ran.stdout


def test_the_baseline_of_this_machine(tmp_path: Path) -> None:
    assert (
        check_level(shutil.which("g++") or "c++", "baseline", [], tmp_path, []) == "cpu-baseline: 0 wrong\n"
    )


@pytest.mark.skipif(not CROSS or not EMULATOR, reason="no compiler or emulator of aarch64 here")
@pytest.mark.parametrize(("level", "flags"), [("baseline", []), ("neondot", ["-march=armv8.2-a+dotprod"])])
def test_neon(level: str, flags: list[str], tmp_path: Path) -> None:
    assert CROSS is not None
    assert EMULATOR is not None
    found = check_level(CROSS, level, flags, tmp_path, [EMULATOR, "-cpu", "max"])
    assert found == f"cpu-{level}: 0 wrong\n"

"""Every .cu file compiles for every target, without a warning or a spilled register; what is shipped, and where."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from anomalygpt_edge.kernels.cuda import compiler
from tools import cuda_resources

NVCC = compiler.find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not here: install the CUDA toolkit to compile .cu files"
)
# More values alive at a time than 1024 threads leave registers for.
ALIVE = """
#pragma unroll
for (int i = 0; i < 80; i++) many[i] = x[i * n];
__syncthreads();
#pragma unroll
for (int i = 0; i < 80; i++) x[i] = many[79 - i] * n;
"""
GPU_KERNELS = Path(__file__).parents[2] / "tools" / "gpu_kernels"
DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda.md"


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> list[cuda_resources.Resources]:
    folder = tmp_path_factory.mktemp("fatbins")
    found = cuda_resources.compile_all(folder)
    assert {path.name for path in folder.iterdir()} == {f"{file}.fatbin" for file in compiler.files()}
    return found


@needs_nvcc
def test_every_kernel_compiles_for_every_target(resources: list[cuda_resources.Resources]) -> None:
    assert NVCC
    targets = set(compiler.known_targets(NVCC))
    assert {"87", "90"} <= targets
    for file in compiler.files():
        kernels = {each.kernel for each in resources if each.file == file}
        source = (compiler.SOURCES / f"{file}.cu").read_text()
        assert len(kernels) >= len(re.findall(r"__global__", source)), f"kernels of {file}.cu were lost"
        for kernel in kernels:
            assert {each.target for each in resources if each.kernel == kernel} >= targets


@needs_nvcc
def test_nothing_spills_and_enough_warps_fit(resources: list[cuda_resources.Resources]) -> None:
    for each in resources:
        assert each.spilled == 0, each
        assert each.shared <= 48 << 10, each
        assert each.occupancy >= 0.25, each


@needs_nvcc
def test_the_documented_table_is_what_the_compiler_says(resources: list[cuda_resources.Resources]) -> None:
    document = DOCUMENT.read_text()
    version = re.search(r"nvcc (\d+\.\d+)", document)
    assert version
    assert NVCC
    if (
        f"release {version[1]},"
        not in subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip(f"the table was made with nvcc {version[1]}")
    assert cuda_resources.resource_table(resources) in document


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("int unused = 3;", "never referenced"),
        ("undeclared();", "undefined"),
        ("float many[80];" + ALIVE, "Registers are spilled"),
    ],
)
def test_a_warning_or_a_spill_is_refused(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.cu").write_text(
        f'extern "C" __global__ void __launch_bounds__(1024) bad(float *x, int n) {{ {body} }}'
    )
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    monkeypatch.setattr(compiler, "known_targets", lambda nvcc: ("87",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=rf"bad\.cu(.|\n)*{words}"):
        compiler.compile_all(tmp_path / "out")


@needs_nvcc
def test_a_device_without_shipped_code_gets_its_own_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = compiler.compile_for_device("project", "87")
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(compiler, "_run", lambda *_: pytest.fail("compiled twice"))
    assert compiler.compile_for_device("project", "87") == code


@needs_nvcc
def test_the_ceilings_of_gpu_check_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for target in ("75", "87", "90"):
        assert compiler.compile_for_device("ceilings", target, GPU_KERNELS).startswith(b"\x7fELF")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="sudo apt install nvidia-jetpack"):
        compiler.compile_for_device("match", "87")
    with pytest.raises(RuntimeError, match="CUDA_HOME"):
        compiler.compile_all(Path("nowhere"))


def test_cuda_home_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert compiler.find_nvcc() == str(nvcc)
    nvcc.unlink()
    assert compiler.find_nvcc() == (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"))

"""tools/venv.py in whole runs: the real command, venv and pip, with a folder as the package index.

Only the packages are toys: llama-cpp-python's build prints what ninja prints, and the project needs nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools is never installed
venv = importlib.import_module("tools.venv")
sys.path.remove(str(ROOT))

BACKEND = '''
"""A build backend without dependencies: prints what ninja would and writes a wheel by hand."""
import os, sys, time, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    how = os.environ.get("TOY", "")
    for step in range(1, 21):
        print(f"[{step}/20] c++ {os.environ['CMAKE_ARGS']} -c file{step}.cpp", flush=True)
        time.sleep(60 if how == "hangs" and step == 7 else 0.02)
        if how and how != "hangs" and step == 7:
            sys.exit(how)
    return write_wheel(folder, "llama_cpp_python")

def build_editable(folder, config_settings=None, metadata_directory=None):
    return write_wheel(folder, "anomalygpt_edge")

def write_wheel(folder, name):
    info, wheel = f"{name}-1.0.dist-info", f"{name}-1.0-py3-none-any.whl"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\nProvides-Extra: dev\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: toy\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(os.path.join(folder, wheel), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "{}"
version = "1.0"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkout, in a folder with a blank in its name, beside its package index."""
    root = tmp_path_factory.mktemp("venv tool") / "check out"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "kernels/cpu").mkdir(parents=True)
    for name, text in {
        "setup.py": "",
        "kernels/cpu/simd.h": "",
        "pyproject.toml": PYPROJECT.format("anomalygpt_edge"),
        "backend.py": BACKEND,
        "constraints.txt": "llama-cpp-python==1.0\n",
    }.items():
        (root / name).write_text(text, encoding="utf-8")
    (root.parent / "index").mkdir()
    with tarfile.open(root.parent / "index/llama_cpp_python-1.0.tar.gz", "w:gz") as archive:
        for name, text in {
            "pyproject.toml": PYPROJECT.format("llama_cpp_python"),
            "backend.py": BACKEND,
            "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 1.0\n",
        }.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return root


def start(
    project: Path, *arguments: str, stderr: int = subprocess.PIPE, **more: str
) -> subprocess.Popen[str]:
    """The tool as a process, with none of this machine's settings of pip, CMake and make."""
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (project.parent / "index").as_uri(),
        "PIP_CACHE_DIR": str(project.parent / "cache"),
        "TMPDIR": str(project.parent),
        **more,
    }
    command = [sys.executable, *(arguments if "-c" in arguments else ("-m", "tools.venv", *arguments))]
    return subprocess.Popen(command, cwd=project, env=environment, stderr=stderr, text=True)


def run(project: Path, *arguments: str, **more: str) -> tuple[int, str]:
    """Exit status and stderr of the tool."""
    process = start(project, *arguments, **more)
    output = process.communicate(timeout=300)[1]
    return process.returncode, output


def stamp(project: Path) -> dict[str, str]:
    return json.loads((project / ".venv/stamp.json").read_text(encoding="utf-8"))


def log(project: Path) -> str:
    return (project / ".venv/install.log").read_text(encoding="utf-8")


def test_an_environment_is_made_kept_extended_and_repaired(project: Path) -> None:
    status, output = run(project)
    assert status == 0, output
    assert re.search(r"^\[2/3\] llama-cpp-python: 50 %, \d+ s left$", output, re.M)
    assert output.splitlines()[-1].startswith(".venv is ready (")
    assert "[7/20] c++ -DLLAVA_BUILD=OFF" in log(project)
    before = log(project)
    assert run(project) == (0, "")
    assert log(project) == before  # pip was not called

    status, output = run(project, "--extra", "dev", CMAKE_ARGS="-DGGML_CUDA=on")
    assert status == 0, output
    assert "-DLLAMA_BUILD_EXAMPLES=OFF -DGGML_CUDA=on -c file20.cpp" in log(project)
    assert run(project) == (0, "")
    assert (stamp(project)["extra"], stamp(project)["cmake_args"]) == ("dev", "-DGGML_CUDA=on")

    packages = next(project.glob(".venv/lib/python*/site-packages"))
    (packages / "llama_cpp_python.py").unlink()
    (packages / "llama_cpp_python-1.0.dist-info/RECORD").unlink()  # as if pip had been killed
    (project / "kernels/cpu/simd.h").write_text("// changed", encoding="utf-8")
    assert run(project)[0] == 0
    assert (packages / "llama_cpp_python.py").exists()

    shutil.rmtree(packages / "pip")
    (project / "constraints.txt").write_text("llama-cpp-python==1.0\n# changed\n", encoding="utf-8")
    assert run(project)[0] == 0
    assert (packages / "pip").exists()


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("file7.cpp:3:1: error: unknown type\nninja: build stopped: subcommand failed.", "GCC 9 or newer"),
        ("CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage", "sudo apt install build-essential"),
        ("fatal error: error writing to /tmp/x.s: No space left on device", "Free about 2 GiB"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("error: something else", "the lines above contain the cause"),
    ],
)
def test_a_failed_build_is_explained(project: Path, error: str, fix: str) -> None:
    status, output = run(project, TOY=error, CMAKE_ARGS="-DANEW=on")
    assert status == 2
    assert error.splitlines()[0] in output
    assert output.splitlines()[-2] == "    (complete output: .venv/install.log)"
    assert output.splitlines()[-1].startswith("make venv: ")
    assert fix in output.splitlines()[-1]
    assert stamp(project)["fingerprint"] == ""


def test_an_index_that_cannot_be_reached_or_lacks_a_package(project: Path) -> None:
    missing = {"PIP_FIND_LINKS": "", "CMAKE_ARGS": "-DANEW=on"}
    unreachable = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    status, output = run(project, **missing, **unreachable)
    assert (status, "cannot be reached. Check network" in output.splitlines()[-1]) == (2, True), output
    status, output = run(project, **missing)
    assert (status, "the package index lacks a package" in output.splitlines()[-1]) == (2, True), output


def test_an_interrupted_build_leaves_nothing_running(project: Path) -> None:
    """On a terminal, where the line is redrawn; a second run waits for the first and then continues."""
    controller, terminal = pty.openpty()
    first = start(project, stderr=terminal, TOY="hangs", CMAKE_ARGS="-DANEW=on")
    os.close(terminal)
    screen = ""
    with contextlib.suppress(OSError):  # the terminal is closed when the tool has ended
        while chunk := os.read(controller, 4096).decode():
            screen += chunk
            if "35 %" in chunk:
                second = start(project)
                assert second.stderr is not None
                assert second.stderr.readline().startswith("waiting: another make")
                first.send_signal(signal.SIGTERM)
    os.close(controller)
    assert first.wait(60) == 130
    assert "\r\033[K[2/3] llama-cpp-python: 35 %, " in screen
    assert screen.endswith("make venv: interrupted. Run it again to continue.\r\n")
    assert ".venv is ready" in second.communicate(timeout=300)[1]
    assert not list(project.parent.glob("pip-*"))  # pip was given the time to clean up


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("version_info = (3, 9, 2)", "3.10 to 3.13 are. Run make with PYTHON=python3.12."),
        (
            "executable = '../debian'",
            f"Run 'sudo apt install python{venv.THIS_PYTHON}-venv' and run it again.",
        ),
    ],
)
def test_a_python_that_cannot_make_the_environment(project: Path, python: str, message: str) -> None:
    shutil.rmtree(project / ".venv", ignore_errors=True)
    says = "The virtual environment was not created successfully because ensurepip is not\navailable."
    (project.parent / "debian").write_text(f"#!/bin/sh\necho '{says}'\nexit 1\n", encoding="utf-8")
    for name in ("debian", "python3.12"):
        (project.parent / name).touch()
        (project.parent / name).chmod(0o755)
    code = f"import runpy, sys; sys.{python}; runpy.run_module('tools.venv', run_name='__main__')"
    status, output = run(project, "-c", code, PATH=str(project.parent))
    assert (status, output.splitlines()[-1].endswith(message)) == (2, True), output


def test_a_folder_that_is_no_environment_is_left_alone(project: Path) -> None:
    shutil.rmtree(project / ".venv", ignore_errors=True)
    (project / ".venv").mkdir()
    (project / ".venv/precious").touch()
    status, output = run(project)
    assert (status, ".venv exists and is not a virtual environment" in output) == (2, True), output
    assert (project / ".venv/precious").exists()


def test_the_syntax_is_that_of_python_3_7_and_the_versions_those_of_setup_py() -> None:
    ast.parse((ROOT / "tools/venv.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    assert 'python_requires=">=3.10,<3.14"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert venv.SUPPORTED == ("3.10", "3.11", "3.12", "3.13")


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = venv.Progress("llama", io.StringIO())
    for second, step in ((0, 0), (30, 35), (60, 70), (120, 140)):
        monkeypatch.setattr(venv.time, "monotonic", lambda second=second: float(second))
        progress.read(f"  [{step}/140] c++ -c a.cpp\n")
    lines = ["llama", "llama: 25 %, 1 min 30 s left", "llama: 50 %, 1 min 00 s left", "llama: 100 %"]
    assert progress.stream.getvalue().splitlines() == lines

"""What is installed: the wheel's contents, its requirements, its import names, and the commands around it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from anomalygpt_edge.kernels.cuda import compiler

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "kernels", "models", "runtime")
ROOT_PACKAGE = Path("runtime/api/__init__.py")  # installed as anomalygpt_edge itself
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MIB = 2**20
NOT_SHIPPED = (
    ".py",
    ".pyc",
    ".so",
    ".cpp",
    ".h",
)  # beside the modules; what is compiled has its own test

# What the runtime must never load: an edge device does not have them.
HEAVY = ("torch", "onnx", "onnxscript", "gguf", "safetensors", "sentencepiece", "sklearn", "PIL")

WITHOUT_HEAVY = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))  # None: importing one raises
"""

IMPORT_THE_RUNTIME = f"""{WITHOUT_HEAVY}
import importlib, pkgutil
import anomalygpt_edge.kernels, anomalygpt_edge.runtime, anomalygpt_edge.runtime.synthetic.line
for package in (anomalygpt_edge.kernels, anomalygpt_edge.runtime):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# -- the wheel ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, built beside it; its bundle holds one file more, as a probe."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    bundle = source / "models/nano/bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "probe.bin").write_bytes(b"probe")
    if compiler.find_nvcc():
        compiler.compile_all(source / "build" / "cuda")  # into the user's cache, where the build finds it
    built = run_python("from setuptools import build_meta; build_meta.build_wheel('.')", source)
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(source.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_every_module_under_one_name(wheel: zipfile.ZipFile) -> None:
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    modules = {
        f"anomalygpt_edge/{'__init__.py' if path == ROOT_PACKAGE else path.as_posix()}" for path in paths
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"anomalygpt_edge", "anomalygpt_edge-0.1.0.dist-info"}
    assert not [name for name in wheel.namelist() if "test" in name.lower() or name.endswith(".pyc")]


def test_the_wheel_holds_the_bundled_model_and_the_runtimes_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "anomalygpt_edge/models/nano/bundle/probe.bin" in names
    data = [path for path in (ROOT / "models/nano/bundle").glob("*") if path.is_file()]
    for folder in ("runtime", "kernels"):
        data += [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in NOT_SHIPPED
        ]
    assert {f"anomalygpt_edge/{path.relative_to(ROOT).as_posix()}" for path in data} <= names
    assert sum(entry.file_size for entry in wheel.infolist()) <= 40 * MIB


@pytest.mark.skipif(
    compiler.find_nvcc() is None, reason="nvcc is not here: wheels built here bring no CUDA code"
)
def test_the_wheel_holds_cuda_code(wheel: zipfile.ZipFile) -> None:
    for file in compiler.files():
        code = wheel.read(f"anomalygpt_edge/kernels/cuda/{file}.fatbin")
        assert code[:4] == b"\x50\xed\x55\xba", "a fat binary's magic number"


def test_the_wheel_holds_the_compiled_kernels(wheel: zipfile.ZipFile) -> None:
    """Every level in one file, chosen at run time."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".so"))
    assert name.startswith("anomalygpt_edge/kernels/cpu/_native.")
    levels = {"x86_64": ["baseline", "avx2", "avx512", "vnni"], "aarch64": ["baseline", "neondot"]}
    content = wheel.read(name)
    for level in levels[platform.machine()]:
        assert f"cpu-{level}".encode() in content


def test_no_inline_function_of_a_level_is_shared(tmp_path: Path) -> None:
    """The linker keeps one copy of a weak symbol: it must not be the one compiled for AVX-512."""
    flags = (
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
        if platform.machine() == "x86_64"
        else []
    )
    compiled = tmp_path / "level.o"
    command = [shutil.which("g++") or "c++", "-std=gnu++17", "-O1", *flags, "-DLEVEL=baseline", "-c"]
    subprocess.run([*command, str(ROOT / "kernels/cpu/level.cpp"), "-o", str(compiled)], check=True)
    symbols = subprocess.run(["nm", str(compiled)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if re.search(r" [WVuBTD] ", line)]
    assert ["baseline_kernels" in line for line in shared] == [True]


def test_without_a_compiler_it_installs_and_numpy_does_the_work(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "bundle", "training", "checkpoint")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    environ = {**os.environ, "CC": "false", "CXX": "false"}
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=environ, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(source.glob("*.whl"))) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(target)
    code = f"""
import sys, warnings
sys.path.insert(0, {str(target)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__ + repr(finder)]
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from anomalygpt_edge import kernels
    assert kernels.__file__.startswith({str(target)!r}), kernels.__file__
    for _ in range(2):
        kernels.preprocess(np.zeros((9, 9, 3), np.uint8), 8, "crop", (0, 0, 0), (1, 1, 1))
print(kernels.available(), len(caught), caught[0].message)
"""
    ran = run_python(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("('reference',) 1 the compiled kernels are not installed")


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    info = "anomalygpt_edge-0.1.0.dist-info"
    assert "agpt = anomalygpt_edge.runtime.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"


# -- requirements ------------------------------------------------------------------------------------


def requirements(metadata: Message, python: str, extra: str = "") -> list[Requirement]:
    """What pip would install for one Python, with one extra."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "extra": extra}
    every = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [item for item in every if item.marker is None or item.marker.evaluate(environment)]


def pins(python: str) -> dict[str, str]:
    """constraints.txt for one Python: name -> version."""
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = next(iter(pin.specifier)).version
    return found


def test_the_runtime_needs_little_and_no_torch(metadata: Message) -> None:
    names = {requirement.name for requirement in requirements(metadata, "3.11")}
    assert {"numpy", "opencv-python-headless", "onnxruntime", "llama-cpp-python"} <= names
    assert len(names) <= 10
    assert not names & {"torch", "onnx", "gguf", "opencv-python", "pillow"}


def test_every_requirement_is_bounded(metadata: Message) -> None:
    for requirement in (Requirement(line) for line in metadata.get_all("Requires-Dist", [])):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {"=="} or {">=", "<"} <= operators, requirement


def test_the_extras(metadata: Message) -> None:
    extras = {"export", "lite", "cuda", "tensorrt", "tensorrt-rtx", "mqtt", "web", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    export = {item.name for item in requirements(metadata, "3.11", "export")}
    assert export <= {item.name for item in requirements(metadata, "3.11", "dev")}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_fit_every_requirement(metadata: Message, python: str) -> None:
    tested = pins(python)
    for requirement in requirements(metadata, python, "dev"):
        version = tested.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name} for Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_constraints_pin_what_the_requirements_need_in_turn(metadata: Message) -> None:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tested = pins(python)
    waiting = [canonicalize_name(item.name) for item in requirements(metadata, python, "dev")]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue  # torch pins its CUDA libraries itself
        seen.add(name)
        assert name in tested, f"constraints.txt does not pin {name}"
        for line in importlib.metadata.requires(name) or []:
            item = Requirement(line)
            if item.marker is None or item.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(item.name))
    assert len(seen) > 40


# -- imports -----------------------------------------------------------------------------------------


def test_importing_the_runtime_needs_no_torch(tmp_path: Path) -> None:
    result = run_python(IMPORT_THE_RUNTIME, tmp_path)
    assert result.returncode == 0, result.stderr


def test_running_the_runtime_needs_no_torch(tmp_path: Path, tiny_bundle: Path) -> None:
    """The demo line, few-shot, with overlays: every import that waits inside a function is reached."""
    arguments = ["agpt", "run", "--bundle", str(tiny_bundle), "--parts", "3", "--out", str(tmp_path / "out")]
    code = (
        WITHOUT_HEAVY + f"sys.argv = {arguments}\nfrom anomalygpt_edge.runtime.cli.main import main\nmain()"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    records = (tmp_path / "out/records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(records) == 3
    assert {json.loads(record)["status"] for record in records} <= {"PASS", "FAIL"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bare_import_is_refused(tmp_path: Path, folder: str) -> None:
    result = run_python(f"import {folder}", tmp_path)
    assert f"No module named '{folder}'" in result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_lint_refuses_a_bare_import(tmp_path: Path, folder: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--no-cache",
        "-",
    ]
    source = f"from {folder} import thing\n\nprint(thing)\n"
    result = subprocess.run(command, input=source, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"import anomalygpt_edge.{folder}" in result.stdout


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_bare(folder: str) -> None:
    """What ruff cannot tell from a relative import inside the packages."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(FOLDERS), f"{path}: {ast.unparse(node)}"


def test_the_wheel_alone_is_importable(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Not through the editable install: a module that setup.py forgot would be missing here."""
    wheel.extractall(tmp_path)
    here = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    tell = "print(anomalygpt_edge.runtime.__file__)"
    result = run_python(here + IMPORT_THE_RUNTIME + tell, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))


# -- commands ----------------------------------------------------------------------------------------


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", makefile(), re.M))


def test_make_targets() -> None:
    wanted = "help demo test test-slow lint bench venv venv-dev nano-train nano-bundle nano-sheet clean"
    assert make_targets() >= set(wanted.split())
    for target in make_targets():
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_make_help_lists_every_target() -> None:
    result = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {line.split()[1] for line in result.stdout.splitlines()} == make_targets()


def test_the_modules_that_make_runs_exist() -> None:
    modules = set(re.findall(r"-m (anomalygpt_edge[\w.]+)", makefile()))
    assert modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_the_documentation_names_only_targets_that_exist() -> None:
    """README's other tests, and those of docs/, are in tests/test_docs.py."""
    pages = [ROOT / "README.md", ROOT / "models/nano/MODEL_CARD.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.M))
        assert named <= make_targets(), page.name
        if page.name == "README.md":
            assert {"demo", "test"} <= named


@pytest.mark.parametrize(
    ("lint", "sanitize", "slow", "test", "status"),
    [
        (0, 0, 0, 0, 0), (1, 0, 0, 0, 1), (0, 0, 0, 2, 2), (1, 0, 0, 2, 2), (0, 3, 0, 0, 3), (1, 2, 0, 0, 2),
        (0, 0, 2, 0, 2), (1, 0, 3, 2, 3),
    ],
)  # fmt: skip
def test_ci_ends_with_pytests_closing_line(
    tmp_path: Path, lint: int, sanitize: int, slow: int, test: int, status: int
) -> None:
    """The script itself, with a make that only says what it was asked for."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    make = tmp_path / "make"
    make.write_text(
        "#!/bin/sh\n"
        "read line && exit 9  # standard input must be closed\n"
        "[ $CI = true ] || exit 8\n"
        f"case $1 in lint) echo linted; exit {lint};; test-sanitize) echo checked; exit {sanitize};;\n"
        f"test-slow) echo waited; exit {slow};;\n"
        f"test) echo '5 passed in 1.00s'; exit {test};; esac\n"
        "exit 7\n",
        encoding="utf-8",
    )
    make.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        [tmp_path / ".ci/run"],
        cwd="/",
        env=environ,
        input="typed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status
    assert result.stdout.splitlines() == ["linted", "checked", "waited", "5 passed in 1.00s"]

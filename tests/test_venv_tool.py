"""tools/venv.py and tools/progress.py: what they read, what they say, and whole runs with a toy index.

The index is a folder: llama-cpp-python is a source package whose build backend prints what ninja prints, and
the project needs nothing else. So pip, venv, stamps, logs, failures and interruptions are the real ones.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools is never installed
progress = importlib.import_module("tools.progress")
venv = importlib.import_module("tools.venv")
sys.path.remove(str(ROOT))


# -- reading builds and pip --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fraction"),
    [
        ("  [35/140] /usr/bin/g++ -DGGML_SHARED -o a.o -c a.cpp", 0.25),
        ("[140/140] Linking CXX shared library libllama.so", 1.0),
        ("  [ 45%] Building CXX object vendor/llama.cpp/a.cpp.o", 0.45),
        ("[100%] Built target llama", 1.0),
        ("[3/0] nonsense", None),
        ("  [notice] A new release of pip is available", None),
        ("a line with [3/4] in the middle", None),
        ("", None),
    ],
)
def test_build_fraction(line: str, fraction: float | None) -> None:
    assert progress.build_fraction(line) == fraction


@pytest.mark.parametrize(
    ("line", "action"),
    [
        (
            "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (191.8 MB)",
            "downloading torch (191.8 MB)",
        ),
        ("Downloading some/path/onnx_ir-1.1.0-py3-none-any.whl (2 kB)", "downloading onnx_ir (2 kB)"),
        ("Installing collected packages: numpy, torch", "unpacking"),
        ("  Installing build dependencies: started", "preparing a build"),
        ("Requirement already satisfied: numpy", None),
    ],
)
def test_pip_action(line: str, action: str | None) -> None:
    assert progress.pip_action(line) == action


# -- time left ---------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_the_pace_and_counts_down() -> None:
    clock = Clock()
    left = progress.TimeLeft(clock)
    assert left.seconds() is None
    left.step(0.0)
    assert left.seconds() is None  # no pace yet
    clock.now = 30.0
    left.step(0.25)
    assert left.seconds() == pytest.approx(90.0)
    clock.now = 50.0
    assert left.seconds() == pytest.approx(70.0)
    clock.now = 500.0
    assert left.seconds() == 1.0  # late, but not negative


def test_time_left_starts_anew_with_a_second_build() -> None:
    clock = Clock()
    left = progress.TimeLeft(clock)
    for now, fraction in ((0, 0.0), (10, 1.0), (20, 0.0), (40, 0.5)):
        clock.now = float(now)
        left.step(fraction)
    assert left.seconds() == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (130, "2 min 10 s")]
)
def test_duration(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def test_display_in_a_log_writes_every_tenth_once() -> None:
    stream, clock = io.StringIO(), Clock()
    display = progress.Display(stream, num_stages=4, clock=clock)
    display.stage("compiling")
    for step in range(1, 141):
        clock.now += 2.0
        display.hear(f"[{step}/140] cc -c file.c")
        display.tick()
    display.done("ready")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/4] compiling"
    assert [line.split(": ")[1].split(",")[0] for line in lines[1:-1]] == [f"{n}0%" for n in range(1, 11)]
    assert lines[5] == "[1/4] compiling: 50%, 2 min 20 s left"
    assert lines[-1] == "[1/4] compiling: ready (4 min 40 s)"


# -- sentences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "fix"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        (
            "CMake Error: CMake 3.21 or higher is required. You are running version 3.18",
            "apt-get install cmake",
        ),
        ("ERROR: No matching distribution found for cmake>=3.21", "apt-get install cmake"),
        ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "apt-get install build-essential"),
        ("-- Could not find nvcc\nCMake Error: CUDA Toolkit not found", "CUDA toolkit"),
        ("urllib3.exceptions.NewConnectionError: [Errno 101] Network is unreachable", "network and proxy"),
        ("ssl.SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("ERROR: Could not find a version that satisfies x==1 (from versions: none)", "pip config list"),
        ("ERROR: ResolutionImpossible: for help visit", "package index"),
        ("PermissionError: [Errno 13] Permission denied: '.venv/lib'", "chown"),
        ("[3/9] c++ -c a.cpp\na.cpp:1:2: error: expected ';'", "GCC 9 or newer"),
        ("something nobody has seen before", "run again"),
    ],
)
def test_explain_names_the_fix(output: str, fix: str) -> None:
    sentence = progress.explain(output.splitlines())
    assert fix in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "list."))


def test_excerpt_keeps_what_tells_and_drops_what_repeats() -> None:
    lines = [
        "Collecting llama-cpp-python",
        "  [7/9] c++ -Werror=format -c a.cpp",
        "  a.cpp:10:5: error: 'foo' was not declared in this scope",
        "  ninja: build stopped: subcommand failed.",
        "error: subprocess-exited-with-error",
        "  × Building wheel for llama-cpp-python (pyproject.toml) did not run successfully.",
        "  ERROR: Failed building wheel for llama-cpp-python",
    ]
    assert progress.excerpt(lines) == ("a.cpp:10:5: error: 'foo' was not declared in this scope",)
    assert progress.excerpt(["one", "", "two"]) == ("one", "two")


# -- checks of the machine -----------------------------------------------------------------------------


def test_an_old_python_is_refused_and_a_better_one_named() -> None:
    with pytest.raises(venv.Problem, match=r"3\.9 is not supported.*make PYTHON=python3\.12"):
        venv.check_python("3.9", which=lambda name: name if name in ("python3.10", "python3.12") else None)
    with pytest.raises(venv.Problem, match=r"3\.14 is not supported.*apt-get install python3"):
        venv.check_python("3.14", which=lambda name: None)
    for version in ("3.10", "3.11", "3.12", "3.13"):
        venv.check_python(version, which=lambda name: None)


def test_supported_versions_are_those_of_setup_py() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'python_requires=">=3.10,<3.14"' in setup
    assert venv.SUPPORTED == ("3.10", "3.11", "3.12", "3.13")


def test_a_full_disk_is_refused() -> None:
    venv.check_disk("dev", 100 * venv.GIB)
    with pytest.raises(venv.Problem, match=r"0\.5 GiB are free here, about \d\.\d GiB are needed"):
        venv.check_disk("", 0.5 * venv.GIB)


def test_compilers() -> None:
    both = {"gcc", "g++"}
    assert venv.find_compilers({}, which=lambda name: name if name in both else None) == "g++"
    assert venv.find_compilers({"CC": "icc -O2", "CXX": "icpc"}, which=lambda name: name) == "icpc"
    with pytest.raises(venv.Problem, match=r"no C\+\+ compiler.*apt-get install build-essential"):
        venv.find_compilers({}, which=lambda name: name if name == "gcc" else None)
    with pytest.raises(venv.Problem, match=r"no C compiler \(my-cc\)"):
        venv.find_compilers({"CC": "my-cc"}, which=lambda name: None)


@pytest.mark.parametrize(
    ("environ", "cores", "memory_gib", "jobs"),
    [({}, 8, 32, "8"), ({}, 8, 4, "4"), ({}, 4, 0.5, "1"), ({"CMAKE_BUILD_PARALLEL_LEVEL": "3"}, 8, 1, "3")],
)
def test_build_jobs(environ: dict[str, str], cores: int, memory_gib: float, jobs: str) -> None:
    assert venv.build_jobs(environ, cores, int(memory_gib * venv.GIB)) == jobs


def test_the_users_cmake_args_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "mine.txt")
    environ = venv.pip_environment("-DGGML_CUDA=on")
    assert environ["CMAKE_ARGS"].startswith("-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF")
    assert environ["CMAKE_ARGS"].endswith("-DLLAMA_BUILD_EXAMPLES=OFF -DGGML_CUDA=on")
    assert environ["PIP_CONSTRAINT"].split() == ["mine.txt", "constraints.txt"]


# -- stamps ------------------------------------------------------------------------------------------


def test_stamp_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "stamp.json"
    assert venv.read_stamp(path) == venv.Stamp()
    stamp = venv.Stamp("f" * 64, "3.11", "dev", "-DGGML_CUDA=on")
    venv.write_stamp(stamp, path)
    assert venv.read_stamp(path) == stamp
    for damaged in ("", "{", '{"fingerprint": "x", "other": 1}', "[1]", "null"):
        path.write_text(damaged, encoding="utf-8")
        assert venv.read_stamp(path) == venv.Stamp()


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", "constraints.txt", "kernels/cpu/simd.h"])
def test_fingerprint_follows_the_files_and_the_place(tmp_path: Path, name: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "kernels/cpu").mkdir(parents=True)
        for file in ("setup.py", "pyproject.toml", "constraints.txt", "kernels/cpu/simd.h"):
            (folder / file).write_text(file, encoding="utf-8")
    before = venv.fingerprint(here)
    assert before != venv.fingerprint(there)  # a moved .venv has stale paths
    (here / name).write_text("changed", encoding="utf-8")
    assert venv.fingerprint(here) != before


def test_what_was_asked_for_earlier_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTHON", "CMAKE_ARGS"):
        monkeypatch.delenv(variable, raising=False)
    earlier = venv.Stamp("old", "3.10", "dev", "-DGGML_CUDA=on")
    assert venv.wanted_stamp("", earlier)[1:] == ("3.10", "dev", "-DGGML_CUDA=on")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=on")
    monkeypatch.setenv("PYTHON", "python3")
    assert venv.wanted_stamp("dev", venv.Stamp())[1:] == (venv.running_python(), "dev", "-DGGML_VULKAN=on")


# -- whole runs --------------------------------------------------------------------------------------

BACKEND = '''
"""A build backend without dependencies: writes a wheel by hand, and prints what ninja would."""
import os, sys, time, zipfile

def write_wheel(folder, name, files):
    tag = f"{name}-1.0"
    files = dict(files)
    about = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "Provides-Extra: dev", ""]
    format = ["Wheel-Version: 1.0", "Generator: toy", "Root-Is-Purelib: true", "Tag: py3-none-any", ""]
    files[f"{tag}.dist-info/METADATA"] = "\\n".join(about)
    files[f"{tag}.dist-info/WHEEL"] = "\\n".join(format)
    files[f"{tag}.dist-info/RECORD"] = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(os.path.join(folder, f"{tag}-py3-none-any.whl"), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return f"{tag}-py3-none-any.whl"
'''

LLAMA_BACKEND = (
    BACKEND
    + """
def build_wheel(folder, config_settings=None, metadata_directory=None):
    how = os.environ.get("TOY", "works")
    for step in range(1, 21):
        print(f"[{step}/20] c++ {os.environ['CMAKE_ARGS']} -c file{step}.cpp", flush=True)
        if how == "breaks" and step == 7:
            print("file7.cpp:3:1: error: unknown type name 'concept'")
            print("ninja: build stopped: subcommand failed.")
            sys.exit(1)
        if how == "hangs" and step == 7:
            time.sleep(60)
    return write_wheel(folder, "llama_cpp_python", {"llama_cpp.py": ""})
"""
)

PROJECT_BACKEND = (
    BACKEND
    + """
def build_editable(folder, config_settings=None, metadata_directory=None):
    modules = ("cv2", "msgspec", "numpy", "onnxruntime", "anomalygpt_edge/runtime/__init__")
    return write_wheel(folder, "anomalygpt_edge", {f"{module}.py": "" for module in modules})
"""
)

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "{name}"
version = "1.0"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in small, in a folder with a blank in its name, beside its package index."""
    root = tmp_path_factory.mktemp("venv tool") / "check out"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", root)
    files = {
        "setup.py": "",
        "pyproject.toml": PYPROJECT.format(name="anomalygpt_edge"),
        "backend.py": PROJECT_BACKEND,
        "constraints.txt": "llama-cpp-python==1.0\n",
    }
    for name, text in files.items():
        (root / name).write_text(textwrap.dedent(text), encoding="utf-8")
    index = root.parent / "index"
    index.mkdir()
    with tarfile.open(index / "llama_cpp_python-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("pyproject.toml", PYPROJECT.format(name="llama_cpp_python")),
            ("backend.py", LLAMA_BACKEND),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 1.0\n"),
        ):
            entry = tarfile.TarInfo(f"llama_cpp_python-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return root


def environment(project: Path, **more: str) -> dict[str, str]:
    """Nothing of this machine's pip, CMake or make settings."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (project.parent / "index").as_uri(),
        "PIP_CACHE_DIR": str(project.parent / "cache"),
        **more,
    }


def run_tool(project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.venv", *arguments],
        cwd=project,
        env=environment(project, **more),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def stamp_of(project: Path) -> dict[str, str]:
    return json.loads((project / ".venv/stamp.json").read_text(encoding="utf-8"))


def test_no_compiler_is_one_sentence(project: Path, tmp_path: Path) -> None:
    result = run_tool(project, PATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("make venv: no C compiler (cc, gcc, clang)")
    assert "apt-get install build-essential" in result.stderr
    assert not (project / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(project: Path) -> None:
    precious = project / ".venv/precious"
    precious.parent.mkdir()
    precious.write_text("data", encoding="utf-8")
    result = run_tool(project)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("make venv: .venv exists and is no virtual environment")
    assert precious.read_text(encoding="utf-8") == "data"
    shutil.rmtree(project / ".venv")


def test_a_life_of_an_environment(project: Path) -> None:
    """Broken build, interrupted build, success, nothing to do, one more extra, half-made environment."""
    broken = run_tool(project, TOY="breaks")
    assert broken.returncode == 2
    assert "file7.cpp:3:1: error: unknown type name 'concept'" in broken.stderr
    assert "all of it: .venv/install.log" in broken.stderr
    assert broken.stderr.splitlines()[-1].startswith("make venv: llama.cpp does not compile")
    assert stamp_of(project)["fingerprint"] == ""
    assert "[7/20] c++ -DLLAVA_BUILD=OFF" in (project / ".venv/install.log").read_text(encoding="utf-8")

    interrupted_run(project)
    assert stamp_of(project)["fingerprint"] == ""

    good = run_tool(project)
    assert good.returncode == 0, good.stderr
    assert "[2/4] virtual environment .venv: there already" in good.stderr
    assert "[3/4] llama-cpp-python 1.0: 50%" in good.stderr
    assert good.stderr.splitlines()[-1].startswith(".venv is ready (")
    assert stamp_of(project)["extra"] == ""

    log = (project / ".venv/install.log").read_text(encoding="utf-8")
    again = run_tool(project)
    assert (again.returncode, again.stderr, again.stdout) == (0, "", "")
    assert (project / ".venv/install.log").read_text(encoding="utf-8") == log  # pip was not even asked

    developer = run_tool(project, "--extra", "dev")
    assert developer.returncode == 0, developer.stderr
    assert "nothing to compile" in developer.stderr
    assert stamp_of(project)["extra"] == "dev"
    assert run_tool(project).stderr == ""  # the dev environment serves the runtime too

    shutil.rmtree(next(project.glob(".venv/lib/python*/site-packages/pip")))
    (project / "constraints.txt").write_text("llama-cpp-python==1.0\n# changed\n", encoding="utf-8")
    repaired = run_tool(project)
    assert repaired.returncode == 0, repaired.stderr
    assert "[2/4] virtual environment .venv: made" in repaired.stderr
    assert stamp_of(project)["extra"] == "dev"


def interrupted_run(project: Path) -> None:
    """Ctrl-C in the middle of the build, on a terminal: a line that is redrawn, and nothing left running."""
    controller, terminal = pty.openpty()
    tool = subprocess.Popen(
        [sys.executable, "-m", "tools.venv"],
        cwd=project,
        env=environment(project, TOY="hangs", TMPDIR=str(project.parent)),
        stderr=terminal,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(terminal)
    screen = read_screen(controller, until="35%")
    tool.send_signal(signal.SIGINT)
    screen += read_screen(controller, until="to go on.\r\n")
    os.close(controller)
    assert tool.wait(60) == 130
    assert "\r\033[2K[3/4] llama-cpp-python 1.0: 35%" in screen
    assert "make venv: interrupted; run it again to go on." in screen
    assert not list(project.parent.glob("pip-*"))  # pip was given the time to tidy up


def read_screen(controller: int, until: str) -> str:
    """What a terminal shows until some words appear, or the other side is gone."""
    screen = ""
    while until not in screen:
        try:
            screen += os.read(controller, 4096).decode()
        except OSError:
            break
    return screen


def test_pip_is_told_to_install_again_what_was_killed_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    for name, files in (("whole-1.0", ["METADATA", "RECORD"]), ("half-1.0", ["METADATA"])):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        for file in files:
            (packages / f"{name}.dist-info" / file).touch()
    monkeypatch.setattr(venv, "VENV", tmp_path)
    venv.drop_half_installed()
    assert [info.name for info in packages.iterdir()] == ["whole-1.0.dist-info"]

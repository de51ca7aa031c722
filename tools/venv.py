"""Makes the virtual environment behind every make target: ``python3 -m tools.venv [--extra dev]``.

It needs nothing but the standard library and is run by the system's Python, which may be too old for the
project: its grammar stays at Python 3.7's so that it can say so. A finished environment carries a stamp;
where that fits, a run ends at once. Where it does not, the machine is checked, ``.venv`` made or repaired,
llama-cpp-python compiled (minutes, so with percent and time left) and the rest installed. All that pip said
is kept in ``.venv/install.log``. An interrupted or failed run leaves no valid stamp; the next one goes on.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, TextIO  # noqa: UP035  (the grammar of Python 3.7)

from . import progress

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "stamp.json"
LOG = VENV / "install.log"
PYTHON = VENV / "bin" / "python"

SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
GIB = 2**30
DISK_NEEDED = {"": 1.5 * GIB, "dev": 4 * GIB}  # measured: 0.5 and 1.9 GiB, and room to compile and unpack
MEMORY_PER_JOB = 1 * GIB  # what one compiler process on llama.cpp's largest files may take

# Only the library is needed: without these llama.cpp compiles in two thirds of the time.
CMAKE_ARGS = " ".join(
    f"-D{option}=OFF"
    for option in (
        "LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES",
    )
)  # fmt: skip
LIBRARIES = "cv2, llama_cpp, msgspec, numpy, onnxruntime, anomalygpt_edge.runtime"
Which = Callable[[str], "str | None"]


class Problem(Exception):
    """What stops the installation: one sentence that names the fix, and the lines that show why."""

    def __init__(self, sentence: str, excerpt: tuple[str, ...] = ()) -> None:
        super().__init__(sentence)
        self.excerpt = excerpt


class Stamp(NamedTuple):
    """What an environment was made from. With no fingerprint it only remembers what was asked for earlier."""

    fingerprint: str = ""
    python: str = ""  # "3.11"
    extra: str = ""  # "" or "dev"
    cmake_args: str = ""  # the user's own, for llama.cpp


# -- stamp -----------------------------------------------------------------------------------------


def fingerprint(root: Path = ROOT) -> str:
    """sha256 over all that decides what is installed, and over where: a moved .venv holds stale paths."""
    digest = hashlib.sha256(str(root).encode())
    compiled = sorted(path for path in (root / "kernels/cpu").glob("*") if path.suffix in (".cpp", ".h"))
    for path in (root / "setup.py", root / "pyproject.toml", root / "constraints.txt", *compiled):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp(path: Path = STAMP) -> Stamp:
    """The stamp; an empty one where there is none that can be read."""
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Stamp()


def write_stamp(stamp: Stamp, path: Path = STAMP) -> None:
    """Write it whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(stamp._asdict()), encoding="utf-8")
    os.replace(draft, path)


# -- the machine -----------------------------------------------------------------------------------


def running_python() -> str:
    """This Python's version, as ``3.11``."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def is_supported(python: str) -> bool:
    """True for a version such as ``3.11`` that the project runs on."""
    return python in SUPPORTED


def check_python(python: str, which: Which = shutil.which) -> None:
    """Raise Problem unless the project runs on this version; name a Python of this machine that would do."""
    if is_supported(python):
        return
    others = [f"python{version}" for version in reversed(SUPPORTED) if which(f"python{version}")]
    fix = f"run make PYTHON={others[0]}" if others else "sudo apt-get install python3, or a newer system"
    raise Problem(f"Python {python} is not supported, {SUPPORTED[0]} to {SUPPORTED[-1]} are: {fix}.")


def check_venv_module() -> None:
    """Raise Problem where Debian has split ensurepip, which venv needs, from its Python."""
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python{running_python()}-venv"
        raise Problem(f"this Python cannot make virtual environments: sudo apt-get install {package}")


def check_disk(extra: str, free: float) -> None:
    """Raise Problem if the environment would not fit into ``free`` bytes."""
    needed = DISK_NEEDED[extra]
    if free < needed:
        sizes = f"{free / GIB:.1f} GiB are free here, about {needed / GIB:.1f} GiB are needed"
        raise Problem(f"{sizes}: free some and run again.")


def find_compilers(environ: dict[str, str], which: Which = shutil.which) -> str:
    """The C++ compiler that CMake will find; raise Problem unless there is a C and a C++ one."""
    names = {
        "C": [environ["CC"]] if environ.get("CC") else ["cc", "gcc", "clang"],
        "C++": [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"],
    }
    found = ""
    for language, candidates in names.items():
        found = next((name for name in candidates if which(name.split()[0])), "")
        if not found:
            raise Problem(
                f"no {language} compiler ({', '.join(candidates)}), and llama.cpp has to be compiled: "
                "sudo apt-get install build-essential cmake"
            )
    return found


def build_jobs(environ: dict[str, str], cores: int, memory: int) -> str:
    """How many compilers run at once: the user's choice, else one a core as far as ``memory`` bytes reach."""
    return environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(max(1, min(cores, memory // MEMORY_PER_JOB)))


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- the environment -------------------------------------------------------------------------------


def venv_python() -> str:
    """The version of .venv's Python; empty where that does not run pip, as in a half-made one."""
    if not PYTHON.exists():
        return ""
    code, output = progress.capture(
        [str(PYTHON), "-c", "import pip, sys; print(*sys.version_info[:2], sep='.')"]
    )
    return output.strip() if code == 0 else ""


def make_venv() -> None:
    """Make .venv anew; never over a folder that is something else."""
    if VENV.exists() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").exists():
        raise Problem(f"{VENV.name} exists and is no virtual environment: move it away and run again.")
    code, output = progress.capture([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code != 0:
        raise Problem(progress.explain(output.splitlines()), progress.excerpt(output.splitlines()))


def drop_half_installed() -> None:
    """Remove the metadata of packages whose installation was killed, so that pip installs them again.

    pip writes RECORD last; without it a package counts as installed but may lack files.
    """
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def pinned(package: str) -> str:
    """``package==version`` as constraints.txt has it."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.split(";")[0].strip()
    raise Problem(f"constraints.txt does not pin {package}: add its line and run again.")


def is_installed(requirement: str) -> bool:
    """True if exactly this ``package==version`` lies in .venv."""
    name, version = requirement.split("==")
    return any(VENV.glob(f"lib/python*/site-packages/{name.replace('-', '_')}-{version}.dist-info"))


def pip_environment(cmake_args: str) -> dict[str, str]:
    """The user's environment, with llama.cpp's build set up and constraints.txt over builds as well.

    The path is relative (pip runs in ROOT): pip splits this variable at blanks.
    """
    environ = dict(os.environ)
    environ["PIP_CONSTRAINT"] = f"{environ.get('PIP_CONSTRAINT', '')} constraints.txt".strip()
    environ["PIP_BUILD_CONSTRAINT"] = environ["PIP_CONSTRAINT"]  # newer pips keep the two apart
    environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    environ["PYTHONUNBUFFERED"] = "1"
    environ["CMAKE_ARGS"] = f"{CMAKE_ARGS} {cmake_args}".strip()  # the user's come last and so win
    environ["CMAKE_BUILD_PARALLEL_LEVEL"] = build_jobs(environ, count_cores(), count_memory())
    return environ


def pip(arguments: list[str], display: progress.Display, environ: dict[str, str]) -> None:
    """Run pip in .venv under one stage of the display; raise Problem with what it said if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    with open(LOG, "a", encoding="utf-8") as log:
        print(f"\n$ pip {' '.join(command[3:])}", file=log, flush=True)
        code, lines = progress.watch(command, display, log, cwd=ROOT, env=environ)
    if code != 0:
        raise Problem(progress.explain(lines), progress.excerpt(lines))


def check_loads() -> None:
    """Raise Problem unless the runtime's libraries load."""
    code, output = progress.capture([str(PYTHON), "-c", f"import {LIBRARIES}"])
    if code != 0:
        reason = (output.strip().splitlines() or ["no message"])[-1]
        raise Problem(f"installed, but it does not load ({reason}): rm -r .venv and run again.")


# -- the run ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What has to be done on this machine."""

    python: str  # the environment's version, "3.11"
    make: bool  # .venv is missing or of no use
    compile: bool  # llama-cpp-python is missing, or was built with other CMAKE_ARGS
    rebuild: bool  # the latter


def install(wanted: Stamp, previous: Stamp, stream: TextIO) -> None:
    """All stages, from the check of the machine to the stamp."""
    display = progress.Display(stream, num_stages=4)
    plan = check_machine(wanted, previous, display)
    prepare_venv(plan, previous, display)
    install_llama(wanted, plan, display)
    install_rest(wanted, display)
    write_stamp(wanted._replace(python=plan.python))


def check_machine(wanted: Stamp, previous: Stamp, display: progress.Display) -> Plan:
    """Find out what has to be done, and raise Problem if something for it is missing."""
    display.stage("this machine")
    python = venv_python()
    usable = python == running_python() if asked_for_python() else is_supported(python)
    if not usable:
        python = running_python()
        check_python(python)
        check_venv_module()
    if not usable or wanted.extra != previous.extra:
        check_disk(wanted.extra, shutil.disk_usage(ROOT).free)
    rebuild = wanted.cmake_args != previous.cmake_args
    compiles = rebuild or not usable or not is_installed(pinned("llama-cpp-python"))
    display.done(f"Python {python}, " + (describe_compilers() if compiles else "nothing to compile"))
    return Plan(python, make=not usable, compile=compiles, rebuild=rebuild)


def prepare_venv(plan: Plan, previous: Stamp, display: progress.Display) -> None:
    """Make or mend .venv; from here on its stamp is void until all is done."""
    display.stage(f"virtual environment {VENV.name}")
    if plan.make:
        make_venv()
    write_stamp(previous._replace(fingerprint=""))
    drop_half_installed()
    display.done("made" if plan.make else "there already")


def install_llama(wanted: Stamp, plan: Plan, display: progress.Display) -> None:
    """Compile llama-cpp-python.

    pip's cache of built wheels does not look at CMAKE_ARGS: a build with the user's own must not come from
    it, nor end in it.
    """
    requirement = pinned("llama-cpp-python")
    environ = pip_environment(wanted.cmake_args)
    display.stage(requirement.replace("==", " "))
    if plan.compile:
        own_build = ["--no-cache-dir"] if wanted.cmake_args else []
        replace = ["--force-reinstall", "--no-deps"] if plan.rebuild else []
        pip(["-v", *own_build, *replace, requirement], display, environ)
    display.done("ready")


def install_rest(wanted: Stamp, display: progress.Display) -> None:
    """Install everything else, the project itself editable, and try to load it."""
    display.stage("all other packages" + (", with those for export and tests" if wanted.extra else ""))
    pip(["-e", f".[{wanted.extra}]" if wanted.extra else "."], display, pip_environment(wanted.cmake_args))
    check_loads()
    display.done("ready")


def describe_compilers() -> str:
    """What llama.cpp will be compiled with; raise Problem if something is missing that pip cannot bring."""
    compiler = find_compilers(dict(os.environ))
    return f"{compiler}, " + ("CMake" if shutil.which("cmake") else "CMake by pip")


def asked_for_python() -> bool:
    """True if the user named a Python: make hands on PYTHON only then (``make PYTHON=python3.12 venv``)."""
    return "PYTHON" in os.environ


def wanted_stamp(extra: str, previous: Stamp) -> Stamp:
    """What this run is asked for; what was asked for earlier (dev packages, a CUDA build) stays."""
    return Stamp(
        fingerprint=fingerprint(),
        python=running_python() if asked_for_python() else previous.python,
        extra=extra or previous.extra,
        cmake_args=os.environ.get("CMAKE_ARGS", "").strip() or previous.cmake_args,
    )


def lock(stream: TextIO) -> TextIO:
    """Hold this file's lock, so that two makes at once do not install into each other; say when waiting."""
    handle = open(__file__, encoding="utf-8")  # noqa: SIM115  (held until the process ends)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("another make is installing into .venv: waiting for it", file=stream, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def report(problem: Problem, stream: TextIO) -> None:
    """The lines that show why, where all of them are, and last the sentence."""
    print(file=stream)
    for line in problem.excerpt:
        print(f"    {line}", file=stream)
    if problem.excerpt and LOG.exists():
        print(f"    (all of it: {LOG.relative_to(ROOT)})", file=stream)
    print(f"make venv: {problem}", file=stream)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools.venv", description="Make or complete .venv.")
    parser.add_argument("--extra", choices=["dev"], default="", help="install what tests and export need too")
    extra = parser.parse_args(arguments).extra
    started = time.monotonic()
    try:
        held = lock(sys.stderr)
        previous = read_stamp()
        wanted = wanted_stamp(extra, previous)
        if wanted == previous and PYTHON.exists():
            return 0
        install(wanted, previous, sys.stderr)
        held.close()
    except Problem as problem:
        report(problem, sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake venv: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    print(f"{VENV.name} is ready ({progress.duration(time.monotonic() - started)})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

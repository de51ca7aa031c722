"""Makes .venv, the environment of every make target: ``python3 -m tools.venv [--extra dev]``.

Its advantages over ``python3 -m venv .venv && pip install -c constraints.txt -e .``: make can call it before every
target, because a stamp file identifies a finished environment in a fraction of a second; it runs again when setup.py,
pyproject.toml, constraints.txt or a C++ kernel was edited. While llama.cpp compiles, which takes minutes without output
from pip, it shows percent and time left. Common failures (Python too old or too new, no venv module, no compiler, disk
or memory full, no network) are reported in one sentence with the fix, and pip's complete output is in
.venv/install.log. The next run continues one that was interrupted or failed, simultaneous runs wait for each other,
and the CMAKE_ARGS that llama.cpp was built with (for example for CUDA) are kept.

Only the standard library is used, and only the syntax of Python 3.7: the system's Python runs this file and may be
too old for the project.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "stamp.json"
LOG = VENV / "install.log"
PYTHON = VENV / "bin" / "python"

SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
THIS_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"

# Only the library is needed; without these parts llama.cpp compiles in two thirds of the time.
UNUSED = (
    "LLAVA_BUILD",
    "LLAMA_BUILD_TOOLS",
    "LLAMA_BUILD_SERVER",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
)

NINJA_STEP = re.compile(r"\s*\[(\d+)/(\d+)\]\s")
PIP_STEP = re.compile(r"\s*(Collecting|Downloading|Building|Preparing|Installing)\s")

# Pattern in a failed command's output -> what to do. The first that matches is shown.
FIXES = {
    r"No space left on device": "the disk is full. Free about 2 GiB (4 GiB with --extra dev) and run it again.",
    r"Killed signal terminated program|[Oo]ut of memory": (
        "memory ran out while compiling. Set CMAKE_BUILD_PARALLEL_LEVEL=1 and run it again."
    ),
    r"CMAKE_C(XX)?_COMPILER not set|is not able to compile a simple test program": (
        "llama.cpp has to be compiled and there is no working C/C++ compiler. "
        "Run 'sudo apt install build-essential' and run it again."
    ),
    r"ninja: build stopped": (
        "llama.cpp does not compile. Use GCC 9 or newer, check CMAKE_ARGS if you set it, and run it again."
    ),
    r"ensurepip|No module named '?venv": (
        "this Python cannot make virtual environments. "
        f"Run 'sudo apt install python{THIS_PYTHON}-venv' and run it again."
    ),
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|CERTIFICATE_VERIFY_FAILED": (
        "the package index cannot be reached. Check network, proxy and 'pip config list' and run it again."
    ),
    r"No matching distribution found|ResolutionImpossible": (
        "the package index lacks a package that is needed. Check which index pip uses ('pip config list')."
    ),
}
ERROR_LINE = re.compile(r"error\b|fatal|Errno|Killed|not found", re.IGNORECASE)
# Lines in which pip only repeats that a build failed, without the cause.
PIP_SUMMARY = re.compile(
    r"subprocess-exited|did not run|[Ff]ail.*(wheel|build)|not build|originates from|'error'"
)


class Problem(Exception):
    """Why the installation stopped: lines of output that show the cause, then one line that names the fix."""


def explain(lines: list[str]) -> Problem:
    """The last lines of a failed command's output that contain an error, then one sentence with the fix."""
    output = "\n".join(lines)
    fixes = [fix for pattern, fix in FIXES.items() if re.search(pattern, output)]
    errors = [line for line in lines if ERROR_LINE.search(line) and not PIP_SUMMARY.search(line)]
    shown = [f"    {line.strip()[:200]}" for line in (errors or lines)[-6:]]
    if LOG.exists():
        shown.append(f"    (complete output: {LOG.relative_to(ROOT)})")
    return Problem(
        "\n".join([*shown, (fixes or ["the installation failed; the lines above contain the cause."])[0]])
    )


def fingerprint() -> str:
    """sha256 of the files that determine what is installed, and of the folder: a moved .venv has wrong paths."""
    digest = hashlib.sha256(str(ROOT).encode())
    kernels = sorted(path for path in (ROOT / "kernels/cpu").glob("*") if path.suffix in (".cpp", ".h"))
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "constraints.txt", *kernels):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict[str, str]:
    """The stamp of .venv: what it was made from. Empty values where there is no readable stamp."""
    empty = {"fingerprint": "", "python": "", "extra": "", "cmake_args": ""}
    try:
        return {**empty, **json.loads(STAMP.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return empty


def write_stamp(stamp: dict[str, str]) -> None:
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")


def install(wanted: dict[str, str], previous: dict[str, str]) -> None:
    """Make .venv where there is no usable one, install llama-cpp-python, then the rest. Raises Problem on failure."""
    print("[1/3] virtual environment .venv", file=sys.stderr, flush=True)
    python = venv_python()
    if not (python == THIS_PYTHON if "PYTHON" in os.environ else python in SUPPORTED):
        make_venv()
        python = THIS_PYTHON
    stamp = {**previous, "fingerprint": ""}  # not valid until everything is installed
    write_stamp(stamp)
    drop_half_installed()

    # pip's cache of built wheels ignores CMAKE_ARGS: with CMAKE_ARGS of the user, a wheel must neither be taken from
    # the cache nor stored in it.
    options = ["--no-cache-dir"] if wanted["cmake_args"] else []
    if wanted["cmake_args"] != previous["cmake_args"]:
        options += ["--force-reinstall", "--no-deps"]
    environ = pip_environment(wanted["cmake_args"])
    pip("[2/3] llama-cpp-python", ["-v", *options, "llama-cpp-python"], environ)
    write_stamp({**stamp, "cmake_args": wanted["cmake_args"]})

    name = "[3/3] all other packages" + (", with those for export and tests" if wanted["extra"] else "")
    pip(name, ["-e", f".[{wanted['extra']}]" if wanted["extra"] else "."], environ)
    write_stamp({**wanted, "python": python})


def venv_python() -> str:
    """The version of .venv's Python, as ``3.11``; empty where it does not run pip."""
    code = "import pip, sys; print(*sys.version_info[:2], sep='.')"
    try:
        return subprocess.run(
            [str(PYTHON), "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def make_venv() -> None:
    """Create or replace .venv with this Python. Raises Problem, also for a folder that is not an environment."""
    if THIS_PYTHON not in SUPPORTED:
        others = [f"python{version}" for version in reversed(SUPPORTED) if shutil.which(f"python{version}")]
        fix = (
            f"Run make with PYTHON={others[0]}" if others else "Install one and run make with PYTHON=its name"
        )
        raise Problem(f"Python {THIS_PYTHON} is not supported, {SUPPORTED[0]} to {SUPPORTED[-1]} are. {fix}.")
    if VENV.exists() and any(VENV.iterdir()) and not (VENV / "pyvenv.cfg").exists():
        raise Problem(".venv exists and is not a virtual environment. Move it away and run it again.")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if made.returncode != 0:
        raise explain(made.stdout.splitlines())


def drop_half_installed() -> None:
    """Remove the metadata of packages whose installation was killed, so that pip installs them again.

    pip writes RECORD last; without it a package counts as installed but may lack files.
    """
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def pip_environment(cmake_args: str) -> dict[str, str]:
    """The user's environment, with the options of llama.cpp's build, and constraints.txt applied to builds too.

    The path of constraints.txt is relative (pip runs in ROOT), because pip splits the variable at spaces.
    """
    environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    environ["PIP_CONSTRAINT"] = f"{environ.get('PIP_CONSTRAINT', '')} constraints.txt".strip()
    environ["PIP_BUILD_CONSTRAINT"] = environ[
        "PIP_CONSTRAINT"
    ]  # newer versions of pip use this one for builds
    unused = [f"-D{option}=OFF" for option in UNUSED]
    environ["CMAKE_ARGS"] = " ".join([*unused, cmake_args])  # the user's come last and take precedence
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # a compiler takes up to 1 GiB
    environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(max(1, min(os.cpu_count() or 1, memory // 2**30))))
    return environ


def pip(name: str, arguments: list[str], environ: dict[str, str]) -> None:
    """Run ``pip install`` with its output in LOG and its progress on stderr; raises Problem if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    progress = Progress(name, sys.stderr)
    kept: collections.deque[str] = collections.deque(maxlen=2000)
    # The process gets its own session, so that stop() can signal the compilers too.
    process = subprocess.Popen(
        command, cwd=str(ROOT), env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        with open(LOG, "a", encoding="utf-8", buffering=1) as log:
            print(f"\n$ pip {' '.join(command[3:])}", file=log)
            for line in process.stdout:
                log.write(line)
                kept.append(line.rstrip())
                progress.read(line)
        failed = process.wait() != 0
    finally:
        stop(process)
        progress.end()
    if failed:
        raise explain(list(kept))


def stop(process: subprocess.Popen[str]) -> None:
    """Interrupt a command that still runs, with all its children; kill what is left after 20 s."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Progress:
    """One line for a pip run: ``name: 45 %, 2 min 10 s left``. Redrawn on a terminal; elsewhere one line per 10 %."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name, self.stream, self.is_terminal = name, stream, stream.isatty()
        self.begun: tuple[float, int] | None = None  # time in seconds and number of the first build step
        self.tenths = 0
        self.write("")

    def read(self, line: str) -> None:
        """Update the progress from one line of pip's output."""
        step = NINJA_STEP.match(line)
        if step:
            done, total = int(step.group(1)), int(step.group(2))
            self.begun = self.begun or (time.monotonic(), done)
            if self.is_terminal or 10 * done // total > self.tenths:
                self.tenths = 10 * done // total
                self.write(f": {100 * done // total} %{self.time_left(done, total)}")
        elif self.is_terminal and not self.begun and PIP_STEP.match(line):
            self.write(f": {line.strip()}")

    def time_left(self, done: int, total: int) -> str:
        """``, 2 min 10 s left`` from the speed so far; empty at the first and at the last step."""
        assert self.begun is not None
        started, first = self.begun
        if not first < done < total:
            return ""
        return f", {duration((time.monotonic() - started) * (total - done) / (done - first))} left"

    def write(self, state: str) -> None:
        line = self.name + state
        if self.is_terminal:
            line = f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.is_terminal else "\n", file=self.stream, flush=True)

    def end(self) -> None:
        """On a terminal, end the line with the name only."""
        if self.is_terminal:
            self.write("\n")


def duration(seconds: float) -> str:
    """``8 s`` or ``2 min 05 s``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def lock(file: TextIO) -> None:
    """Wait until no other run holds the lock on this open file; it is released when the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("waiting: another make is installing into .venv", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Exit status: 0 if .venv is ready, 2 if something has to be fixed first, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.venv", description="Make or complete .venv.")
    parser.add_argument(
        "--extra", choices=["dev"], default="", help="also install the packages for tests and export"
    )
    extra = parser.parse_args().extra
    signal.signal(signal.SIGTERM, interrupt)
    started = time.monotonic()
    try:
        with open(__file__, encoding="utf-8") as file:
            lock(file)
            previous = read_stamp()
            wanted = {
                "fingerprint": fingerprint(),
                # make exports PYTHON only where the user set it; otherwise the version in .venv is accepted.
                "python": THIS_PYTHON if "PYTHON" in os.environ else previous["python"],
                "extra": extra or previous["extra"],
                "cmake_args": os.environ.get("CMAKE_ARGS", previous["cmake_args"]),
            }
            if wanted == previous and PYTHON.exists():
                return 0
            install(wanted, previous)
    except (Problem, OSError) as error:
        lines = str(error if isinstance(error, Problem) else explain([str(error)])).splitlines()
        print("\n".join([*lines[:-1], f"make venv: {lines[-1]}"]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake venv: interrupted. Run it again to continue.", file=sys.stderr)
        return 130
    print(f".venv is ready ({duration(time.monotonic() - started)})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

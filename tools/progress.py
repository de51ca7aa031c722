"""What a long command says, as one line with percent and time left; why it failed, as one sentence.

Standard library only, and Python 3.7's grammar: the system's Python runs it before anything is installed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator, TextIO  # noqa: UP035  (the grammar of Python 3.7)

KEPT_LINES = 2000  # of a failing command's output, to look for the reason in
TICK_SECONDS = 0.5  # how often the time left is drawn anew while nothing is said
GRACE_SECONDS = 20  # for an interrupted command to end by itself


# -- reading what pip, ninja and make say ----------------------------------------------------------

NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]\s")
MAKE_PERCENT = re.compile(r"^\s*\[\s*(\d+)%\]\s")
PIP_ACTION = re.compile(r"^\s*(Downloading|Building wheel for|Installing build dependencies)\b\s*(.*)")


def build_fraction(line: str) -> float | None:
    """How far a build is, 0 to 1, from ninja's ``[12/345]`` or CMake's Makefiles' ``[ 12%]``; else None."""
    step = NINJA_STEP.match(line)
    if step and int(step.group(2)) > 0:
        return min(1.0, int(step.group(1)) / int(step.group(2)))
    percent = MAKE_PERCENT.match(line)
    return min(1.0, int(percent.group(1)) / 100) if percent else None


def pip_action(line: str) -> str | None:
    """What pip is busy with, short, from one line of its output; None if the line says nothing of use."""
    if re.match(r"\s*Installing collected packages", line):
        return "unpacking"
    action = PIP_ACTION.match(line)
    if not action:
        return None
    verb, what = action.group(1), action.group(2)
    if verb != "Downloading":
        return "preparing a build"
    size = re.search(r"\([\d.]+ ?[kMG]?B\)", what)
    name = re.split(r"-\d", what.split()[0].rsplit("/", 1)[-1])[0] if what else "a package"
    return f"downloading {name}" + (f" {size.group(0)}" if size else "")


# -- why it failed ---------------------------------------------------------------------------------

FIXES = (
    (r"No space left on device", "the disk is full: free some space and run again."),
    (
        r"Killed signal terminated program|virtual memory exhausted|[Oo]ut of memory|MemoryError",
        "memory ran out while compiling: run again with CMAKE_BUILD_PARALLEL_LEVEL=1.",
    ),
    (
        r"CMake \d[\d.]* or higher is required|No matching distribution found for (cmake|ninja)",
        "CMake is missing or too old: sudo apt-get install cmake, then run again.",
    ),
    (
        r"No CMAKE_C(XX)?_COMPILER could be found|COMPILER-NOTFOUND|is not able to compile a simple",
        "CMake found no working compiler: sudo apt-get install build-essential, then run again.",
    ),
    (
        r"(CUDA Toolkit not found|No CMAKE_CUDA_COMPILER|nvcc: (command )?not found)",
        "CMAKE_ARGS asks for CUDA, which is not found: install the CUDA toolkit or unset CMAKE_ARGS.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "the package index's certificate is not trusted: set PIP_CERT to your proxy's and run again.",
    ),
    (
        r"NewConnectionError|name resolution|Name or service not known|Connection refused|ProxyError"
        r"|Network is unreachable|Read timed out|ConnectTimeout|ConnectionResetError",
        "no connection to the package index: check network and proxy (pip config list) and run again.",
    ),
    (
        r"from versions: none",
        "the package index has no package for this Python and machine: pip config list.",
    ),
    (
        r"No matching distribution found|ResolutionImpossible|conflicting dependencies",
        "pip found no fitting versions: check the package index in use (pip config list) and run again.",
    ),
    (
        r"Permission denied|PermissionError",
        "a file may not be written: make the checkout your own (chown) and run again.",
    ),
    (
        r"ensurepip",
        "this Python cannot make virtual environments: sudo apt-get install python3-venv, then run again.",
    ),
)
TELLING = re.compile(
    r"\berror:|^ERROR|\bfatal\b|CMake Error|FAILED:|undefined reference|No space left|Killed|Errno|\*\*\*",
    re.M,
)
# pip's closing lines say again that something failed, not why.
EMPTY_WORDS = re.compile(
    r"subprocess-exited-with-error|did not run successfully|Failed building wheel|Failed to build"
    r"|Could not build wheels|failed-wheel-build|metadata-generation-failed|exit code:|╰─>"
)


def explain(lines: list[str]) -> str:
    """One sentence that names the fix, from a failed command's output."""
    text = "\n".join(lines)
    for pattern, sentence in FIXES:
        if re.search(pattern, text):
            return sentence
    if any(build_fraction(line) is not None for line in lines):
        return (
            "llama.cpp does not compile with this compiler and these CMAKE_ARGS: use GCC 9 or newer, "
            "unset CMAKE_ARGS, and run again."
        )
    return "pip failed: the lines above say why; run again when that is settled."


def excerpt(lines: list[str], most: int = 6) -> tuple[str, ...]:
    """The last lines that tell what went wrong, or the very last ones if none does."""
    spoken = [line.strip() for line in lines if line.strip() and not EMPTY_WORDS.search(line)]
    telling = [line for line in spoken if TELLING.search(line)]
    return tuple(line[:200] for line in (telling or spoken)[-most:])


# -- drawing ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8 s``, ``2 min 05 s``."""
    whole = int(seconds + 0.5)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class TimeLeft:
    """Seconds left of a build, from its pace so far; counts down between two steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: tuple[float, float] | None = None
        self.last = 0.0
        self.end: float | None = None

    def step(self, fraction: float) -> None:
        now = self.clock()
        if self.first is None or fraction < self.last:  # a second build within the first starts anew
            self.first, self.end = (now, fraction), None
        self.last = fraction
        begun, done_before = self.first
        if fraction > done_before and now > begun:
            self.end = now + (now - begun) * (1 - fraction) / (fraction - done_before)

    def seconds(self) -> float | None:
        return None if self.end is None else max(1.0, self.end - self.clock())


class Display:
    """One line a stage, ``[3/4] …  45 %, 2 min 10 s left``: redrawn on a terminal, every tenth in a log."""

    def __init__(self, stream: TextIO, num_stages: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.num_stages, self.clock = stream, num_stages, clock
        self.is_terminal = stream.isatty()
        self.number = 0

    def stage(self, name: str) -> None:
        """Begin the next stage."""
        self.number, self.name, self.begun = self.number + 1, name, self.clock()
        self.fraction: float | None = None
        self.action, self.tenths = "", 0
        self.left = TimeLeft(self.clock)
        self.write("")

    def hear(self, line: str) -> None:
        """Take in one line of the command's output."""
        fraction = build_fraction(line)
        if fraction is not None:
            self.fraction = fraction
            self.left.step(fraction)
        elif self.fraction is None:
            self.action = pip_action(line) or self.action
        if self.is_terminal:
            self.tick()
        elif fraction is not None and int(fraction * 10) > self.tenths:
            self.tenths = int(fraction * 10)
            self.write(self.state())

    def tick(self) -> None:
        """Draw the line anew, so that the time runs."""
        if self.is_terminal:
            self.write(self.state())

    def done(self, word: str) -> None:
        """End the stage."""
        elapsed = self.clock() - self.begun
        self.write(word + (f" ({duration(elapsed)})" if elapsed >= 1 else ""), ends=True)

    def state(self) -> str:
        if self.fraction is None:
            return f"{self.action} {duration(self.clock() - self.begun)}".strip()
        seconds = self.left.seconds()
        left = f", {duration(seconds)} left" if seconds is not None and self.fraction < 1 else ""
        return f"{self.fraction:4.0%}{left}".strip()

    def write(self, text: str, ends: bool = False) -> None:
        line = f"[{self.number}/{self.num_stages}] {self.name}" + (f": {text}" if text else "")
        if self.is_terminal:
            line = line if ends else line[: terminal_columns(self.stream) - 1]
            self.stream.write(f"\r\033[2K{line}" + ("\n" if ends else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def terminal_columns(stream: TextIO) -> int:
    """Width of the terminal behind ``stream``; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


# -- running ---------------------------------------------------------------------------------------


def watch(
    command: list[str], display: Display, log: TextIO, cwd: Path, env: dict[str, str]
) -> tuple[int, list[str]]:
    """Run a command to its end; its lines go to the log and the display.

    Returns its exit status and its last lines. If this process is interrupted, the command and all its
    children are ended first, so that nothing goes on writing behind the next run's back.
    """
    kept: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    with started(command, cwd, env) as process:
        assert process.stdout is not None
        for line in read_lines(process.stdout.fileno(), display.tick):
            kept.append(line)
            log.write(line + "\n")
            log.flush()
            display.hear(line)
        return process.wait(), list(kept)


def capture(command: list[str]) -> tuple[int, str]:
    """Run a short command; returns its exit status and what it said."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


@contextlib.contextmanager
def started(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The running command, in a process group of its own that does not outlive this block.

    Both handlers matter to the command too: a signal that is ignored, as in a background job, would be
    ignored by every child, and only killing them would help.
    """
    before = {number: signal.signal(number, raise_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(
        command,
        cwd=str(cwd),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a whole process group, and kill what is left of it after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_lines(descriptor: int, tick: Callable[[], None]) -> Iterator[str]:
    """Lines from a pipe until it closes; ``tick`` is called while it is silent."""
    rest = b""
    while True:
        if not select.select([descriptor], [], [], TICK_SECONDS)[0]:
            tick()
            continue
        chunk = os.read(descriptor, 65536)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace").rstrip("\r") for line in lines)
    if rest:
        yield rest.decode("utf-8", "replace")

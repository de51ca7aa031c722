"""This machine's processors and memory, and the findings of a report."""

from __future__ import annotations

import os
from dataclasses import dataclass

MAX_DEFAULT_THREADS = 8


def default_threads() -> int:
    """CPUs that this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_DEFAULT_THREADS)


@dataclass(frozen=True)
class Finding:
    """One line of a report; ``fix`` is how to install what is missing, "" when nothing is missing."""

    name: str
    found: str
    fix: str = ""
    needed: bool = True


def memory_gib() -> float:
    """The machine's memory in GiB; NaN where it cannot be determined."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return float("nan")  # not a POSIX system

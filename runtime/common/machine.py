"""What is known of this machine, and how a report says it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of a report; ``fix`` says how to get what is missing, and "" that nothing is."""

    name: str
    found: str
    fix: str = ""
    needed: bool = True


def memory_gib() -> float:
    """The machine's memory in GiB; NaN where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return float("nan")  # not a POSIX system

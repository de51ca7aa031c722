"""How much memory this process may still take."""

from __future__ import annotations

import re
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
GROUP_FILES = (  # limit and use of the control group that a container or service sees as its own
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_memory() -> float:
    """Bytes that programs can still get without swapping, no more than a control group allows; infinity where it
    cannot be told (not Linux)."""
    limits = [float("inf")]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY_INFO.read_text())
        limits += [1024 * float(found[1])] if found else []
    except OSError:
        pass
    for limit, used in GROUP_FILES:
        try:
            limits.append(float(limit.read_text()) - float(used.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)

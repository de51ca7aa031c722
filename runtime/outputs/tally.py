"""Running figures of a line: verdict counts, latencies, and detection counts where the true defects are known."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from ..cameras.base import Frame
from ..inspection.verdict import Status, Verdict

WINDOW = 10_000  # latencies kept for the percentiles, which bounds the memory


def outcome(frame: Frame, status: Status) -> str:
    """How a verdict compares with the true defects: caught, missed, false alarm, good, or "" where unknown."""
    if frame.defects is None or status == Status.NO_RESULT:
        return ""
    if frame.defects:
        return "caught" if status == Status.FAIL else "missed"
    return "false alarm" if status == Status.FAIL else "good"


@dataclass
class Tally:
    """Counts parts. ``latencies_ms``: milliseconds from a frame's arrival at the inspector to its verdict."""

    statuses: Counter[Status] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    num_defective: int = 0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    started: float = field(default_factory=time.monotonic)

    def add(self, frame: Frame, verdict: Verdict, latency_ms: float) -> None:
        """Count a part. The latency of a part that was not inspected is left out."""
        self.statuses[verdict.status] += 1
        self.outcomes[outcome(frame, verdict.status)] += 1
        self.num_defective += bool(frame.defects)
        if verdict.status != Status.NO_RESULT or verdict.anomaly_map is not None:
            self.latencies_ms.append(latency_ms)

    @property
    def num_parts(self) -> int:
        return self.statuses.total()

    @property
    def unjudged(self) -> bool:
        """Whether there were parts and none of them got a verdict."""
        return 0 < self.num_parts == self.statuses[Status.NO_RESULT]

    def percentile(self, share: float) -> float:
        """Latency in ms that ``share`` percent of the parts did not exceed; 0 before the first."""
        return float(np.percentile(self.latencies_ms, share)) if self.latencies_ms else 0.0

    @property
    def inspections_per_second(self) -> float:
        """Throughput of the inspector if a frame were always waiting; 0 before the first inspection."""
        return 1e3 * len(self.latencies_ms) / max(sum(self.latencies_ms), 1e-9)

    @property
    def parts_per_second(self) -> float:
        """Throughput of the whole line, which also waits for frames (the demo generates them) and writes results."""
        return self.num_parts / max(time.monotonic() - self.started, 1e-9)

    def counts(self, total: int | None = None) -> str:
        """Number of parts and of each status, and the expected number where ``total`` gives it."""
        of = f" of {total}" if total else ""
        return (
            f"{self.num_parts}{of} parts: {self.statuses[Status.PASS]} PASS, {self.statuses[Status.FAIL]} FAIL, "
            f"{self.statuses[Status.NO_RESULT]} NO_RESULT"
        )

    def latency(self) -> str:
        """Percentiles of the inspected parts; empty before the first."""
        if not self.latencies_ms:
            return ""
        return f"p50 {self.percentile(50):.1f} ms, p99 {self.percentile(99):.1f} ms"

    def pace(self) -> str:
        """Throughput of the inspector (once a part was inspected) and of the whole line."""
        inspections = f"{self.inspections_per_second:.1f} inspections/s, " if self.latencies_ms else ""
        return f"{inspections}whole line {self.parts_per_second:.1f} parts/s"

    def catches(self) -> str:
        """Detection counts in one line; empty where the true defects are unknown."""
        num_good = self.outcomes["good"] + self.outcomes["false alarm"]
        if not self.num_defective and not num_good:
            return ""
        return (
            f"{self.outcomes['caught']} of {self.num_defective} defective parts caught, "
            f"{self.outcomes['false alarm']} false alarms on {num_good} good parts"
        )

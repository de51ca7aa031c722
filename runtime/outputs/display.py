"""The display for the operator: a live table on a terminal, otherwise one plain line per part."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..cameras.base import Frame
from ..common.printable import printable
from ..common.terminal import tell
from ..inspection.verdict import Status, Verdict
from .overlay import headline, unseen_text
from .tally import Tally, outcome

REFRESH_SECONDS = 0.1
MAX_ROWS = 18
CHROME_ROWS = 8  # lines of the table's title, header, rules and caption of up to three lines
MAP_COLUMNS = 120  # a narrower terminal has no column for the map score
MAP_LEGEND = "map 1 = good parts, red over the limit"
SENTENCE_LINES = ((140, 1), (100, 2), (0, 3))  # from this terminal width on, a sentence takes this many lines
STATUS_STYLES = {Status.PASS: "bold green", Status.FAIL: "bold red", Status.NO_RESULT: "bold yellow"}
OUTCOME_STYLES = {"caught": "green", "good": "dim", "missed": "bold red", "false alarm": "bold yellow"}


class Display(Protocol):
    """Shows the verdicts of a line."""

    def put(self, frame: Frame, verdict: Verdict, latency_ms: float, tally: Tally) -> None: ...

    def progress(self, part_id: str, stage: str, done: int, total: int) -> None:
        """Show how many views of the part that is being inspected have passed a stage, on a terminal."""
        ...

    def say(self, sentence: str) -> None:
        """Show what the operator must know and no part's line tells."""
        ...

    def close(self) -> None: ...


def open_display(title: str, console: Console | None = None, total: int | None = None) -> Display:
    """The live table when standard output is a terminal, else plain lines.

    Args:
        total: how many parts will come, where that is known.
    """
    console = console or Console()
    return LiveTable(title, console, total) if console.is_terminal else PlainLines(title, console, total)


def probability(verdict: Verdict) -> str:
    """p(anomaly) with three digits; a dash if there is none."""
    p = verdict.p_anomaly
    return "–" if p is None or p != p else f"{p:.3f}"


def map_text(verdict: Verdict) -> str:
    """The map score with the limit that it is compared with, or as raw; a dash if there is none."""
    score, limit = verdict.score, verdict.limit
    if score is None or score != score:
        return "–"
    return f"{score:.3f} raw" if limit is None else f"{score:.2f}/{limit:.2f}"


def map_style(verdict: Verdict) -> str:
    """The style of the map score: as an alarm over the limit, dim if raw."""
    if verdict.score is None or verdict.limit is None:
        return "dim"
    return "bold red" if verdict.score > verdict.limit else ""


class LiveTable:
    """A table of the last parts, redrawn at most ten times a second; it stays on the screen when the line ends."""

    def __init__(self, title: str, console: Console, total: int | None = None) -> None:
        self._title = title
        self._total = total
        self._console = console
        self._rows: deque[tuple[Frame, Verdict, float]] = deque(maxlen=MAX_ROWS)
        self._tally = Tally()
        self._progress = ""
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()

    def put(self, frame: Frame, verdict: Verdict, latency_ms: float, tally: Tally) -> None:
        self._rows.append((frame, verdict, latency_ms))
        self._tally = tally
        self._progress = ""
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def progress(self, part_id: str, stage: str, done: int, total: int) -> None:
        self._progress = f"part {printable(part_id)}: {stage} {done} of {total} views"
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def say(self, sentence: str) -> None:
        self._live.console.print(Text(f"agpt: {printable(sentence)}", "bold yellow"))

    def close(self) -> None:
        if self._rows:
            self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        rows = list(self._rows)[-self._num_rows() :]
        knows_product = any(row[0].product for row in rows)
        knows_truth = any(row[0].defects is not None for row in rows)
        shows_map = self._console.width >= MAP_COLUMNS
        table = Table(
            title=self._title, title_style="bold", caption=self._caption(), box=box.SIMPLE_HEAD, expand=True
        )
        table.add_column("part", no_wrap=True, overflow="ellipsis", max_width=24)
        if knows_product:
            table.add_column("product", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
        if shows_map:
            table.add_column("map/limit", justify="right", no_wrap=True)
        table.add_column("sentence", ratio=1)
        table.add_column("ms", justify="right", no_wrap=True)
        if knows_truth:
            table.add_column("truth", no_wrap=True)
        for frame, verdict, latency_ms in rows:
            truth = outcome(frame, verdict.status)
            table.add_row(
                Text(printable(frame.part_id)),
                *([Text(frame.product)] if knows_product else []),
                Text(verdict.status.value, STATUS_STYLES[verdict.status]),
                probability(verdict),
                *([Text(map_text(verdict), map_style(verdict))] if shows_map else []),
                Text(headline(verdict)),
                f"{latency_ms:.1f}",
                *([Text(truth, OUTCOME_STYLES.get(truth, ""))] if knows_truth else []),
            )
        return table

    def _num_rows(self) -> int:
        """Number of parts that fit on the terminal."""
        lines = next(lines for columns, lines in SENTENCE_LINES if self._console.width >= columns)
        return max(1, min(MAX_ROWS, (self._console.height - CHROME_ROWS) // lines))

    def _caption(self) -> str:
        if not self._rows:
            return self._progress
        verdict = self._rows[-1][1]
        remarks = (
            self._progress,
            self._tally.counts(self._total),
            self._tally.catches(),
            self._tally.latency(),
            MAP_LEGEND if verdict.limit is not None and self._console.width >= MAP_COLUMNS else "",
            unseen_text(verdict.unseen) if verdict.unseen else "",
        )
        return " · ".join(filter(None, remarks))


class PlainLines:
    """One line per part, never cut, for pipes and logs."""

    def __init__(self, title: str, console: Console, total: int | None = None) -> None:
        self._console = console
        self._total = total
        self._unseen = 0.0
        self._print(title)

    def put(self, frame: Frame, verdict: Verdict, latency_ms: float, tally: Tally) -> None:
        if verdict.unseen and verdict.unseen != self._unseen:  # said once
            self.say(unseen_text(verdict.unseen))
            self._unseen = verdict.unseen
        fields = [
            f"{tally.num_parts:>5}" + (f" of {self._total}" if self._total else ""),
            f"{printable(frame.part_id):<12}",
            f"{frame.product:<12}" if frame.product else "",
            f"{verdict.status.value:<9}",
            f"p={probability(verdict):<5}",
            f"map={map_text(verdict):<9}",
            f"{latency_ms:6.1f} ms",
            f"(p50 {tally.percentile(50):.1f}, p99 {tally.percentile(99):.1f})",
            headline(verdict),
            f"[{truth}]" if (truth := outcome(frame, verdict.status)) else "",
        ]
        self._print("  ".join(filter(None, fields)))

    def progress(self, part_id: str, stage: str, done: int, total: int) -> None:
        pass

    def say(self, sentence: str) -> None:
        tell(sentence)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()

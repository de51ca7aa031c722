"""Progress of an export: one line per stage, with the remaining time of long stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHARES = 100  # total of a step whose progress is reported as a share

OnProgress = Callable[[float], None]  # called with the share of the work that is done, 0 to 1
Item = TypeVar("Item")


class Steps:
    """Progress display with one line per stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    @contextmanager
    def step(self, description: str, total: int = 1) -> Iterator[Step]:
        task = self._progress.add_task(description, total=total)
        yield Step(self._progress, task)
        self._progress.update(task, completed=total)

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()


@dataclass(frozen=True)
class Step:
    progress: Progress
    task: TaskID

    def advance(self, _what: str = "") -> None:
        self.progress.advance(self.task)

    def add(self, amount: int) -> None:
        self.progress.advance(self.task, amount)

    def set_share(self, share: float) -> None:
        """Set the progress of a step whose total is ``SHARES`` to a share, 0 to 1."""
        self.set_completed(round(SHARES * share))

    def set_completed(self, amount: int) -> None:
        self.progress.update(self.task, completed=amount)


def ignore_progress(share: float) -> None:
    """Ignore progress."""


def with_progress(items: Iterable[Item], count: int, on_progress: OnProgress) -> Iterator[Item]:
    """Iterate over ``count`` items; an item counts as done when the next one is requested."""
    for index, item in enumerate(items):
        on_progress(index / count)
        yield item

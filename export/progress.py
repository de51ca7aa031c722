"""Progress of an export: one line a stage, with the time left inside the long ones."""

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

SHARES = 100  # total of a step whose progress is told as a share

Reach = Callable[[float], None]  # told which share of the work is done, 0 to 1
Item = TypeVar("Item")


class Steps:
    """Progress, one line a stage, with the time left inside the long ones."""

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

    def reach_share(self, share: float) -> None:
        """Of a step with a total of ``SHARES``; 0 to 1."""
        self.reach(round(SHARES * share))

    def reach(self, amount: int) -> None:
        self.progress.update(self.task, completed=amount)


def nowhere(share: float) -> None:
    """Nobody watches."""


def watched(items: Iterable[Item], count: int, reach: Reach) -> Iterator[Item]:
    """The items; each is done when the next one is asked for."""
    for index, item in enumerate(items):
        reach(index / count)
        yield item

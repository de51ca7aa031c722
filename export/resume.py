"""What an interrupted export has finished, so that the next run goes on from there.

A stage is finished when its files lie whole on the disk and the journal, which lies beside the staging folder, says
so with their digests; whatever else is in the folder is half written and goes. A journal of other checkpoints,
options or program versions is worth nothing, and neither are its files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ..runtime.bundles.bundle import FileRecord, digest_file

Note = TypeVar("Note")


class Stage(msgspec.Struct, frozen=True):
    """A finished stage: its files, and what later stages want to know of it."""

    files: dict[str, FileRecord]
    note: object


class Pages(msgspec.Struct, frozen=True):
    """The journal's content."""

    fingerprint: dict[str, object]  # everything that the files depend on
    stages: dict[str, Stage]


class Journal:
    """The finished stages of the export in one staging folder."""

    def __init__(self, folder: Path, fingerprint: dict[str, object]) -> None:
        """Go on with what ``folder`` holds of the same export; everything else in it is removed."""
        self.folder = folder
        self.path = folder.with_name(f"{folder.name}.json")
        self.stages: dict[str, Stage] = {}
        self._fingerprint = msgspec.json.decode(msgspec.json.encode(fingerprint))
        folder.mkdir(parents=True, exist_ok=True)
        pages = self._read()
        if pages is not None and pages.fingerprint == self._fingerprint:
            self.stages = {name: stage for name, stage in pages.stages.items() if is_whole(folder, stage)}
        self._clear()

    def run(self, name: str, make: Callable[[], Note], kind: type[Note]) -> Note:
        """A stage's result: from the journal, or made now.

        Args:
            name: the stage.
            make: writes new files into the folder and returns what later stages want to know.
            kind: the result's type, for reading it back.
        """
        if name in self.stages:
            return msgspec.convert(self.stages[name].note, kind)
        before = set(self.folder.iterdir())
        note = make()
        files = sorted(set(self.folder.iterdir()) - before)
        for file in files:
            flush(file)
        records = {file.name: digest_file(file) for file in files}
        self._write({**self.stages, name: Stage(records, msgspec.to_builtins(note))})
        return note

    def discard(self) -> None:
        """Forget the export and remove its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)
        self._new_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep finished stages for the next run and drop what is half written; without any, leave nothing behind."""
        if not self.stages or not self.folder.exists():
            self.discard()
        else:
            self._clear()

    def _read(self) -> Pages | None:
        """None without a journal, and for one that was cut off: then nothing is known to be finished."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Pages)
        except (OSError, ValueError, RecursionError):
            return None

    def _write(self, stages: dict[str, Stage]) -> None:
        self._new_path.write_bytes(msgspec.json.encode(Pages(self._fingerprint, stages)))
        flush(self._new_path)
        self._new_path.replace(self.path)
        self.stages = stages

    @property
    def _new_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _clear(self) -> None:
        """Remove everything that no finished stage has written."""
        self._new_path.unlink(missing_ok=True)
        known = {name for stage in self.stages.values() for name in stage.files}
        for entry in self.folder.iterdir():
            if entry.name in known:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def is_whole(folder: Path, stage: Stage) -> bool:
    """Whether every file of a stage is there, a regular file with its digest."""
    return all(
        Path(name).name == name
        and (folder / name).is_file()
        and not (folder / name).is_symlink()
        and digest_file(folder / name) == record
        for name, record in stage.files.items()
    )


def flush(path: Path) -> None:
    """fsync a file, so that the journal never knows more than the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

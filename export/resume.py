"""The finished stages of an interrupted export, so that the next run continues after them.

A JSON file beside the staging folder lists the finished stages with the digests of their files. All other files in the
folder are incomplete and are deleted. A list of other checkpoints, options or program versions is ignored and its files
are deleted too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ..runtime.bundles.bundle import FileRecord, digest_file
from ..runtime.common.files import flush

Note = TypeVar("Note")


class Stage(msgspec.Struct, frozen=True):
    """A finished stage: its files, and the result that later stages need."""

    files: dict[str, FileRecord]
    note: object


class Record(msgspec.Struct, frozen=True):
    """Content of the JSON file."""

    fingerprint: dict[str, object]  # everything that the files depend on
    stages: dict[str, Stage]


class FinishedStages:
    """The finished stages of the export in one staging folder."""

    def __init__(self, folder: Path, fingerprint: dict[str, object]) -> None:
        """Read the finished stages of the same export, and delete everything else in ``folder``.

        Args:
            folder: the staging folder; created if missing.
            fingerprint: everything that the files depend on, JSON-serialisable.
        """
        self.folder = folder
        self.path = folder.with_name(f"{folder.name}.json")
        self.stages: dict[str, Stage] = {}
        self._fingerprint = msgspec.json.decode(msgspec.json.encode(fingerprint))
        folder.mkdir(parents=True, exist_ok=True)
        record = self._read()
        if record is not None and record.fingerprint == self._fingerprint:
            self.stages = {name: stage for name, stage in record.stages.items() if is_whole(folder, stage)}
        self._clear()

    def run(self, name: str, make: Callable[[], Note], kind: type[Note]) -> Note:
        """The result of a stage: of the earlier run if it finished there, else of ``make``.

        Args:
            name: of the stage.
            make: writes new files into the folder and returns the result that later stages need.
            kind: the result's type, for decoding it.
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
        """Delete the staging folder and the list of finished stages."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.path.unlink(missing_ok=True)
        self._new_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete incomplete files and keep finished stages for the next run; without any, delete everything."""
        if not self.stages or not self.folder.exists():
            self.discard()
        else:
            self._clear()

    def _read(self) -> Record | None:
        """The JSON file's content; None if the file is missing or damaged."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Record)
        except (OSError, ValueError, RecursionError):
            return None

    def _write(self, stages: dict[str, Stage]) -> None:
        self._new_path.write_bytes(msgspec.json.encode(Record(self._fingerprint, stages)))
        flush(self._new_path)
        self._new_path.replace(self.path)
        self.stages = stages

    @property
    def _new_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _clear(self) -> None:
        """Delete everything that is not a file of a finished stage."""
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
    """Whether every file of a stage is a regular file with the recorded digest."""
    return all(
        Path(name).name == name
        and (folder / name).is_file()
        and not (folder / name).is_symlink()
        and digest_file(folder / name) == record
        for name, record in stage.files.items()
    )

"""Where an export works: a hidden folder beside the target, of one process at a time, on a disk that holds it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..runtime.common.errors import AgptError, ConfigError
from .checkpoints import Checkpoints
from .options import ExportOptions
from .resume import Journal
from .survey import needs_of

GB = 1e9
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "gguf", "llama-cpp-python", "numpy")
# torch and onnxruntime have no type of their own for it
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "Failed to allocate memory", "bad_alloc")


def check_memory(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """Refuse before the long work what would not fit.

    Raises:
        ConfigError: the export takes more memory than ``--max-memory`` allows.
    """
    needed = needs_of(checkpoints.config).memory
    if options.max_memory is not None and needed > options.max_memory:
        raise ConfigError(
            f"exporting these checkpoints takes about {needed / GB:.1f} GB of memory and --max-memory allows "
            f"{options.max_memory / GB:.1f} GB: allow more, or export on another machine and copy the bundle"
        )


def check_disk(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """The same for the disk; what an interrupted run has left is counted as there.

    Raises:
        ConfigError: the files of this export would not fit beside the target.
    """
    folder = staging_folder(options)
    needed = needs_of(checkpoints.config).disk(options.llm_quant, options.precision)
    there = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    disk = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free + there:
        raise ConfigError(
            f"exporting these checkpoints takes about {(needed - there) / GB:.1f} GB of disk and {disk} has "
            f"{free / GB:.1f} GB free: free some, or give --out on a larger disk"
        )


def staging_folder(options: ExportOptions) -> Path:
    out = options.out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second export out of a staging folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another export has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another export is writing {folder}: wait for it to end, or choose another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(options: ExportOptions, **inputs: object) -> Iterator[Journal]:
    """A hidden folder beside the target, so that publishing is a rename, with the journal of what is finished.

    It outlives an interruption and a full disk, and the same command goes on from it. A result that is wrong is
    removed.

    Raises:
        ConfigError: nothing can be written there, or the disk or the memory is full.
        KeyboardInterrupt: with the words for the user.
    """
    folder = staging_folder(options)
    chosen = {
        "precision": options.precision,
        "llm_quant": options.llm_quant,
        "engines": options.engines,
        "plans": msgspec.to_builtins(options.plans),
    }
    try:
        with alone(folder):
            journal = Journal(folder, {**inputs, **chosen, "tools": tool_versions()})
            try:
                yield journal
            except AgptError:
                journal.discard()
                raise
            except KeyboardInterrupt as stop:
                if not journal.stages:
                    raise
                words = "interrupted: the same command goes on from the last finished stage"
                raise KeyboardInterrupt(words) from stop
            finally:
                journal.close()
    except OSError as error:
        why = error.strerror or f"a file was not written whole: {error}"  # NumPy's has no number
        raise ConfigError(
            f"could not write the bundle at {options.out} ({why}): free space and run the same command again, "
            "which goes on from the last finished stage, or choose another --out"
        ) from error
    except Exception as error:
        if isinstance(error, AgptError) or not ran_out_of_memory(error):
            raise
        raise ConfigError(
            f"memory ran out ({str(error).splitlines()[0] or 'no more to be had'}): close other programs, or export "
            "on a machine with more, with the same command, which goes on from the last finished stage"
        ) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch or onnxruntime could not get the memory it asked for."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_WORDS)


def tool_versions() -> dict[str, str]:
    """What the bundle was made with."""
    return {name: importlib.metadata.version(name) for name in TOOLS}

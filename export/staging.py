"""The working folder of an export: hidden, beside the target, locked by one process, on a disk with enough space."""

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
from .checkpoint_report import needs_of
from .checkpoints import Checkpoints
from .options import ExportOptions
from .resume import FinishedStages

GB = 1e9
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "gguf", "llama-cpp-python", "numpy")
# torch and onnxruntime have no exception type for it
OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "Failed to allocate memory",
    "bad_alloc",
)


def check_memory(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """Check the memory before the long work.

    Raises:
        ConfigError: the export takes more memory than ``--max-memory`` allows.
    """
    needed = needs_of(checkpoints.config).memory
    if options.max_memory is not None and needed > options.max_memory:
        raise ConfigError(
            f"exporting these checkpoints takes about {needed / GB:.1f} GB of memory, but --max-memory allows "
            f"{options.max_memory / GB:.1f} GB: allow more, or export on another machine and copy the bundle"
        )


def check_disk(options: ExportOptions, checkpoints: Checkpoints) -> None:
    """Check the disk space before the long work; files of an interrupted run need no further space.

    Raises:
        ConfigError: the files of this export would not fit beside the target.
    """
    folder = staging_folder(options)
    needed = needs_of(checkpoints.config).disk(options.llm_quant, options.precision)
    present = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    disk = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free + present:
        raise ConfigError(
            f"exporting these checkpoints takes about {(needed - present) / GB:.1f} GB of disk, but {disk} has "
            f"{free / GB:.1f} GB free: free some space, or give --out on a larger disk"
        )


def staging_folder(options: ExportOptions) -> Path:
    out = options.out.absolute()
    return out.with_name(f".{out.name}.partial")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a staging folder against other exports; the lock ends with the process, even if it is killed.

    Raises:
        ConfigError: another export uses the folder.
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
def staging(options: ExportOptions, **inputs: object) -> Iterator[FinishedStages]:
    """A hidden folder beside the target, so that publishing is a rename, with the export's finished stages.

    After an interruption, a full disk or exhausted memory the folder is kept, and the same command continues from it.
    After an error in the checkpoints, the options or the result it is deleted.

    Args:
        options: target and settings.
        inputs: everything else that the files depend on, JSON-serialisable.

    Raises:
        ConfigError: the folder cannot be written, or the disk or the memory is full.
        KeyboardInterrupt: interrupted; with the message for the user.
    """
    folder = staging_folder(options)
    chosen = {
        "precision": options.precision,
        "llm_quant": options.llm_quant,
        "engines": options.engines,
        "plans": msgspec.to_builtins(options.plans),
    }
    try:
        with exclusive(folder):
            finished = FinishedStages(folder, {**inputs, **chosen, "tools": tool_versions()})
            try:
                yield finished
            except AgptError:
                finished.discard()
                raise
            except KeyboardInterrupt as stop:
                if not finished.stages:
                    raise
                message = "interrupted: run the same command again to continue after the last finished stage"
                raise KeyboardInterrupt(message) from stop
            finally:
                finished.close()
    except OSError as error:
        why = error.strerror or f"a file was not written completely: {error}"  # NumPy's errors have no errno
        raise ConfigError(
            f"could not write the bundle at {options.out} ({why}): free space and run the same command again, "
            "which continues after the last finished stage, or choose another --out"
        ) from error
    except Exception as error:
        if isinstance(error, AgptError) or not ran_out_of_memory(error):
            raise
        raise ConfigError(
            f"memory ran out ({str(error).splitlines()[0] or 'allocation failed'}): close other programs and run the "
            "same command again, which continues after the last finished stage, or export on a machine with more memory"
        ) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch or onnxruntime could not get the memory it asked for."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that the bundle is exported with."""
    return {name: importlib.metadata.version(name) for name in TOOLS}

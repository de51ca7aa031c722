"""Selects the implementation: the fastest that runs on this machine, or the one that ``AGPT_KERNELS`` names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from . import reference
from .implementation import Implementation

VARIABLE = "AGPT_KERNELS"  # environment variable; its value is a name from available()


@lru_cache(maxsize=1)
def _found() -> dict[str, Implementation]:
    """Implementations by name, the fastest first; warns once if the compiled ones are missing."""
    from . import cuda  # here and below: importing the package loads no implementation but NumPy's

    found: dict[str, Implementation] = {}
    try:
        from . import cpu
    except ImportError as error:
        warnings.warn(
            f"the compiled kernels are not installed ({error}); NumPy does their work, several times slower: "
            "install a C++ compiler (sudo apt-get install build-essential) and anomalygpt-edge again",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        found.update({each.name: each for each in cpu.levels()})
    found[reference.name] = reference
    if cuda.runs_here():  # last: every call copies to the device and back, so it is used only if it is named
        found[cuda.name] = cuda
    return found


def available() -> tuple[str, ...]:
    """Names of the implementations that run on this machine, the fastest first; "reference" is always among them."""
    return tuple(_found())


def active() -> str:
    """The name of the implementation in use."""
    return implementation().name


def implementation() -> Implementation:
    """The implementation in use."""
    return _forced if _forced is not None else _chosen()


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force one implementation inside a ``with`` block, for tests and benchmarks; not thread-safe.

    Raises:
        ValueError: the implementation does not run on this machine.
    """
    global _forced
    before = _forced
    _forced = _named(name)
    try:
        yield
    finally:
        _forced = before


_forced: Implementation | None = None


@lru_cache(maxsize=1)
def _chosen() -> Implementation:
    name = os.environ.get(VARIABLE, "").strip()
    if name:
        try:
            return _named(name)
        except ValueError as error:
            warnings.warn(f"{VARIABLE}: {error}; it is ignored", RuntimeWarning, stacklevel=4)
    return next(iter(_found().values()))


def _named(name: str) -> Implementation:
    found = _found()
    if name not in found:
        raise ValueError(f"kernels {name!r} do not run here, {', '.join(found)} do")
    return found[name]

"""Checks that native resources are used only while open, and only in the process that opened them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController

from .errors import ClosedError


class Lifetime:
    """Whether a native resource may be used.

    Native libraries crash when they are used after they were freed, and hang in a process that was forked after
    their threads were started.
    """

    def __init__(self, name: str) -> None:
        """``name``: the resource in error messages, for example "the language model"."""
        self._name = name
        self._process = os.getpid()
        self._is_open = True

    def check(self) -> None:
        """
        Raises:
            ClosedError: the resource was closed, or another process opened it.
        """
        if not self._is_open:
            raise ClosedError(f"{self._name} is closed: open it again")
        if os.getpid() != self._process:
            raise ClosedError(
                f"{self._name} was opened by another process: open it in this one, after the fork"
            )

    def end(self) -> bool:
        """Mark it as closed. True when the caller must free it: the first time, in the process that opened it."""
        frees = self._is_open and os.getpid() == self._process
        self._is_open = False
        return frees


_lock = threading.Lock()
_num_users = 0
_limiter = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread while any such context is open: idle BLAS threads spin, and the products here
    are small. The last context to close restores the number of threads that the first one found."""
    global _num_users, _limiter
    with _lock:
        if _num_users == 0:
            _limiter = ThreadpoolController().select(user_api="blas").limit(limits=1)
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0 and _limiter is not None:
                _limiter.restore_original_limits()
                _limiter = None

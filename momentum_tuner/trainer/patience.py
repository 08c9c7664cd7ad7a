"""An end, after some time, to what the user's code is doing in this thread."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

_POLL_SECONDS = 0.1


class AbandonedError(BaseException):
    """Raised in the middle of the user's code; not an `Exception`, so that the code does not take it for its own."""


class Patience:
    """`with Patience(wanted, seconds):` raises `AbandonedError` in the block that long after `wanted` became true.

    It comes between two of Python's own instructions: a single call of compiled code that never ends is not ended.

    Args:
        wanted: asked several times a second, in another thread.
        seconds: how long the block may go on after that.
    """

    def __init__(self, wanted: Callable[[], bool], seconds: float) -> None:
        self._wanted = wanted
        self._seconds = seconds
        self._thread_id = threading.get_ident()
        self._over = threading.Event()
        self._deciding = threading.Lock()
        self._raised = False
        self._watch = threading.Thread(target=self._look, name="patience", daemon=True)

    def __enter__(self) -> None:
        self._watch.start()

    def __exit__(self, *exc: object) -> None:
        with self._deciding:
            self._over.set()
        self._watch.join()
        if self._raised:  # it may still be on its way, and must not reach what comes after
            _raise_in(self._thread_id, None)

    def _look(self) -> None:
        since = None
        while not self._over.wait(_POLL_SECONDS):
            if since is None and self._wanted():
                since = time.monotonic()
            if since is not None and time.monotonic() - since >= self._seconds:
                with self._deciding:
                    if not self._over.is_set():
                        self._raised = True
                        _raise_in(self._thread_id, AbandonedError)
                return


def _raise_in(thread_id: int, kind: type[BaseException] | None) -> None:
    """Let a thread raise an exception at its next instruction, or take back one that it has not raised yet."""
    exception = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), exception)

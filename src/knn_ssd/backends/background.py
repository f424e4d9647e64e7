"""Work that is done step by step on a thread of its own, while requests run and whenever none does."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

_TURN_SEC = 0.001  # long enough for a thread that waits for the kernels to get them

_FORK_SEC = 10.0  # the longest that a fork waits for the end of a step

_running: set[BackgroundWork] = set()
_step = threading.Lock()  # held during each step, so that a fork copies no lock that is held by a step


class BackgroundWork:
    """Runs one piece of work at a time.

    It ends with the process, after its current step. A process that forks, which waits for the current step to end, has
    it in the parent alone.

    Args:
        is_busy: whether others want the processor. Then they get a turn after each step.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, steps: Iterator[None]) -> None:
        """Runs the steps from now on. They handle their own errors, and no other work may be running."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="knn-ssd background", daemon=True)
        _running.add(self)
        self._thread.start()

    def stop(self) -> None:
        """Ends the work after its current step, and waits for that."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, steps: Iterator[None]) -> None:
        try:
            while self._runs_a_step(steps):
                if self._stopping.is_set() or (self._is_busy() and self._stopping.wait(_TURN_SEC)):
                    return
        finally:
            _running.discard(self)

    @staticmethod
    def _runs_a_step(steps: Iterator[None]) -> bool:
        with _step, suppress(StopIteration):
            next(steps)
            return True
        return False


_forks: list[bool] = []  # for each that has begun, whether it holds `_step`


def _before_fork() -> None:
    _forks.append(_step.acquire(timeout=_FORK_SEC))


def _after_fork() -> None:
    if _forks.pop():
        _step.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


@atexit.register
def _stop_all() -> None:
    """A thread within the kernels must not outlive the memory that they read."""
    for each in list(_running):
        each.stop()

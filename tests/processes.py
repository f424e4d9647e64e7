"""Processes that need no seconds for importing torch and transformers.

Each is forked from a server, started once, that has imported what the commands import and has done nothing else. They
are for tests of what only a process has: signals, kills, a terminal, memory, files that several of them share.
`afresh` replaces such a process by a new Python, as users start it: one test of each command does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from knn_ssd.cli import main

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "knn_ssd.calibrate.pipeline",
        "knn_ssd.server.app",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "uvicorn",
    ]
)


def start(
    output: Path, errors: Path, argv: Sequence[object], run: Callable[[list[str]], int | None] = main
) -> BaseProcess:
    """Starts a `knn-ssd` command, or another function of such words, with the environment variables of this process.

    Args:
        output: the file or terminal that it writes to; if a terminal, it reads from there too and Ctrl-C reaches it.
        errors: the same for its standard error.
        argv: the words of the command line.
        run: runs them; what it returns is the exit code.
    """
    words, reads = [str(word) for word in argv], output if output.is_char_device() else os.devnull
    places = [str(place) for place in (reads, output, errors)]
    process = FORKED.Process(target=_run, args=(run, words, dict(os.environ), places), daemon=True)
    process.start()
    return process


def afresh(argv: list[str]) -> int:
    """Runs a `knn-ssd` command in a Python that has imported nothing yet."""
    os.execv(sys.executable, [sys.executable, "-m", "knn_ssd", *argv])


def slowly(argv: list[str]) -> int:
    """Runs a command whose answer comes a piece every 0.3 s."""
    from knn_ssd.outputs import Stream

    next_ = Stream.__next__

    def slow_next(stream: Stream) -> Any:
        time.sleep(0.3)
        return next_(stream)

    Stream.__next__ = slow_next  # type: ignore[method-assign]
    return main(argv)


def forget_the_disk() -> None:
    """Has nothing in this process wait until a file is on the disk, which Optuna's journal does twenty times a trial.

    Only a power cut would show it; what a killed process has written is there.
    """
    os.fsync = lambda _file: None


def ended(process: BaseProcess, timeout_sec: float = 120) -> int | None:
    """The exit code, or the signal's number below 0, once the process has ended; None if it has not."""
    process.join(timeout_sec)
    return process.exitcode


def _run(
    run: Callable[[list[str]], int | None], argv: list[str], environment: dict[str, str], places: Sequence[str]
) -> None:
    os.setsid()  # so that a terminal opened next is this process's own
    os.environ.clear()
    os.environ.update(environment)
    for number, place in enumerate(places):
        opened = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    forget_the_disk()
    sys.exit(run(argv))

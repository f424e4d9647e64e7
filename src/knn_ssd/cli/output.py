"""Writes results to stdout and everything else to stderr; no other module writes to either.

It knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

_PIPE_WIDTH = 100  # characters of a table that does not go to a terminal


def prepare() -> None:
    """Makes a stream that cannot encode a character write a question mark instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str) -> None:
    """Writes text to stdout at once.

    Raises:
        OutputError: stdout cannot be written.
        BrokenPipeError: the reader of stdout closed it.
    """
    if sys.stdout is None:  # it was closed before the process started
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise OutputError(f"the output cannot be written: {error.strerror or error}", "Make room for it.") from error


def write_line(text: str) -> None:
    write(text + "\n")


def write_json(value: Any, indent: int | None = None) -> None:
    """Writes a JSON value to stdout, on one line unless an indent is given."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    write_line(json.dumps(value, ensure_ascii=not is_utf8, indent=indent))


def write_table(table: RenderableType) -> None:
    """Writes a table of rich to stdout."""
    from rich.console import Console

    is_terminal = stdout_is_terminal()
    console = Console(highlight=False, width=None if is_terminal else _PIPE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get()
    write(lines if is_terminal else "".join(f"{line.rstrip()}\n" for line in lines.splitlines()))


def note(text: str) -> None:
    """Writes a line to stderr."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Writes what argparse and others left in the buffer of stdout."""
    write("")


def abandon_stdout() -> None:
    """Discards what is left in the buffer of stdout, so that exiting does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout_is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def stderr_is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()

"""Reads what a user types: on a terminal with line editing, multi-line paste and a history; from a pipe, line by line.

The editing is that of Python's `readline`. GNU readline, which Linux has, inserts a paste of several lines as it is
(bracketed paste), so that it is one message; libedit, as in Python on macOS, takes each line as a message of its own.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from knn_ssd.cli import output
from knn_ssd.errors import OutputError, PromptError
from knn_ssd.io import JsonLines, cache_directory, write_whole, writing

MOST_KEPT = 1000  # messages of the history

HISTORY = "chat_history.jsonl"


class LineEditor:
    """Reads one message after the other.

    Args:
        keeps_history: whether messages typed on a terminal are kept for later sessions, in a file of the cache
            directory that only this user can read.
    """

    def __init__(self, keeps_history: bool = True) -> None:
        self._is_terminal = sys.stdin.isatty()
        self._readline = _readline() if self._is_terminal else None
        keeps = keeps_history and self._readline is not None
        self._history = History(cache_directory() / HISTORY) if keeps else None
        if self._readline is not None:
            self._readline.set_auto_history(False)  # entries of several lines are added whole
            for text in self._history.texts if self._history is not None else ():
                self._readline.add_history(text)

    def read(self) -> str | None:
        """The next message; None at the end of the input.

        Raises:
            PromptError: the input is not UTF-8 text.
            KeyboardInterrupt: Ctrl-C, unless a terminal is read.
        """
        while True:
            try:
                text = input("> " if self._is_terminal and output.stdout_is_terminal() else "")
            except EOFError:
                if self._is_terminal:
                    output.note("")
                return None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                output.note("\n(Ctrl-D or /quit leaves)")
            except UnicodeDecodeError as error:
                raise PromptError(f"the input is not UTF-8 text ({error})", "Give text.") from error
            else:
                self._remember(text)
                return text

    def _remember(self, text: str) -> None:
        if self._readline is None or not text.strip():
            return
        self._readline.add_history(text)
        if self._history is None:
            return
        try:
            self._history.add(text)
        except OutputError as error:
            output.note(f"(no history is kept: {error})")
            self._history = None


class History:
    """The messages of earlier sessions, in a file of JSON lines. One that is damaged is begun anew.

    Args:
        path: the file; it need not exist.

    Attributes:
        texts: the messages that were there when the file was opened, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)
        self.texts: list[str] = []
        with suppress(ValueError, OSError, OutputError):
            self.texts = [str(each["text"]) for each in self._file.read() if "text" in each]
        if len(self.texts) > 2 * MOST_KEPT:
            self.texts = self.texts[-MOST_KEPT:]
            with suppress(OutputError):
                write_whole(path, "")
                path.chmod(0o600)
                self._file.append({"text": text} for text in self.texts)

    def add(self, text: str) -> None:
        """Appends a message. Raises an `OutputError` if the file cannot be written."""
        path = self._file.path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        self._file.append([{"text": text}])


def _readline() -> ModuleType | None:
    """Python's `readline`, set up for pastes of several lines; None where there is none, as on Windows."""
    try:
        import readline
    except ImportError:
        return None
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline

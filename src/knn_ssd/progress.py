"""Progress of long-running work: the interface it reports to, and progress bars on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import rich.progress
    from rich.progress import TaskID


class Progress(Protocol):
    """Receives the progress of some work."""

    def stage(self, name: str, total: int | None) -> None:
        """Begins a stage of `total` steps; None where their number is unknown."""

    def advance(self, note: str = "") -> None:
        """Marks one step of the stage as done."""


class NoProgress:
    """Shows nothing."""

    def stage(self, name: str, total: int | None) -> None: ...

    def advance(self, note: str = "") -> None: ...


class ProgressBars:
    """A context manager that shows one bar per stage on stderr, or one line per stage where stderr is no terminal.

    Without a stage it shows nothing.

    Args:
        in_bytes: whether steps are bytes.
    """

    def __init__(self, *, in_bytes: bool = False) -> None:
        self._in_bytes = in_bytes
        self._progress: rich.progress.Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBars:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            DownloadColumn() if self._in_bytes else MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        assert self._progress is not None
        if self._task is None:
            return
        if kind is None:
            self._finish()
        self._progress.stop()

    def stage(self, name: str, total: int | None) -> None:
        assert self._progress is not None
        self._finish()
        self._progress.start()  # at the first stage
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._progress.console.is_terminal:
            self._progress.console.print(name)

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Marks steps as done."""
        assert self._progress is not None
        assert self._task is not None
        self._progress.update(self._task, advance=steps, note=note)

    def _finish(self) -> None:
        if self._progress is not None and self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=max(done, 1), completed=max(done, 1))

"""The working folder of a calibration: settings, observations, cost profile and trials. A killed run resumes from it.

Every file is appended to or written whole. The folder lies beside the future atlas and is removed once that is written.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from knn_ssd.calibrate.continuations import ObservationFile
from knn_ssd.errors import CalibrationError, OutputError
from knn_ssd.io import cut_torn_line, write_whole, writing
from knn_ssd.speculation.cost_model import CostProfile

_SETTINGS, _COST, _TRIALS, _OBSERVATIONS = "settings.json", "cost.json", "trials.log", "observations.jsonl"


class _TrialFile(JournalFileBackend):
    """Optuna's journal file. Its lock mistakes a Ctrl-C for a removed file, so Ctrl-C waits until the write is done."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with uninterrupted():
            super().append_logs(logs)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the block is done."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


class Journal:
    """The results of a calibration so far.

    Args:
        out: the folder that the atlas will be written to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.parent / f"{out.name}.calibration"
        self.observations = ObservationFile(self.folder / _OBSERVATIONS)

    def begin(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Makes the folder, or checks that an existing one belongs to a calibration with the same settings.

        Raises:
            CalibrationError: the folder has an interrupted calibration, and `resume` is false or its settings differ.
            OutputError: the folder cannot be written.
        """
        path = self.folder / _SETTINGS
        if path.exists():
            self._check(json.loads(path.read_text("utf-8")), settings, resume)
            cut_torn_line(self.folder / _TRIALS)
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise OutputError(
                f"'{self.folder}' is in the way: it is not the working folder of a calibration", "Choose another --out."
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1) + "\n")

    def storage(self, url: str | None) -> optuna.storages.BaseStorage | str:
        """The storage of the trials: the database at `url`, or a file in the folder for None."""
        if url is not None:
            return url
        with writing(self.folder):
            return JournalStorage(_TrialFile(str(self.folder / _TRIALS)))

    def read_cost(self) -> CostProfile | None:
        """The cost profile, if it was measured already."""
        path = self.folder / _COST
        if not path.exists():
            return None
        data = json.loads(path.read_text("utf-8"))
        return CostProfile(**{**data, "verify_sec": tuple(data["verify_sec"])})

    def write_cost(self, cost: CostProfile) -> None:
        """Keeps the cost profile."""
        write_whole(self.folder / _COST, json.dumps(asdict(cost)) + "\n")

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check(self, before: Mapping[str, Any], settings: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise CalibrationError(
                f"an interrupted calibration is at '{self.folder}'", "Resume it with --resume, or remove that folder."
            )
        now = json.loads(json.dumps(settings))
        changed = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in now if before.get(key) != now[key]
        ]
        if changed:
            raise CalibrationError(
                f"the interrupted calibration at '{self.folder}' was run with other settings: {'; '.join(changed)}",
                "Give the same settings, or remove that folder to begin anew.",
            )

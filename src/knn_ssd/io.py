"""Files: atomic writes, JSON lines that survive a kill, the cache directory, and provenance."""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from knn_ssd.errors import OutputError

logger = logging.getLogger(__name__)

_PACKAGES = ("knn-ssd", "torch", "transformers", "optuna", "numpy", "scikit-learn")
_STALE_SECONDS = 24 * 3600


def provenance() -> dict[str, Any]:
    """Versions, machine and time with which an artefact is made."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty folder that is moved to `path` when the block succeeds, and removed when it fails.

    Raises:
        OutputError: `path` exists already, or cannot be written.
    """
    with writing(path):
        if path.exists():
            raise OutputError(f"there is already something at '{path}'", "Choose another place, or remove it first.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with writing(path):
            yield temporary
            temporary.chmod(0o755)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within the block into an `OutputError` about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror or error}",
            "Choose a place with room that you may write to.",
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8, and makes its folder if need be.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_stale(parent: Path) -> None:
    """Removes the hidden folders that killed writers left in a folder, once too old to belong to a running one."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(".*"):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


class JsonLines:
    """A file of JSON objects, one on each line, that is appended to. A last line that a kill cut short is dropped.

    Args:
        path: the file's path; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All objects; empty where there is no file.

        Raises:
            ValueError: a complete line is not JSON.
        """
        cut_torn_line(self.path)
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Appends objects, one on each line.

        Raises:
            OutputError: the file cannot be written.
        """
        lines = "".join(json.dumps(each) + "\n" for each in objects)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


def cut_torn_line(path: Path) -> None:
    """Removes a last line without a newline, which a killed process left behind."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with writing(path):
            path.write_bytes(whole)


def cache_directory() -> Path:
    """Where converted models, weights made of them and compiled kernels are kept.

    It is $KNN_SSD_CACHE, else a directory in the user's cache directory.

    Where the latter cannot be written, or there is none, it is a directory of the user's own among the temporary files,
    which a warning reports.
    """
    if own := os.environ.get("KNN_SSD_CACHE"):
        return Path(own).expanduser()
    try:
        preferred = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "knn-ssd"
    except RuntimeError:  # the user has no home directory
        preferred = None
    return preferred if preferred is not None and _can_be_made(preferred) else _replacement(preferred)


@functools.cache  # one warning and one directory in a process
def _replacement(preferred: Path | None) -> Path:
    replacement = _own_temporary_directory()
    logger.warning(
        "The cache directory '%s' cannot be written, and '%s' is used. Set KNN_SSD_CACHE to a directory that is kept.",
        preferred or "~/.cache/knn-ssd",
        replacement,
    )
    return replacement


def _can_be_made(path: Path) -> bool:
    existing = next(each for each in (path, *path.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _own_temporary_directory() -> Path:
    """A directory that only this user can write, the same one for all processes of the user if that can be had."""
    shared = Path(tempfile.gettempdir()) / f"knn-ssd-{getpass.getuser() if not hasattr(os, 'getuid') else os.getuid()}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
        if stat.S_ISDIR(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid()):
            return shared
    return Path(tempfile.mkdtemp(prefix="knn-ssd-"))

"""Files: written whole or not at all, JSON lines that survive a kill, the cache directory, and provenance."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from knn_ssd.errors import OutputError

_PACKAGES = ("knn-ssd", "torch", "transformers", "optuna", "numpy", "scikit-learn")


def provenance() -> dict[str, Any]:
    """What an artefact was made with: versions, machine and time."""
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
    """A folder to fill that appears at `path` when the block ends well, and never otherwise.

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
    """Turns a failure of the file system within the block into an `OutputError` about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror or error}",
            "Choose a place with room that you may write to.",
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            temporary.write_text(text, "utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class JsonLines:
    """A file of one JSON object a line, which grows as work is done. A line that a kill cut short is dropped.

    Args:
        path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All objects; none where there is no file.

        Raises:
            ValueError: a whole line that is not JSON.
        """
        cut_torn_line(self.path)
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Adds objects, all of them or none.

        Raises:
            OutputError: a full disk, or no permission.
        """
        lines = "".join(json.dumps(each) + "\n" for each in objects)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


def cut_torn_line(path: Path) -> None:
    """Cuts off a last line without its newline, which a killed process left."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with writing(path):
            path.write_bytes(whole)


def cache_directory() -> Path:
    """Where converted models and compiled kernels are kept: $KNN_SSD_CACHE, else the user's cache directory."""
    if own := os.environ.get("KNN_SSD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "knn-ssd"

"""The file of an answer store: a SQLite database in a folder, which several processes may use at the same time.

Whatever it holds is checked before it is used: nothing is executed, and no entry larger than asked for is read. Where
it can no longer be written, one warning says so, and requests go on. This module does not know which entries to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knn_ssd.errors import AnswerStoreError, AnswerStoreMismatchError
from knn_ssd.loading.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

Key = bytes  # of a request; see `answer_key`

FILE_NAME = "answers.sqlite"
FORMAT = 1
_LOCK_SECONDS = 5.0  # to wait for another process, which writes for a millisecond
_MAX_TEXT = 10_000  # characters of the fingerprint, and of what was drafted in a request
_MAX_ROW = 2**26  # bytes
MAX_COUNT = 2**53  # of requests and tokens: what a float holds exactly
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, accepted REAL NOT NULL, last_used INTEGER NOT NULL,
    by_drafter TEXT NOT NULL, prompt_ids BLOB NOT NULL, token_ids BLOB NOT NULL, vector BLOB NOT NULL
);
"""
_COLUMNS = "key, accepted, last_used, by_drafter, prompt_ids, token_ids, vector"
_USABLE = f"""
    typeof(key) = 'blob' AND length(key) = 16 AND typeof(accepted) = 'real' AND typeof(last_used) = 'integer'
    AND typeof(by_drafter) = 'text' AND length(by_drafter) <= {_MAX_TEXT}
    AND typeof(prompt_ids) = 'blob' AND typeof(token_ids) = 'blob' AND length(token_ids) > 0
    AND length(prompt_ids) + length(token_ids) <= 4 * :tokens
    AND typeof(vector) = 'blob' AND length(vector) = 4 * :width
"""
_OF_THE_DISK = (  # a disk that is full, read-only or broken, or a file that another process has locked for long
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PERM,
)  # fmt: skip


class StoredAnswer(NamedTuple):
    """A request as it is stored."""

    key: Key
    """Identifies prompt and answer."""
    vector: np.ndarray[Any, Any]
    """(D,) float32, finite and not zero."""
    prompt_ids: np.ndarray[Any, Any]
    """(n,) int32."""
    token_ids: np.ndarray[Any, Any]
    """(m,) int32."""
    by_drafter: Mapping[str, tuple[int, int]]
    """How many tokens each drafter drafted, and how many of them were accepted."""
    accepted: float
    """Draft tokens from this answer that were accepted in later requests."""
    last_used: int
    """The number of the request that used it last."""


def answer_key(prompt_ids: np.ndarray[Any, Any], token_ids: np.ndarray[Any, Any]) -> Key:
    """Identifies a prompt (n,) and its answer (m,), both int32: a hash of both."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=16)
    for ids in (prompt_ids, token_ids):
        digest.update(ids.astype("<i4", copy=False).tobytes())
    return digest.digest()


class AnswerFile:
    """The file of an answer store. Threads can share it.

    Args:
        folder: the folder that it is in, which is made if need be.
        fingerprint: the model whose requests it keeps; None opens what exists already, of whichever model.
        vocab_size: how many token ids the model has; None is what the fingerprint says.

    Raises:
        AnswerStoreError: what is there is no answer store, has a newer format, or is damaged.
        AnswerStoreMismatchError: an answer store of another model.
    """

    def __init__(self, folder: str | Path, fingerprint: Fingerprint | None = None, vocab_size: int | None = None):
        self.path = Path(folder) / FILE_NAME
        self.skipped: list[int] = []
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._writable = True
        try:
            self.fingerprint = self._open(fingerprint)
        except (OSError, sqlite3.Error) as error:
            self.close()
            if fingerprint is None or not (isinstance(error, OSError) or _is_of_the_disk(error)):
                raise self._unusable(error) from error
            self.fingerprint = fingerprint
            self._stop_writing(error)
        self._vocab_size = vocab_size or self.fingerprint.vocab_size

    @property
    def bytes(self) -> int:
        """Size on disk, SQLite's write-ahead log included."""
        files = (self.path, self.path.with_name(f"{FILE_NAME}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def read(self, max_tokens: int = MAX_COUNT // 4) -> Iterator[StoredAnswer]:
        """All requests in the order in which they were added; the ids of damaged ones are put into `skipped`.

        Args:
            max_tokens: requests with more tokens than these are not read.

        Raises:
            AnswerStoreError: the file is damaged.
        """
        if self._connection is None:
            return
        bounds = {"tokens": max_tokens, "width": self.fingerprint.hidden_size}
        with self._lock, self._refusing_damage():
            unusable = self._connection.execute(f"SELECT id FROM answers WHERE ({_USABLE}) IS NOT 1", bounds)
            self.skipped = [number for (number,) in unusable]
            rows = self._connection.execute(f"SELECT id, {_COLUMNS} FROM answers WHERE {_USABLE} ORDER BY id", bounds)
            for number, *row in rows:
                stored = self._checked(row)
                if stored is None:
                    self.skipped.append(number)
                else:
                    yield stored

    def remove_skipped(self) -> None:
        """Removes the entries that `read` skipped, and reports how many in one warning."""
        if self.skipped:
            text = "'%s' had %d requests that are damaged or too long for it. They were skipped and removed."
            logger.warning(text, self.path, len(self.skipped))
            self._write("DELETE FROM answers WHERE id = ?", [(number,) for number in self.skipped])
            self.skipped = []

    def put(self, stored: StoredAnswer) -> None:
        """Writes a request, in place of one with the same key."""
        blobs = _bytes(stored.prompt_ids, "<i4"), _bytes(stored.token_ids, "<i4"), _bytes(stored.vector, "<f4")
        row = (stored.key, stored.accepted, stored.last_used, json.dumps(stored.by_drafter), *blobs)
        self._write(f"INSERT OR REPLACE INTO answers ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", [row])

    def update(self, usefulness: Iterable[tuple[float, int, Key]]) -> None:
        """Writes `accepted` and `last_used` of the requests with these keys."""
        self._write("UPDATE answers SET accepted = ?, last_used = ? WHERE key = ?", usefulness)

    def delete(self, keys: Iterable[Key]) -> None:
        """Removes the requests with these keys."""
        self._write("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])

    def clear(self) -> int:
        """Removes all requests, makes the file small, and returns how many there were."""
        if self._connection is None:
            return 0
        with self._lock, self._refusing_damage():
            with self._connection:
                removed = self._connection.execute("DELETE FROM answers").rowcount
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def close(self) -> None:
        """Closes the file. What is written later is lost without a warning."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    # ---- Opening

    def _open(self, fingerprint: Fingerprint | None) -> Fingerprint:
        """Opens the file, read-only where it cannot be written; makes it if need be and a fingerprint is given."""
        folder = self.path.parent
        if folder.exists() and not folder.is_dir():
            raise AnswerStoreError(f"'{folder}' is a file, and an answer store is a folder", "Give another place.")
        if fingerprint is not None and not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)  # only the owner may read the prompts
        if not self.path.is_file():
            raise AnswerStoreError(f"there is no answer store in '{folder}'", f"It would have a file {FILE_NAME}.")
        writable = os.access(self.path, os.W_OK) and os.access(folder, os.W_OK)
        self._connection = _connect(self.path.absolute().as_uri() + ("" if writable else "?immutable=1"))
        if writable:
            self._prepare(self._connection, fingerprint)
        elif fingerprint is not None:
            self._stop_writing("it is read-only")
        return self._check_meta(self._connection, fingerprint)

    def _prepare(self, connection: sqlite3.Connection, fingerprint: Fingerprint | None) -> None:
        """Makes the tables of a new file. A file of another program is left as it is."""
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if fingerprint is not None and not _tables(connection):
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                meta = {"format": str(FORMAT), "fingerprint": json.dumps(asdict(fingerprint))}
                connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        if {"meta", "answers"} <= _tables(connection):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

    def _check_meta(self, connection: sqlite3.Connection, fingerprint: Fingerprint | None) -> Fingerprint:
        """The stored fingerprint, which must be of the same model as the given one."""
        tables = _tables(connection)
        meta = dict(connection.execute("SELECT name, value FROM meta")) if "meta" in tables else {}
        if "answers" not in tables or "format" not in meta:
            raise AnswerStoreError(f"'{self.path}' is not an answer store's file", "Give another folder.")
        if meta["format"] != str(FORMAT):
            raise AnswerStoreError(
                f"'{self.path}' has format {meta['format']}, and this version of knn-ssd reads {FORMAT}",
                "Update knn-ssd.",
            )
        try:
            own = Fingerprint(**json.loads(meta["fingerprint"]))
            if not (isinstance(own.hidden_size, int) and isinstance(own.vocab_size, int)):
                raise TypeError(f"the sizes are {own.hidden_size!r} and {own.vocab_size!r}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._unusable(f"its fingerprint is damaged ({error})") from error
        differences = own.differences(fingerprint, "the answer store") if fingerprint is not None else ()
        if differences:
            raise AnswerStoreMismatchError(
                f"the answer store in '{self.path.parent}' belongs to another model",
                differences,
                "Give each model a folder of its own.",
            )
        return own

    # ---- Reading and writing

    def _checked(self, row: list[Any]) -> StoredAnswer | None:
        """A row's content; None if something in it cannot be true."""
        key, accepted, last_used, counts, *blobs = row
        try:
            prompt_ids, token_ids = (np.frombuffer(blob, "<i4").astype(np.int32, copy=False) for blob in blobs[:2])
            vector = np.frombuffer(blobs[2], "<f4").astype(np.float32, copy=False)
            by_drafter = {str(name): (int(pair[0]), int(pair[1])) for name, pair in json.loads(counts).items()}
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        in_range = 0 <= accepted <= MAX_COUNT and 0 <= last_used <= MAX_COUNT
        in_range &= all(0 <= right <= drafted <= MAX_COUNT for drafted, right in by_drafter.values())
        known = all(
            not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab_size) for ids in (prompt_ids, token_ids)
        )
        if (
            not in_range
            or not known
            or not np.isfinite(vector).all()
            or not vector.any()
            or key != answer_key(prompt_ids, token_ids)
        ):
            return None
        return StoredAnswer(key, vector, prompt_ids, token_ids, by_drafter, accepted, last_used)

    def _write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._lock:
            if self._connection is None or not self._writable:
                return
            try:
                with self._connection:
                    self._connection.executemany(statement, rows)
            except sqlite3.Error as error:
                self._stop_writing(error)

    def _stop_writing(self, reason: object) -> None:
        self._writable = False
        logger.warning(
            "The answer store '%s' cannot be written (%s). Requests are kept in memory until the process ends.",
            self.path.parent,
            reason,
        )

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, reason: object) -> AnswerStoreError:
        return AnswerStoreError(
            f"'{self.path}' cannot be used: {reason}", "Restore it, remove it, or give another folder."
        )


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        uri, uri=True, timeout=_LOCK_SECONDS, isolation_level="IMMEDIATE", check_same_thread=False
    )
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
    connection.text_factory = lambda text: text.decode(errors="replace")  # so that one bad text spoils no other row
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def _is_of_the_disk(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _OF_THE_DISK


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _bytes(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    return values.astype(dtype, copy=False).tobytes()

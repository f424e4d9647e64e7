"""The answer store: earlier requests with their prompt vectors, and the search for those nearest to a new prompt.

Retrieval of similar earlier outputs as drafts is what the authors of KNN-SSD went on to (ToolSpec, arXiv 2604.13519).
This module knows vectors and token ids. It knows nothing of models, and nothing of how answers become drafts.

When the store is full, it forgets of the older half of its requests, by their last use, those first whose answers had
the fewest draft tokens accepted; so a new request has the time of half a store to become useful. Accepted tokens count
half after as many requests as the store holds, so what was useful long ago goes too when topics change.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knn_ssd.errors import AnswerStoreMismatchError, UsageError
from knn_ssd.loading.fingerprint import Fingerprint
from knn_ssd.routing.answer_file import MAX_COUNT, AnswerFile, Key, StoredAnswer, answer_key
from knn_ssd.routing.vector_index import VectorIndex

NUM_NEIGHBOURS = 6  # whose answers draft
RADIUS = 0.1  # cosine distance beyond which a request is no neighbour
DEFAULT_MAX_TOKENS = 1_000_000
_LARGEST_SHARE = 0.1  # of the store's tokens that one request may take; a longer one is not kept
_KEPT_SHARE = 0.9  # of the store that stays when it is full, so that evictions are rare
_TOKENS_PER_REQUEST = 64  # at least, on average: the vectors of many short requests would outgrow their tokens
_MIN_REQUESTS = 1024  # that a store of whatever size may hold
_OBJECT_BYTES = 1024  # of a request in memory besides its vector and tokens


class DraftCount(NamedTuple):
    """How many tokens a drafter drafted, and how many of them were accepted."""

    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An earlier request.

    Args:
        id: its number in the store, which grows from request to request.
        prompt_ids: (n,) the prompt's token ids, int32.
        token_ids: (m,) the answer's token ids, int32.
        by_drafter: what each drafter drafted in it, when it was last asked.
    """

    id: int
    prompt_ids: np.ndarray[Any, Any]
    token_ids: np.ndarray[Any, Any]
    by_drafter: dict[str, DraftCount] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An earlier request that is near to a prompt.

    Args:
        answer: the earlier request.
        distance: the cosine distance between both prompts' vectors, in [0, 2].
    """

    answer: Answer
    distance: float


@dataclass(slots=True)
class _Entry:
    """A request in the store."""

    answer: Answer
    key: Key  # of prompt and answer
    accepted: float  # draft tokens from it that were accepted, as they counted at `last_used`
    last_used: int  # in requests


class AnswerStore:
    """Earlier requests of one owner, bounded by their tokens; the least useful are evicted first. Threads can share it.

    Vectors are compared by cosine, exactly: one product of the matrix of all vectors with the prompt's. Beyond 100,000
    requests, a graph searches the others approximately if hnswlib is installed (`pip install knn-ssd[answers]`).

    Args:
        max_tokens: the most tokens of prompts and answers that are kept.
    """

    def __init__(self, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._max_requests = max(_MIN_REQUESTS, max_tokens // _TOKENS_PER_REQUEST)
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}  # by the answer's id
        self._ids: dict[Key, int] = {}  # by key
        self._index = VectorIndex()
        self._width: int | None = None  # values of a vector
        self._fingerprint: Fingerprint | None = None
        self._tokens = 0
        self._next_id = 0
        self._clock = 0  # in requests
        self._file: AnswerFile | None = None

    @classmethod
    def open(
        cls, folder: str | Path, fingerprint: Fingerprint, vocab_size: int, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> AnswerStore:
        """The store that is kept in a folder; a new one if there is none.

        Each request is written as it ends. Several processes may use one folder; each sees what the others kept when it
        starts. Where the folder cannot be written, a warning says so, and the store goes on in memory.

        Args:
            folder: the folder, which is made if need be.
            fingerprint: the model.
            vocab_size: how many token ids the model has.
            max_tokens: the most tokens of prompts and answers that are kept.

        Raises:
            AnswerStoreError: what is there is no answer store, has a newer format, or is damaged.
            AnswerStoreMismatchError: an answer store of another model.
        """
        store = cls(max_tokens)
        store._load(AnswerFile(folder, fingerprint, vocab_size))
        return store

    def bind(self, fingerprint: Fingerprint) -> None:
        """Ties the store to a model.

        Raises:
            AnswerStoreMismatchError: it belongs to another model.
        """
        with self._lock:
            differences = self._fingerprint.differences(fingerprint, "the answer store") if self._fingerprint else ()
            if differences:
                raise AnswerStoreMismatchError(
                    "the answer store belongs to another model", differences, "Give each model a store of its own."
                )
            self._fingerprint, self._width = fingerprint, fingerprint.hidden_size

    def __len__(self) -> int:
        """How many requests are kept."""
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and answers."""
        return self._tokens

    @property
    def bytes(self) -> int:
        """Memory of vectors, tokens and, estimated, what holds them together."""
        return self._index.bytes + 4 * self._tokens + _OBJECT_BYTES * len(self._entries)

    def nearest(self, vector: np.ndarray[Any, Any], k: int, radius: float) -> tuple[Neighbour, ...]:
        """The at most k earlier requests nearest to a prompt vector (D,), none farther than `radius`; nearest first.

        Among equally near ones, the latest is first. None are near to a vector that is zero or not finite.

        Raises:
            UsageError: the vector is not as long as those in the store.
        """
        unit = _unit(vector)
        with self._lock:
            if unit is None or k < 1:
                return ()
            self._check_width(unit)
            if not self._entries:
                return ()
            found = [(self._entries[number].answer, cosine) for number, cosine in self._index.search(unit, k)]
        near = (Neighbour(answer, min(max(1.0 - cosine, 0.0), 2.0)) for answer, cosine in found)
        return tuple(neighbour for neighbour in near if neighbour.distance <= radius)

    def add(
        self,
        vector: np.ndarray[Any, Any],
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        by_drafter: Mapping[str, DraftCount] | None = None,
    ) -> None:
        """Keeps a request that has ended, unless it is too long for the store or its vector is zero or not finite.

        The same prompt with the same answer is kept once, as used now.

        Raises:
            UsageError: the vector is not as long as those in the store.
        """
        unit = _unit(vector)
        if unit is None or not len(token_ids) or not self._has_room(len(prompt_ids) + len(token_ids)):
            return
        prompt, answer = np.array(prompt_ids, np.int32), np.array(token_ids, np.int32)
        stored = StoredAnswer(answer_key(prompt, answer), unit, prompt, answer, dict(by_drafter or {}), 0.0, 0)
        with self._lock:
            self._check_width(unit)
            if stored.key in self._ids:
                entry, evicted = self._refresh(stored), []
            else:
                evicted = self._make_room(len(prompt) + len(answer))
                entry = self._keep(stored._replace(last_used=self._clock))
            self._clock = min(self._clock + 1, MAX_COUNT)
            stored = stored._replace(accepted=entry.accepted, last_used=entry.last_used)
        if self._file is not None:
            self._file.delete(evicted)
            self._file.put(stored)

    def credit(self, accepted: Mapping[int, int]) -> None:
        """Notes how many draft tokens from answers, by their ids, were accepted in a request."""
        with self._lock:
            used = [(self._entries[number], count) for number, count in accepted.items() if number in self._entries]
            changed = [(entry, count) for entry, count in used if count > 0]
            for entry, count in changed:
                entry.accepted = min(self._usefulness(entry) + count, float(MAX_COUNT))
                entry.last_used = self._clock
            rows = [(entry.accepted, entry.last_used, entry.key) for entry, _ in changed]
        if self._file is not None and rows:
            self._file.update(rows)

    def clear(self) -> None:
        """Forgets all requests, on disk too.

        Raises:
            AnswerStoreError: the file cannot be written.
        """
        with self._lock:
            self._entries, self._ids, self._index = {}, {}, VectorIndex()
            self._tokens = 0
            if self._fingerprint is None:
                self._width = None
        if self._file is not None:
            self._file.clear()

    def close(self) -> None:
        """Closes the file of a store that is kept on disk. The store goes on in memory."""
        if self._file is not None:
            self._file.close()

    def _load(self, file: AnswerFile) -> None:
        evicted: list[Key] = []
        self._fingerprint, self._width = file.fingerprint, file.fingerprint.hidden_size
        for stored in file.read(int(_LARGEST_SHARE * self.max_tokens)):
            unit = _unit(stored.vector)
            if unit is not None and stored.key not in self._ids:
                self._clock = min(max(self._clock, stored.last_used + 1), MAX_COUNT)
                evicted += self._make_room(len(stored.prompt_ids) + len(stored.token_ids))
                self._keep(stored._replace(vector=unit))
        file.remove_skipped()
        file.delete(evicted)
        self._file = file

    def _check_width(self, unit: np.ndarray[Any, Any]) -> None:
        if self._width is not None and unit.shape != (self._width,):
            raise UsageError(
                f"the answer store holds vectors of {self._width} values, got one of {len(unit)}",
                "Give each model a store of its own.",
            )

    def _has_room(self, tokens: int) -> bool:
        return tokens <= _LARGEST_SHARE * self.max_tokens

    def _keep(self, stored: StoredAnswer) -> _Entry:
        for ids in (stored.prompt_ids, stored.token_ids):
            ids.flags.writeable = False  # other threads read them
        by_drafter = {name: DraftCount(*counts) for name, counts in stored.by_drafter.items()}
        answer = Answer(self._next_id, stored.prompt_ids, stored.token_ids, by_drafter)
        self._index.add(answer.id, stored.vector)
        entry = _Entry(answer, stored.key, stored.accepted, stored.last_used)
        self._entries[answer.id] = entry
        self._ids[stored.key] = answer.id
        self._width = len(stored.vector)
        self._tokens += answer.num_tokens
        self._next_id += 1
        return entry

    def _refresh(self, stored: StoredAnswer) -> _Entry:
        entry = self._entries[self._ids[stored.key]]
        entry.accepted = self._usefulness(entry)
        entry.last_used = self._clock
        entry.answer.by_drafter.update({name: DraftCount(*counts) for name, counts in stored.by_drafter.items()})
        return entry

    def _usefulness(self, entry: _Entry) -> float:
        """Draft tokens from an answer that were accepted; they count half after as many requests as the store holds."""
        return float(entry.accepted * 0.5 ** ((self._clock - entry.last_used) / len(self._entries)))

    def _make_room(self, tokens: int) -> list[Key]:
        """Forgets requests if one with so many tokens would be too much; returns the keys of those forgotten."""
        if self._tokens + tokens <= self.max_tokens and len(self._entries) < self._max_requests:
            return []
        most_tokens = int(_KEPT_SHARE * self.max_tokens) - tokens
        most_requests = int(_KEPT_SHARE * self._max_requests)
        dropped: list[_Entry] = []
        for entry in self._least_useful_first():
            if self._tokens <= most_tokens and len(self._entries) - len(dropped) <= most_requests:
                break
            self._tokens -= entry.answer.num_tokens
            dropped.append(entry)
        self._index.remove([entry.answer.id for entry in dropped])
        for entry in dropped:
            del self._entries[entry.answer.id], self._ids[entry.key]
        return [entry.key for entry in dropped]

    def _least_useful_first(self) -> list[_Entry]:
        by_use = sorted(self._entries.values(), key=lambda entry: entry.last_used)
        older, latest = by_use[: len(by_use) // 2], by_use[len(by_use) // 2 :]
        return sorted(older, key=self._usefulness) + latest


def _unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The vector (D,) scaled to length one, float32; None where that is impossible."""
    values = vector.astype(np.float64)
    length = float(np.linalg.norm(values))
    return (values / length).astype(np.float32) if np.isfinite(length) and length > 0 else None

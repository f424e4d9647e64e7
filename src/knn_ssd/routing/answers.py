"""The answer store: earlier requests with their prompt vectors, and the search for those nearest to a new prompt.

Retrieval of similar earlier outputs as drafts is what the authors of KNN-SSD went on to (ToolSpec, arXiv 2604.13519).
This module knows vectors and token ids. It knows nothing of models, and nothing of how answers become drafts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from knn_ssd.errors import UsageError

NUM_NEIGHBOURS = 6  # whose answers draft
RADIUS = 0.1  # cosine distance beyond which a request is no neighbour
DEFAULT_MAX_TOKENS = 1_000_000
_LARGEST_SHARE = 0.1  # of the store's tokens that one request may take; a longer one is not kept
_KEPT_SHARE = 0.9  # of the store's tokens that stay when it is full, so that evictions are rare
_MIN_ROWS = 64  # of the matrix of vectors, which doubles


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
        by_drafter: what each drafter drafted in it.
    """

    id: int
    prompt_ids: np.ndarray[Any, Any]
    token_ids: np.ndarray[Any, Any]
    by_drafter: Mapping[str, DraftCount] = field(default_factory=dict)

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
class _Usefulness:
    """How useful an answer has been; the least is evicted first."""

    accepted: int = 0  # draft tokens from it that were accepted, halved with each eviction
    last_used: int = 0  # in requests

    @property
    def rank(self) -> tuple[int, int]:
        return self.accepted, self.last_used


class AnswerStore:
    """Earlier requests of one owner, bounded by their tokens; the least useful are evicted first. Threads can share it.

    Vectors are compared by cosine, exactly: one product of the matrix of all vectors with the prompt's.

    Args:
        max_tokens: the most tokens of prompts and answers that are kept.
    """

    def __init__(self, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._answers: list[Answer] = []  # in order of their ids; row i of the matrix is the vector of answer i
        self._vectors = np.empty((0, 0), np.float32)  # (rows, D), each of length one
        self._usefulness: dict[int, _Usefulness] = {}
        self._tokens = 0
        self._next_id = 0

    def __len__(self) -> int:
        """How many requests are kept."""
        return len(self._answers)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and answers."""
        return self._tokens

    @property
    def bytes(self) -> int:
        """Memory of vectors and tokens."""
        return self._vectors.nbytes + 4 * self._tokens

    def nearest(self, vector: np.ndarray[Any, Any], k: int, radius: float) -> tuple[Neighbour, ...]:
        """The at most k earlier requests nearest to a prompt vector (D,), none farther than `radius`; nearest first."""
        unit = _unit(vector)
        with self._lock:
            count = len(self._answers)
            if not count or unit is None or unit.shape != self._vectors.shape[1:]:
                return ()
            # By einsum: a BLAS library's own threads would spin for a while on the cores that the kernels need.
            similarities = np.einsum("ij,j->i", self._vectors[:count], unit)  # (N,)
            best = np.argpartition(similarities, -k)[-k:] if count > k else np.arange(count)
            best = best[np.argsort(-similarities[best], kind="stable")]
            distances = np.clip(1.0 - similarities[best], 0.0, 2.0).tolist()
            near = zip((self._answers[i] for i in best), distances, strict=True)
            return tuple(Neighbour(answer, distance) for answer, distance in near if distance <= radius)

    def add(
        self,
        vector: np.ndarray[Any, Any],
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        by_drafter: Mapping[str, DraftCount] | None = None,
    ) -> None:
        """Keeps a request that has ended, unless it is too long for the store or its vector is not finite.

        Raises:
            UsageError: the vector is not as long as those in the store.
        """
        unit = _unit(vector)
        size = len(prompt_ids) + len(token_ids)
        if unit is None or not len(token_ids) or size > _LARGEST_SHARE * self.max_tokens:
            return
        with self._lock:
            if self._answers and unit.shape != self._vectors.shape[1:]:
                raise UsageError(
                    f"the answer store holds vectors of {self._vectors.shape[1]} values, got one of {len(unit)}",
                    "Give each model a store of its own.",
                )
            if self._tokens + size > self.max_tokens:
                self._evict(int(_KEPT_SHARE * self.max_tokens) - size)
            answer = Answer(
                self._next_id, np.array(prompt_ids, np.int32), np.array(token_ids, np.int32), dict(by_drafter or {})
            )
            self._append(answer, unit)

    def credit(self, accepted: Mapping[int, int]) -> None:
        """Notes how many draft tokens from answers, by their ids, were accepted in a request."""
        with self._lock:
            for number, count in accepted.items():
                if (useful := self._usefulness.get(number)) is not None:
                    useful.accepted += count
                    useful.last_used = self._next_id

    def clear(self) -> None:
        """Forgets all requests."""
        with self._lock:
            self._answers, self._vectors, self._usefulness = [], np.empty((0, 0), np.float32), {}
            self._tokens = 0

    def _append(self, answer: Answer, unit: np.ndarray[Any, Any]) -> None:
        count = len(self._answers)
        if count == len(self._vectors):
            grown = np.empty((max(_MIN_ROWS, 2 * count), len(unit)), np.float32)
            grown[:count] = self._vectors[:count] if count else 0.0
            self._vectors = grown
        self._vectors[count] = unit
        self._answers.append(answer)
        self._usefulness[answer.id] = _Usefulness(last_used=answer.id)
        self._tokens += answer.num_tokens
        self._next_id = answer.id + 1

    def _evict(self, tokens: int) -> None:
        """Forgets the least useful requests until at most so many tokens are left."""
        ranked = sorted(range(len(self._answers)), key=lambda i: self._usefulness[self._answers[i].id].rank)
        dropped = set()
        for i in ranked:
            if self._tokens <= tokens:
                break
            dropped.add(i)
            self._tokens -= self._answers[i].num_tokens
        kept = [i for i in range(len(self._answers)) if i not in dropped]
        self._vectors[: len(kept)] = self._vectors[kept]
        self._answers = [self._answers[i] for i in kept]
        self._usefulness = {answer.id: self._usefulness[answer.id] for answer in self._answers}
        for useful in self._usefulness.values():
            useful.accepted //= 2


def _unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The vector (D,) scaled to length one, float32; None where that is impossible."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / length).astype(np.float32) if np.isfinite(length) and length > 0 else None

"""Search for the vectors nearest to a given one by cosine. This module does not know what the vectors stand for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np

EXACT_VECTORS = 100_000  # so many are compared one by one
_BLOCK = 1024  # rows that are moved at a time
_SPARE = 64  # rows beyond those in use that are always worth having
_SAME = 1e-6  # cosines that differ by less are the same, but for rounding
_LINKS, _BUILD_EFFORT, _SEARCH_EFFORT = 16, 128, 64  # M, efConstruction and ef of arXiv 1603.09320


class ExactIndex:
    """Vectors (D,) of length one, each with a number. A search compares the given vector with all of them."""

    def __init__(self) -> None:
        self._numbers = np.empty(0, np.int64)
        self._vectors = np.empty((0, 0), np.float32)  # (rows, D), of which the first `_count` are in use
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Memory of vectors and numbers, spare rows included."""
        return self._vectors.nbytes + self._numbers.nbytes

    def add(self, number: int, unit: np.ndarray[Any, Any]) -> None:
        """Adds a vector (D,) of length one under a number that is not in use."""
        if not self._count:
            self._vectors = np.empty((0, len(unit)), np.float32)
        if self._count == len(self._vectors):
            self._resize(self._count + max(_SPARE, self._count // 4))
        self._vectors[self._count] = unit
        self._numbers[self._count] = number
        self._count += 1

    def remove(self, numbers: Collection[int]) -> None:
        """Removes the vectors with these numbers, and frees their memory where it is much."""
        kept = np.flatnonzero(~np.isin(self._numbers[: self._count], np.fromiter(numbers, np.int64, len(numbers))))
        for start in range(0, len(kept), _BLOCK):  # in place: a copy of all vectors might not fit
            rows = kept[start : start + _BLOCK]
            self._vectors[start : start + len(rows)] = self._vectors[rows]
            self._numbers[start : start + len(rows)] = self._numbers[rows]
        self._count = len(kept)
        if len(self._vectors) > 2 * (self._count + _SPARE):
            self._resize(self._count + _SPARE)

    def search(self, unit: np.ndarray[Any, Any], k: int) -> list[tuple[int, float]]:
        """Numbers and cosines of the at most k vectors nearest to (D,); nearest first, the higher number among equals.

        The product is einsum's: a BLAS library's own threads would spin for a while on the cores that kernels need.
        """
        if not self._count:
            return []
        cosines = np.einsum("ij,j->i", self._vectors[: self._count], unit)  # (N,)
        least = np.partition(cosines, -k)[-k] - _SAME if self._count > k else -np.inf
        best = np.flatnonzero(cosines >= least)
        return _nearest_first(zip(self._numbers[best].tolist(), cosines[best].tolist(), strict=True))[:k]

    def _resize(self, rows: int) -> None:
        # In place, where numpy's `resize` asks the system to move the pages; no view of these arrays is ever given out.
        self._vectors.resize((rows, self._vectors.shape[1]), refcheck=False)
        self._numbers.resize(rows, refcheck=False)


class GraphIndex:
    """Vectors (D,) of length one in a graph of near ones (HNSW, arXiv 1603.09320), by hnswlib.

    A search walks the graph, so it takes about a millisecond however many there are, and can miss a near one.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        import hnswlib

        self._index = hnswlib.Index("ip", width)
        self._index.init_index(_BLOCK, _BUILD_EFFORT, _LINKS, allow_replace_deleted=True)
        self._numbers: set[int] = set()
        self._vector_bytes = 4 * width + 8 * _LINKS + 32

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def bytes(self) -> int:
        """Memory of vectors and graph, spare rows included."""
        return int(self._index.get_max_elements()) * self._vector_bytes

    def add(self, number: int, unit: np.ndarray[Any, Any]) -> None:
        """Adds a vector (D,) of length one under a number that is not in use."""
        rows = self._index.get_max_elements()
        if len(self._numbers) == rows:
            self._index.resize_index(rows + rows // 4)
        self._index.add_items(unit, number, num_threads=1, replace_deleted=True)
        self._numbers.add(number)

    def remove(self, numbers: Collection[int]) -> None:
        """Removes those of the vectors with these numbers that it has; others take their places later."""
        for number in self._numbers.intersection(numbers):
            self._index.mark_deleted(number)
            self._numbers.discard(number)

    def search(self, unit: np.ndarray[Any, Any], k: int) -> list[tuple[int, float]]:
        """Numbers and cosines of about the k vectors nearest to (D,), nearest first."""
        self._index.set_ef(max(_SEARCH_EFFORT, k))
        found = min(k, len(self._numbers))
        while found:
            try:
                numbers, distances = self._index.knn_query(unit, found, num_threads=1)
                return _nearest_first(zip(numbers[0].tolist(), (1.0 - distances[0]).tolist(), strict=True))
            except RuntimeError:  # the walk met fewer, as removed ones are in its way
                found //= 2
        return []


class VectorIndex:
    """Vectors (D,) of length one, each with a number, of which as many as is quick are compared exactly.

    More than these go into a graph where hnswlib is installed. Not safe for threads by itself.

    Args:
        exact_vectors: how many are compared exactly.
    """

    def __init__(self, exact_vectors: int = EXACT_VECTORS) -> None:
        self._exact = ExactIndex()
        self._graph: GraphIndex | None = None
        self._exact_vectors = exact_vectors if find_spec("hnswlib") is not None else None

    def __len__(self) -> int:
        return len(self._exact) + (len(self._graph) if self._graph is not None else 0)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._exact.bytes + (self._graph.bytes if self._graph is not None else 0)

    def add(self, number: int, unit: np.ndarray[Any, Any]) -> None:
        """Adds a vector (D,) of length one under a number that is not in use."""
        if self._exact_vectors is None or len(self._exact) < self._exact_vectors:
            self._exact.add(number, unit)
            return
        if self._graph is None:
            self._graph = GraphIndex(len(unit))
        self._graph.add(number, unit)

    def remove(self, numbers: Collection[int]) -> None:
        """Removes the vectors with these numbers."""
        self._exact.remove(numbers)
        if self._graph is not None:
            self._graph.remove(numbers)

    def search(self, unit: np.ndarray[Any, Any], k: int) -> list[tuple[int, float]]:
        """Numbers and cosines of the at most k vectors nearest to (D,), as `ExactIndex.search` gives them."""
        found = self._exact.search(unit, k)
        return found if self._graph is None else _nearest_first([*found, *self._graph.search(unit, k)])[:k]


def _nearest_first(found: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return sorted(found, key=lambda each: (-round(each[1] / _SAME), -each[0]))

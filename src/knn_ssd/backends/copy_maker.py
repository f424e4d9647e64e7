"""Makes the 4-bit copies of a model's matrices, for any backend: while the caller waits, or in the background.

In the background they are made in small parts, one between two forward passes while requests run, and without a pause
while none runs. What is made is the same in either way.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from knn_ssd.backends.background import BackgroundWork
from knn_ssd.backends.kept_copies import kept_copies
from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import Matrix
from knn_ssd.kernels.quantisation import PART_ROWS, copy_forms, empty_copy, low_matrix, quantise_rows
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

# Copies of fewer weights are made at once: that takes one or two seconds, which drafts save in the first long answer.
BACKGROUND_WEIGHTS = 200_000_000
_PARTS = 256  # of the work, one between two forward passes


def names_of_copy(matrix_name: str) -> tuple[str, str]:
    """The names of the levels and the scales of a matrix's copy."""
    return f"{matrix_name}.levels", f"{matrix_name}.scales"


class CopyMaker:
    """Makes the copies of a model's matrices, each once, and holds them.

    Without a weight cache those are made that are asked for. With one, the first that asks for any takes all from
    there, or has all of them made and left there for the next start.

    Args:
        matrices: all that can be copied, by name.
        importance: gives the importance (cols,) of a matrix's columns, by its name.
        cache: where copies are kept; None keeps none.
        keys: under which they may be kept there, in order of preference. Those made here are kept under the last one.
        is_busy: whether requests are running.
        turn: held while a part of a copy is made.

    Attributes:
        tensors: levels and scales made or read so far, by `names_of_copy`.
        failed: whether making copies in the background has failed; it is not tried again.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        importance: Callable[[str], torch.Tensor],
        cache: WeightCache | None,
        keys: Sequence[str],
        is_busy: Callable[[], bool],
        turn: AbstractContextManager[object],
    ) -> None:
        self._matrices, self._importance = matrices, importance
        self._cache, self._keys = cache, keys
        self._turn = turn
        self._background = BackgroundWork(is_busy)
        self._lock = threading.Lock()
        self._arena = Arena()
        self._part_weights = self._num_weights(matrices) // _PARTS
        self.tensors: dict[str, torch.Tensor] = {}
        self.failed = False

    @property
    def is_kept(self) -> bool:
        """Whether there is a weight cache."""
        return self._cache is not None

    @property
    def is_making(self) -> bool:
        """Whether copies are being made in the background."""
        return self._background.is_running

    @property
    def bytes(self) -> int:
        """Memory of all copies made or read so far."""
        return sum(tensor.nbytes for tensor in list(self.tensors.values()))

    @property
    def total_bytes(self) -> int:
        """Memory of the copies of all matrices."""
        forms = [form for matrix in self._matrices.values() for form in copy_forms(matrix)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms)

    def matrix(self, name: str) -> Matrix:
        """The copy of a matrix, which was made."""
        levels, scales = names_of_copy(name)
        return low_matrix(self._matrices[name], self.tensors[levels], self.tensors[scales])

    def prepare(self, names: Iterable[str], progress: Progress) -> None:
        """Makes the copies of these matrices that are not there yet.

        Args:
            names: the names of the matrices.
            progress: receives a stage if copies are made, with a step for each matrix.
        """
        names = list(names)
        if self.tensors and not self._missing(names):
            return  # they may still be on their way to the weight cache
        with self._lock:
            self._background.stop()
            self._make_now(self._take_kept(names), progress)

    def prepare_later(self, names: Iterable[str], progress: Progress) -> bool:
        """Whether the copies of these matrices are there. If not, they are made in the background from now on; but few
        are made at once, and kept ones are read at once.

        Args:
            names: the names of the matrices.
            progress: receives a stage if copies are made at once.
        """
        if self.is_making or self.failed or not self._lock.acquire(blocking=False):  # another thread makes them
            return not self._missing(names)
        try:
            missing = self._take_kept(names)
            if missing and self._num_weights(missing) >= BACKGROUND_WEIGHTS:
                if not self.is_making:
                    logger.info("4-bit copies are being made, and drafts use them as soon as they are there")
                    self._background.start(self._make_guarded(missing))
                return False
            self._make_now(missing, progress)
            return True
        finally:
            self._lock.release()

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Replaces all copies, and returns those of before.

        Args:
            tensors: levels and scales of every matrix.
        """
        with self._lock:
            self._background.stop()
            before, self.tensors = self.tensors, dict(tensors)
            return before

    def keep(self, key: str) -> None:
        """Stores the copies under a key in the weight cache, if there is one."""
        if self._cache is not None:
            self._cache.store(key, self.tensors)

    def _take_kept(self, names: Iterable[str]) -> list[str]:
        """Takes the best kept copies if there are none yet; returns the names of those that are still missing."""
        if self._cache is not None and not self.tensors:
            named = {names_of_copy(name): matrix for name, matrix in self._matrices.items()}
            self.tensors = kept_copies(self._cache, self._keys, named)
        return self._missing(names)

    def _missing(self, names: Iterable[str]) -> list[str]:
        wanted = names if self._cache is None else self._matrices
        return [name for name in wanted if names_of_copy(name)[0] not in self.tensors]

    def _num_weights(self, names: Iterable[str]) -> int:
        return sum(self._matrices[name].rows * self._matrices[name].cols for name in names)

    def _make_now(self, missing: Sequence[str], progress: Progress) -> None:
        for _ in self._make(missing, progress):
            pass

    def _make_guarded(self, missing: Sequence[str]) -> Iterator[None]:
        try:
            yield from self._make(missing, NoProgress())
        except Exception as error:
            self.failed = True
            logger.warning("Drafts go on without 4-bit weights, whose copies cannot be made: %s", error)

    def _make(self, missing: Sequence[str], progress: Progress) -> Iterator[None]:
        """Makes copies part by part, and keeps them."""
        if not missing:
            return
        progress.stage("making 4-bit copies", len(missing))
        done = 0  # weights of this part
        for name in missing:
            for count in self._make_copy(name):
                done += count
                if done >= self._part_weights:
                    done = 0
                    yield
            progress.advance()
        if self._cache is not None:
            self.keep(self._keys[-1])

    def _make_copy(self, name: str) -> Iterator[int]:
        """Makes a copy, and gives the number of weights after each part."""
        matrix, importance = self._matrices[name], self._importance(name)
        copy = empty_copy(matrix, self._arena)
        step = -(-self._part_weights // (matrix.cols * PART_ROWS)) * PART_ROWS or PART_ROWS
        for first in range(0, matrix.rows, step):
            rows = range(first, min(first + step, matrix.rows))
            with self._turn:
                quantise_rows(matrix, importance, rows, *copy)
            yield len(rows) * matrix.cols
        self.tensors.update(zip(names_of_copy(name), copy, strict=True))

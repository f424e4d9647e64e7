"""Which KV caches fit into memory: admission before a prompt runs, and a check before a cache grows.

A session is refused at its start if its longest output could never fit, and if the memory of its first tokens is not
free now. Beyond that, outputs are expected to be shorter than they may be: memory is not held for them, and a cache
that finds none when it grows ends its request. So many sessions run side by side, and none ends the process.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from knn_ssd.errors import MemoryInUseError, MemoryLimitError
from knn_ssd.tools.memory import FreeMemory, free_memory, size

if TYPE_CHECKING:
    from knn_ssd.backends.copy_maker import CopyMaker
    from knn_ssd.backends.cursor import Cursor

_LAST_GROWTH = 2 / 3  # the largest part of a cache's final size from which it grows
_LOW_BIT_BYTES = 0.5625  # of a weight: 4 bits, and in each group of 64 a scale and a zero in bfloat16
_WORTHWHILE = 0.7  # of the matrices' memory: larger copies are hardly quicker to read
_CAUTION = 0.9  # of the tokens that fit now, where the limit is ours to choose: less may be free in a moment


def low_bit_waste(num_weights: int, matrix_bytes: int) -> str | None:
    """None if 4-bit copies of matrices are much smaller than these, else the arithmetic.

    Args:
        num_weights: the weights of the matrices.
        matrix_bytes: memory of the matrices; those of a 4-bit file are as small as the copies.
    """
    copy_bytes = _LOW_BIT_BYTES * num_weights
    if copy_bytes <= _WORTHWHILE * matrix_bytes:
        return None
    return f"4-bit copies would take {size(copy_bytes)}, and the weights take {size(matrix_bytes)}"


@dataclass(slots=True)
class MemoryAdmission:
    """Keeps the KV caches of one backend's sessions within the memory that is free. Threads can share it.

    Args:
        weight_bytes: memory of the model's weights.
        token_bytes: memory of one token in a KV cache.
        copy_bytes: the part of it that is there twice while a cache grows.
        free: measures the free memory; None of it is not limited.
        copies: the 4-bit copies of the weights, whose memory is set aside while they are being made; None where there
            are none.
    """

    weight_bytes: int
    token_bytes: int
    copy_bytes: int = 0
    free: Callable[[], FreeMemory | None] = free_memory
    copies: CopyMaker | None = None
    _cursors: weakref.WeakSet[Cursor] = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def low_bit_bytes(self) -> int:
        """Memory of 4-bit copies of all weights."""
        return self.copies.total_bytes if self.copies is not None else 0

    def is_busy(self) -> bool:
        """Whether a session is open."""
        with self._lock:
            return bool(self._open())

    def low_bit_shortage(self) -> str | None:
        """None if there is memory for the 4-bit copies now, else the arithmetic."""
        free = self.free()
        if free is None or self.low_bit_bytes <= free.bytes:
            return None
        copies = f"4-bit copies take {size(self.low_bit_bytes)} of memory"
        return f"{copies}, beside {size(self.weight_bytes)} of weights; {free}"

    def admit(self, cursor: Cursor) -> None:
        """Admits a new session.

        Raises:
            MemoryLimitError: its capacity does not fit into memory.
            MemoryInUseError: it does, but not now, beside other sessions.
        """
        with self._lock:
            if (free := self._free()) is not None:
                if cursor.capacity * self._peak_bytes > free.bytes + self._held:
                    raise MemoryLimitError(self._sentence(cursor.capacity, free), self._remedy(free))
                self._take(cursor, cursor.reserved, cursor.reserved * self.token_bytes, free)
            self._cursors.add(cursor)

    def grow(self, cursor: Cursor, tokens: int) -> None:
        """Admits the growth of a session's KV cache to `tokens`.

        Raises:
            MemoryLimitError: there is no memory for it.
            MemoryInUseError: there would be without the other sessions.
        """
        with self._lock:
            if (free := self._free()) is not None:
                more = (tokens - cursor.reserved) * self.token_bytes + cursor.length * self.copy_bytes
                self._take(cursor, tokens, more, free)

    def most_tokens(self, context_length: int) -> int:
        """The most tokens of a session that fits into memory if it is the only one, at most those of the context."""
        free = self._free()
        with self._lock:
            return context_length if free is None else min(context_length, int(_CAUTION * self._fitting(free)))

    def _free(self) -> FreeMemory | None:
        """The free memory without what copies will take that are being made."""
        free = self.free()
        if free is None or self.copies is None or not self.copies.is_making:
            return free
        return replace(free, bytes=max(0, free.bytes - self.copies.total_bytes + self.copies.bytes))

    def _take(self, cursor: Cursor, tokens: int, num_bytes: int, free: FreeMemory) -> None:
        promised = sum(each.reserved - each.length for each in self._open()) * self.token_bytes
        if num_bytes > free.bytes - promised:
            kind = MemoryInUseError if any(each is not cursor for each in self._open()) else MemoryLimitError
            raise kind(self._sentence(tokens, free), self._remedy(free))

    @property
    def _peak_bytes(self) -> float:
        """Memory of a token in the moment in which a cache grows for the last time."""
        return self.token_bytes + _LAST_GROWTH * self.copy_bytes

    @property
    def _held(self) -> int:
        """Memory that open sessions have written to."""
        return sum(each.length for each in self._open()) * self.token_bytes

    def _open(self) -> list[Cursor]:
        return [each for each in self._cursors if each.reserved]

    def _fitting(self, free: FreeMemory) -> int:
        return max(0, int((free.bytes + self._held) / self._peak_bytes))

    def _sentence(self, tokens: int, free: FreeMemory) -> str:
        """The arithmetic of a refusal."""
        peak = self._peak_bytes
        held = f", and {size(self._held)} are held by other requests" if self._held else ""
        return (
            f"the KV cache of {tokens} tokens takes up to {size(tokens * peak)} of memory at {size(peak)} a token, "
            f"beside {size(self.weight_bytes)} of weights; {free}{held}"
        )

    def _remedy(self, free: FreeMemory) -> str:
        return f"Ask for fewer new tokens: prompt and output may have {self._fitting(free)} tokens together."

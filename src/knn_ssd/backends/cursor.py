"""The cursor of a KV cache: how many tokens are committed, what may be committed next, how it is rewound and grows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from knn_ssd.backends.admission import MemoryAdmission
from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan

CHUNK_TOKENS = 512  # for which memory is reserved at first, and beyond a prompt: most outputs end before


class Cursor:
    """The rules of a session's KV cache, the same for every backend.

    Args:
        capacity: how many tokens the session can hold.
        admission: decides whether there is memory for them; None does not look.

    Attributes:
        reserved: for how many of them the KV cache should have memory now; 0 once the session is closed.

    Raises:
        MemoryLimitError: there is no memory.
    """

    def __init__(self, capacity: int, admission: MemoryAdmission | None = None) -> None:
        self.length = 0
        self.capacity = capacity
        self.reserved = min(capacity, CHUNK_TOKENS)
        self._pending = 0  # rows of the last forward pass that can be committed
        self._pending_plan: Plan | None = None
        self._draft_plan: Plan | None = None  # under which the tokens beyond `_verified` were drafted
        self._verified = 0
        self._admission = admission
        if admission is not None:
            admission.admit(self)

    @property
    def verified(self) -> int:
        """How many of the committed tokens were run by the full model, not by a draft."""
        return self._verified

    def check_room(self, count: int) -> None:
        """Raises a `UsageError` where `count` more tokens do not fit."""
        if self.length + count > self.capacity:
            raise UsageError(f"a session opened for {self.capacity} tokens was given {self.length + count}")

    def make_room(self, count: int, ahead: int = 0) -> None:
        """Reserves memory for `count` more tokens, and for `ahead` further ones as far as the capacity allows.

        Each growth adds at least half of what there was, so an output of n tokens copies fewer than 3 n. Where the
        capacity is no more than another half away, all of it is reserved.

        Raises:
            UsageError: the tokens do not fit into the capacity.
            MemoryLimitError: there is no memory for them.
        """
        self.check_room(count)
        if min(self.length + count + ahead, self.capacity) > self.reserved:
            more = max(self.length + count + CHUNK_TOKENS, 3 * self.reserved // 2)
            more = self.capacity if self.capacity <= 3 * more // 2 else more
            if self._admission is not None:
                self._admission.grow(self, more)
            self.reserved = more

    def close(self) -> None:
        """Reserves nothing any more: the KV cache was freed."""
        self.reserved = 0

    def check(self, plan: Plan | None) -> None:
        """Checks a forward pass before it runs: under another plan than the drafted tokens', layers that were skipped
        so far would read stale keys.
        """
        drafted = self.length > self._verified
        assert not drafted or plan == self._draft_plan, "one drafting run has one plan, and is rewound before verifying"

    def ran(self, count: int, plan: Plan | None) -> None:
        """Notes a forward pass over `count` tokens at the cursor."""
        self._pending, self._pending_plan = count, plan

    def commit(self, count: int) -> None:
        """Moves over the first `count` tokens of the last forward pass."""
        assert 0 <= count <= self._pending, f"{count} tokens to commit, {self._pending} run"
        self.length += count
        self._pending -= count
        self._draft_plan = self._pending_plan
        if self._pending_plan is None:
            self._verified = self.length

    def rewind(self, length: int) -> None:
        """Moves back to `length`."""
        assert 0 <= length <= self.length, f"cannot rewind from {self.length} to {length}"
        self.length = length
        self._verified = min(self._verified, length)
        self._pending = 0


class CursorSession:
    """The half of a session that its cursor alone decides; see `base.Session`."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    @property
    def length(self) -> int:
        return self._cursor.length

    @property
    def capacity(self) -> int:
        return self._cursor.capacity

    def commit(self, count: int) -> None:
        self._cursor.commit(count)

    def rewind(self, length: int) -> None:
        self._cursor.rewind(length)

    @contextmanager
    def rewound(self, count: int) -> Iterator[None]:
        length = self._cursor.length
        assert 0 <= count <= length, f"cannot rewind {count} tokens of {length}"
        self._cursor.length -= count
        try:
            yield
        finally:
            self._cursor.length = length

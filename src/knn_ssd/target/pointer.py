"""A session's pointer: how many tokens are committed, and what may happen to those beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan


class Pointer:
    """The rules of a session's cache, the same for every target.

    Args:
        capacity: how many tokens the session can hold.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._pending = 0  # rows of the last pass that can be committed
        self._pending_plan: Plan | None = None
        self._draft_plan: Plan | None = None  # under which the tokens beyond `_verified` were drafted
        self._verified = 0

    @property
    def verified(self) -> int:
        """How many of the committed tokens the full model ran."""
        return self._verified

    def check_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise UsageError(f"a session opened for {self.capacity} tokens was given {self.length + count}")

    def check(self, plan: Plan | None) -> None:
        """Before a pass: under another plan, layers that were skipped so far would read stale keys."""
        drafted = self.length > self._verified
        assert not drafted or plan == self._draft_plan, "one drafting run has one plan, and is rewound before verifying"

    def ran(self, count: int, plan: Plan | None) -> None:
        """After a pass over `count` tokens at the pointer."""
        self._pending, self._pending_plan = count, plan

    def commit(self, count: int) -> None:
        assert 0 <= count <= self._pending, f"{count} tokens to commit, {self._pending} run"
        self.length += count
        self._pending -= count
        self._draft_plan = self._pending_plan
        if self._pending_plan is None:
            self._verified = self.length

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length, f"cannot rewind from {self.length} to {length}"
        self.length = length
        self._verified = min(self._verified, length)
        self._pending = 0


class Pointed:
    """What a session does with its pointer alone: the half of `contract.Session` that every target shares."""

    def __init__(self, capacity: int) -> None:
        self._pointer = Pointer(capacity)

    @property
    def length(self) -> int:
        return self._pointer.length

    @property
    def capacity(self) -> int:
        return self._pointer.capacity

    def commit(self, count: int) -> None:
        self._pointer.commit(count)

    def rewind(self, length: int) -> None:
        self._pointer.rewind(length)

    @contextmanager
    def looking_back(self, count: int) -> Iterator[None]:
        length = self._pointer.length
        assert 0 <= count <= length, f"cannot look back {count} tokens of {length}"
        self._pointer.length -= count
        try:
            yield
        finally:
            self._pointer.length = length

"""A prefix cache: the KV cache of earlier sessions, for prompts with the same first tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MIN_LENGTH = 16  # tokens; copying the KV cache of fewer saves no time


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """What a session computed for its first committed tokens.

    Args:
        token_ids: the n tokens.
        cache: the tensors of the session's KV cache up to n, (L, kv_heads, n, …) each.
        hidden: (n, D) hidden states after the final norm.
    """

    token_ids: tuple[int, ...]
    cache: tuple[torch.Tensor, ...]
    hidden: torch.Tensor

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(part.nbytes for part in self.cache) + self.hidden.nbytes

    def copy(self) -> CachedPrefix:
        """A copy that shares no memory with this one."""
        parts = (*self.cache, self.hidden)
        *cache, hidden = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        return CachedPrefix(self.token_ids, tuple(cache), hidden)


class PrefixCache:
    """A bounded store of prefixes, from which the least recently used are evicted first. Threads can share it.

    Args:
        max_bytes: memory that all prefixes together may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: tuple[CachedPrefix, ...] = ()  # the least recently used first; replaced, never changed
        self._lock = threading.Lock()  # held while it is replaced

    @property
    def bytes(self) -> int:
        """Memory of all prefixes."""
        return _bytes(self._kept)

    def find(self, token_ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The prefix that shares the most first tokens with these, and how many; None if they are too few.

        The prefix stays valid for the caller when it is evicted meanwhile.
        """
        kept = self._kept
        lengths = [_common_length(prefix.token_ids, token_ids) for prefix in kept]
        longest = max(lengths, default=0)
        if longest < MIN_LENGTH:
            return None
        prefix = kept[lengths.index(longest)]
        with self._lock:
            if prefix in self._kept:
                self._kept = (*(p for p in self._kept if p is not prefix), prefix)
        return prefix, longest

    def wants(self, token_ids: Sequence[int], num_bytes: int) -> bool:
        """Whether a prefix of these tokens, which takes `num_bytes`, is worth keeping; if so, makes room for it."""
        with self._lock:
            return self._make_room(token_ids, num_bytes)

    def add(self, prefix: CachedPrefix) -> None:
        """Keeps a prefix, unless another thread has added the same tokens since `wants`."""
        with self._lock:
            if self._make_room(prefix.token_ids, prefix.bytes):
                self._kept = (*self._kept, prefix)

    def _make_room(self, token_ids: Sequence[int], num_bytes: int) -> bool:
        if len(token_ids) < MIN_LENGTH or num_bytes > self.max_bytes:
            return False
        shared = [_common_length(prefix.token_ids, token_ids) for prefix in self._kept]
        if len(token_ids) in shared:
            return False
        kept = [p for p, length in zip(self._kept, shared, strict=True) if length < len(p.token_ids)]
        while kept and _bytes(kept) + num_bytes > self.max_bytes:
            kept.pop(0)
        self._kept = tuple(kept)
        return True


def _bytes(prefixes: Sequence[CachedPrefix]) -> int:
    return sum(prefix.bytes for prefix in prefixes)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

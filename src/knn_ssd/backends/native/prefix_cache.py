"""Keys and values that earlier sessions computed, for prompts that begin as theirs did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LEAST_LENGTH = 16  # tokens that are worth a copy


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """What a session computed for the tokens it committed.

    Args:
        token_ids: n of them.
        cache: keys and values, (L, kv_heads, n, …) each, as the session has them.
        hidden: (n, D) after the final norm.
    """

    token_ids: tuple[int, ...]
    cache: tuple[torch.Tensor, ...]
    hidden: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.cache) + self.hidden.nbytes

    def copy(self) -> CachedPrefix:
        """The same, sharing no memory."""
        parts = (*self.cache, self.hidden)
        *cache, hidden = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        return CachedPrefix(self.token_ids, tuple(cache), hidden)


class PrefixCache:
    """A bounded store of prefixes; the least recently used go first.

    Args:
        most_bytes: what all of them together may take.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: list[CachedPrefix] = []  # the least recently used first

    @property
    def bytes(self) -> int:
        return sum(prefix.bytes for prefix in self._kept)

    def find(self, token_ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The prefix that has the most first tokens in common with these, and how many."""
        lengths = [_common(prefix.token_ids, token_ids) for prefix in self._kept]
        longest = max(lengths, default=0)
        if longest < LEAST_LENGTH:
            return None
        prefix = self._kept.pop(lengths.index(longest))
        self._kept.append(prefix)
        return prefix, longest

    def wants(self, token_ids: Sequence[int], num_bytes: int) -> bool:
        """Whether tokens whose prefix takes so much are worth keeping; makes room for it if they are."""
        if len(token_ids) < LEAST_LENGTH or num_bytes > self.most_bytes:
            return False
        if any(_common(prefix.token_ids, token_ids) == len(token_ids) for prefix in self._kept):
            return False
        self._kept = [p for p in self._kept if _common(p.token_ids, token_ids) < len(p.token_ids)]
        while self._kept and self.bytes + num_bytes > self.most_bytes:
            self._kept.pop(0)
        return True

    def add(self, prefix: CachedPrefix) -> None:
        """Keeps what was wanted."""
        self._kept.append(prefix)


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    pairs = zip(some, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))

"""The owners of requests: each API key is one, so that no client can learn from its own requests what others asked."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from knn_ssd.backends.native.prefix_cache import PrefixCache
from knn_ssd.errors import UsageError
from knn_ssd.owner import Owner
from knn_ssd.routing.answers import DEFAULT_MAX_TOKENS, AnswerStore

SHARED = "shared"  # the name of the one owner of all requests
_NAME_DIGITS = 16  # of a key's hash

NewStore = Callable[[str, int], AnswerStore]
"""Makes the answer store of an owner, from the owner's name and the most tokens that it may keep."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Finds the owner of a request.

    Args:
        by_key: the owner that each API key belongs to; without any, requests need no key.
        everyone: the owner of requests that need no key.
    """

    by_key: Mapping[str, Owner] = field(default_factory=dict)
    everyone: Owner = field(default_factory=Owner)

    @classmethod
    def dividing(
        cls,
        prefix_cache_bytes: int = 0,
        new_store: NewStore | None = None,
        *,
        keys: Sequence[str] = (),
        shared: bool = False,
    ) -> Owners:
        """One owner for each API key, among which memory is divided equally; one for all without keys or if `shared`.

        Args:
            prefix_cache_bytes: memory of all prefix caches together; 0 makes none.
            new_store: makes an owner's answer store; None makes none.
            keys: the API keys.
            shared: all keys belong to one owner.
        """
        names = dict.fromkeys([SHARED] if shared or not keys else map(owner_name, keys))
        share, max_tokens = prefix_cache_bytes // len(names), DEFAULT_MAX_TOKENS // len(names)
        owners = {
            name: Owner(new_store and new_store(name, max_tokens), PrefixCache(share) if share else None)
            for name in names
        }
        if not keys:
            return cls(everyone=owners[SHARED])
        return cls({key: owners[SHARED if shared else owner_name(key)] for key in keys})

    def find(self, key: str) -> Owner | None:
        """The owner that an API key belongs to; None if there are keys and it is none of them.

        The time that this takes does not depend on which key is given, or on how much of it is right.
        """
        if not self.by_key:
            return self.everyone
        found, given = None, _digest(key)
        for own, owner in self.by_key.items():
            if hmac.compare_digest(given, _digest(own)):
                found = owner
        return found

    def close(self) -> None:
        """Closes the answer stores that are kept on disk, once no more requests run."""
        for owner in (self.everyone, *self.by_key.values()):
            if owner.answers is not None:
                owner.answers.close()


def owner_name(key: str) -> str:
    """The name of the owner that an API key belongs to: the first digits of the key's SHA-256, never the key itself."""
    return _digest(key).hex()[:_NAME_DIGITS]


def read_keys(text: str) -> tuple[str, ...]:
    """The API keys in a text, separated by commas or line breaks; an empty text has none.

    Raises:
        UsageError: the text is not empty and has no key.
    """
    keys = tuple(dict.fromkeys(filter(None, map(str.strip, re.split(r"[,\n]", text)))))
    if text and not keys:
        raise UsageError("the API keys are only commas and spaces", "Give at least one key, or leave them out.")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""A session of the native backend: the KV cache, the cursor and the forward passes of one request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from knn_ssd.backends.base import Forward, ForwardRequest, Prefill
from knn_ssd.backends.cursor import CHUNK_TOKENS, Cursor, CursorSession
from knn_ssd.backends.growth import grown
from knn_ssd.backends.native.kv_cache import KVCache
from knn_ssd.backends.native.prefix_cache import CachedPrefix, PrefixCache
from knn_ssd.plan import Plan

PREFILL_CHUNK = 64  # tokens of a prompt in one forward pass


class NativeSession(CursorSession):
    """One request on a `NativeBackend`, or on a `KernelBackend` of transformers; see `base.Session`.

    Args:
        cursor: at the start of the session.
        cache: an empty KV cache with the room that the cursor has reserved.
        hidden_size: the model's D.
        forward: function that runs a forward pass.
        prefix_cache: store in which the KV cache of prompts with the same first tokens is found and left.
    """

    def __init__(
        self,
        cursor: Cursor,
        cache: KVCache,
        hidden_size: int,
        forward: Forward,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        super().__init__(cursor)
        self.cache: KVCache | None = cache
        self._forward = forward
        self._prefix_cache = prefix_cache
        self._hidden = torch.empty(cache.capacity, hidden_size)  # hidden states of the tokens that the full model ran
        self._token_ids: list[int] = []  # those of the last forward pass included

    def prefill(self, token_ids: list[int]) -> Prefill:
        assert self.length == 0, "prefill is for an empty session"
        started = time.perf_counter()
        self._cursor.make_room(len(token_ids), ahead=CHUNK_TOKENS // 2)
        self._grow(kept=0)
        reused = self._reuse(token_ids[:-1])
        for start in range(reused, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            is_last = start + PREFILL_CHUNK >= len(token_ids)
            logits = self._run(chunk, None, num_logits=1 if is_last else 0)
            self._cursor.ran(len(chunk), None)
            self._cursor.commit(len(chunk))
        hidden = self._hidden[: len(token_ids)]
        mean = hidden.mean(dim=0, dtype=torch.float64).float()  # in one sum, so that reused rows change no bit
        return Prefill(logits[-1], mean, hidden[-1].clone(), time.perf_counter() - started, reused)

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        self._cursor.check(plan)
        logits = self._run(token_ids, plan, num_logits=len(token_ids))
        self._cursor.ran(len(token_ids), plan)
        return logits

    def teacher_forced_logits(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        self._cursor.check_room(len(token_ids))
        return self._forward(
            ForwardRequest(token_ids, self.length, self.cache, plan, len(token_ids), run_length)
        ).logits

    def close(self) -> None:
        self._keep()
        self.cache, self._hidden = None, torch.empty(0)
        self._cursor.close()

    def _run(self, token_ids: Sequence[int], plan: Plan | None, num_logits: int) -> torch.Tensor:
        self._cursor.make_room(len(token_ids))
        self._grow(kept=len(self._hidden))
        output = self._forward(ForwardRequest(token_ids, self.length, self.cache, plan, num_logits))
        self._token_ids[self.length :] = token_ids
        if plan is None:
            self._hidden[self.length : self.length + len(token_ids)] = output.hidden
        return output.logits

    def _grow(self, kept: int) -> None:
        """Gives the KV cache the room that the cursor has reserved, and keeps its first `kept` tokens."""
        cache, size = self.cache, self._cursor.reserved
        assert cache is not None, "the KV cache was freed, or could not grow"
        if size > cache.capacity:
            self.cache = None  # for good, if there is no memory
            cache.grow(size, kept)
            self.cache, self._hidden = cache, grown(self._hidden, 0, size, kept)

    def _reuse(self, token_ids: Sequence[int]) -> int:
        """Copies the KV cache of the longest cached prefix of these tokens; returns its length."""
        found = self._prefix_cache.find(token_ids) if self._prefix_cache is not None else None
        if found is None:
            return 0
        prefix, count = found
        assert self.cache is not None
        for own, kept in zip(self.cache.tensors, prefix.cache, strict=True):
            own[:, :, :count] = kept[:, :, :count]
        self._hidden[:count] = prefix.hidden[:count]
        self._token_ids = list(token_ids[:count])
        self._cursor.ran(count, None)
        self._cursor.commit(count)
        return count

    def _keep(self) -> None:
        """Adds the tokens that the full model ran to the prefix cache."""
        store, count = self._prefix_cache, self._cursor.verified
        if store is None or self.cache is None:
            return
        token_ids = tuple(self._token_ids[:count])
        prefix = CachedPrefix(token_ids, tuple(part[:, :, :count] for part in self.cache.tensors), self._hidden[:count])
        if store.wants(token_ids, prefix.bytes):
            store.add(prefix.copy())

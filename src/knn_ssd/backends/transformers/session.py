"""A session of the transformers backend: one request's KV cache and cursor."""

from __future__ import annotations

import time

import torch

from knn_ssd.backends.base import Forward, ForwardRequest, Prefill
from knn_ssd.backends.cursor import CHUNK_TOKENS, Cursor, CursorSession
from knn_ssd.backends.transformers.kv_cache import StaticCache
from knn_ssd.plan import Plan


class TransformersSession(CursorSession):
    """A session of a `TransformersBackend`; see `base.Session`.

    Args:
        num_layers: number of decoder layers.
        cursor: at the start of the session.
        forward: runs its forward passes.
    """

    def __init__(self, num_layers: int, cursor: Cursor, forward: Forward) -> None:
        super().__init__(cursor)
        self._cache = StaticCache(num_layers, self._cursor)
        self._forward = forward

    def prefill(self, token_ids: list[int]) -> Prefill:
        assert self.length == 0, "prefill is for an empty session"
        started = time.perf_counter()
        self._cursor.make_room(len(token_ids), ahead=CHUNK_TOKENS // 2)
        output = self._forward(ForwardRequest(token_ids, 0, self._cache, None, num_logits=1))
        hidden = output.hidden.float()  # (n, D)
        self._cursor.ran(len(token_ids), None)
        self.commit(len(token_ids))
        return Prefill(output.logits[-1], hidden.mean(dim=0), hidden[-1], time.perf_counter() - started)

    def forward(self, token_ids: list[int], plan: Plan | None = None) -> torch.Tensor:
        self._cursor.check(plan)
        self._cursor.make_room(len(token_ids))
        logits = self._forward(ForwardRequest(token_ids, self.length, self._cache, plan, len(token_ids))).logits
        self._cursor.ran(len(token_ids), plan)
        return logits

    def teacher_forced_logits(self, token_ids: list[int], plan: Plan, run_length: int) -> torch.Tensor:
        request = ForwardRequest(token_ids, self.length, self._cache, plan, len(token_ids), run_length)
        return self._forward(request).logits

    def close(self) -> None:
        self._cache.release()
        self._cursor.close()

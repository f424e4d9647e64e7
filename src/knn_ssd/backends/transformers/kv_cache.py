"""A KV cache with one cursor, behind the cache interface of transformers' models.

It knows nothing of plans: a skipped attention never calls `update`, and the verification writes its keys and values.
Sliding windows are left to the attention mask, so rewinding is exact in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.growth import grown


class StaticCache(Cache):
    """Keys and values of `num_layers` layers, with room for as many tokens as the cursor has reserved."""

    def __init__(self, num_layers: int, cursor: Cursor) -> None:
        self.cursor = cursor
        self.teacher_forcing = False
        super().__init__(layers=[_StaticLayer(self) for _ in range(num_layers)])

    @contextmanager
    def scoring(self, teacher_forced: bool) -> Iterator[None]:
        """For teacher-forced scoring, appends new keys and values to the cached ones without writing them to the cache,
        for the length of a `with` block.
        """
        self.teacher_forcing = teacher_forced
        try:
            yield
        finally:
            self.teacher_forcing = False

    @property
    def token_bytes(self) -> int:
        """Memory of one token in all layers that have run."""
        return sum(layer.token_bytes for layer in self.layers if isinstance(layer, _StaticLayer))

    def release(self) -> None:
        """Frees the memory."""
        self.layers = []


class _StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, allocated at the first update; a layer that is skipped grows when it runs again."""

    is_sliding = False

    def __init__(self, cache: StaticCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    @property
    def token_bytes(self) -> int:
        """Memory of one token; 0 before the first update."""
        return sum(part.nbytes // part.shape[2] for part in (self.keys, self.values) if part is not None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self._cache.cursor.reserved, states.shape[-1])  # (1, H, reserved, D)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache.cursor.check_room(key_states.shape[-2])
        start, end = self._cache.cursor.length, self._cache.cursor.length + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self._cache.teacher_forcing:  # the full model's, then the draft's: (1, H, end + n, D)
            return (
                torch.cat([self.keys[:, :, :end], key_states], dim=-2),
                torch.cat([self.values[:, :, :end], value_states], dim=-2),
            )
        if (room := self.keys.shape[2]) < end:
            self.keys, self.values = (
                grown(part, 2, self._cache.cursor.reserved, room) for part in (self.keys, self.values)
            )
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._cache.cursor.length

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # Early versions of transformers 5 give the positions of the new tokens instead of their number.
        count = query_length if isinstance(query_length, int) else len(query_length)
        return self._cache.cursor.length + count, 0

    def get_max_length(self) -> int:
        return self._cache.cursor.capacity

    get_max_cache_shape = get_max_length  # its name in early versions of transformers 5

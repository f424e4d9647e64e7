"""One static key/value cache with one pointer, in the shape that transformers' models expect of a cache.

It knows nothing of plans: a skipped attention simply never calls `update`, and what it would have written is
overwritten by the verification. Sliding windows are left to the attention mask, so rewinding is exact in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from knn_ssd.target.exactness import NO_PADDING, Padding
from knn_ssd.target.pointer import Pointer


class StaticCache(Cache):
    """Keys and values for each of `num_layers` layers, of as many tokens as the pointer has room for.

    Args:
        num_layers: how many layers.
        pointer: how many tokens are committed, and the most there can be.
        padding: the most that passes will be padded; room is made for the keys that they will be shown.
    """

    def __init__(self, num_layers: int, pointer: Pointer, padding: Padding = NO_PADDING) -> None:
        self.pointer = pointer
        self.room = padding.keys(pointer.capacity + padding.rows(1))
        self.rehearsing = False
        self.live: int | None = None  # rows of a padded pass that are tokens; their keys alone are written
        self._padding = NO_PADDING  # of that pass
        super().__init__(layers=[_StaticLayer(self) for _ in range(num_layers)])

    @contextmanager
    def padded(self, live: int, padding: Padding) -> Iterator[None]:
        """Within, a pass over `live` tokens and what they are padded with."""
        self.live, self._padding = (None if padding == NO_PADDING else live), padding
        try:
            yield
        finally:
            self.live = None

    def shown(self, rows: int) -> int:
        """How many keys a pass over that many rows is shown; in a padded pass, those past the pointer are masked."""
        if self.live is None:
            return self.pointer.length + rows
        # Were there as many as rows, transformers would take the pass for one from the start of the text.
        return self._padding.keys(max(self.pointer.length + self.live, rows + 1))

    def fill(self) -> None:
        """Copies of the committed keys and values, in another order, to everything beyond: finite, and nobody's."""
        length = self.pointer.length
        source = torch.arange(length, self.room) % length
        for layer in self.layers:
            assert isinstance(layer, _StaticLayer)
            assert layer.keys is not None
            assert layer.values is not None
            for states in (layer.keys, layer.values):
                states[:, :, length:] = states[:, :, source].flip(-1)

    def release(self) -> None:
        """Gives the memory back."""
        self.layers = []


class _StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, allocated when the first of them arrive."""

    is_sliding = False

    def __init__(self, cache: StaticCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Said of a padded pass: else transformers drops a single row's mask, and it would see dead keys."""
        return self._cache.live is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._cache.room, states.shape[-1])  # (1, H, room, D)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache, rows = self._cache, key_states.shape[-2]
        live = rows if cache.live is None else cache.live
        start, end = cache.pointer.length, cache.pointer.length + live
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if cache.rehearsing:  # the full model's tokens as they are, then the draft's: (1, H, end + n, D)
            return (
                torch.cat([self.keys[:, :, :end], key_states], dim=-2),
                torch.cat([self.values[:, :, :end], value_states], dim=-2),
            )
        self.keys[:, :, start:end] = key_states[:, :, :live]
        self.values[:, :, start:end] = value_states[:, :, :live]
        shown = cache.shown(rows)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def get_seq_length(self) -> int:
        return self._cache.pointer.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.shown(query_length), 0

    def get_max_length(self) -> int:
        return self._cache.pointer.capacity

"""Static KV caches: one behind the cache interface of transformers' models, and one that the kernels read.

They know nothing of plans: a skipped attention writes nothing, and the verification writes its keys and values. Sliding
windows are left to the attention mask, so rewinding is exact in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from knn_ssd.backends.cursor import Cursor
from knn_ssd.backends.growth import grown
from knn_ssd.backends.native.kv_cache import KVCache


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


class KernelCache(KVCache):
    """Keys and values of one session as the kernels read them: float32, each head padded with zeros.

    Args:
        shapes: (H, D) of each layer: heads of keys and values, and the larger of their sizes, padded.
        capacity: the most tokens that the cache can hold.

    Attributes:
        tensors: keys and values (1, H, capacity, D) of the first layer, of the second, and so on.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], capacity: int) -> None:
        self.capacity = capacity
        self.tensors = tuple(torch.empty(1, heads, capacity, size) for heads, size in shapes for _ in range(2))

    @property
    def num_layers(self) -> int:
        return len(self.tensors) // 2

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self.tensors[2 * index], self.tensors[2 * index + 1]

    def head_dim(self, index: int) -> int:
        """D of a layer."""
        return self.tensors[2 * index].shape[-1]

    def write(self, index: int, position: int, *states: torch.Tensor) -> None:
        """Writes keys and values (1, H, n, ≤ D) of a layer from a position on."""
        for cached, new in zip(self.layer(index), states, strict=True):
            width = new.shape[3]
            rows = cached[:, :, position : position + new.shape[2]]
            if width < cached.shape[3]:
                rows[..., width:] = 0  # the padding
                rows = rows[..., :width]
            rows.copy_(new)

    def padded(self, index: int, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, H, n, ≤ D), padded to (1, H, n, D) without writing them to the cache."""
        keys, values = (nn.functional.pad(new, (0, self.head_dim(index) - new.shape[3])).contiguous() for new in states)
        return keys, values

"""The native backend's KV cache: float32 keys and values, and 8-bit copies of them for drafts."""

from __future__ import annotations

import torch

from knn_ssd.backends.base import ForwardRequest
from knn_ssd.backends.growth import grown
from knn_ssd.kernels.arena import large_pages
from knn_ssd.kernels.binding import BatchEntry, address


class KVCache:
    """Keys and values of one session, in the order in which the kernels take them.

    The 8-bit copies, with a scale for each vector, are what 4-bit attention sublayers read and write (after arXiv
    2502.10424). With long prompts or large batches, a draft would otherwise read as many bytes of keys and values as of
    weights.

    Args:
        num_layers, kv_heads, head_dim: sizes of the model.
        capacity: the number of tokens that it has room for at first.

    Attributes:
        capacity: the number of tokens that it has room for now.
        tensors: keys and values (L, kv_heads, capacity, head_dim) in float32, then in int8, then the scales of these
            (L, kv_heads, capacity) in float32.
    """

    def __init__(self, num_layers: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self.capacity = capacity
        vectors = (num_layers, kv_heads, capacity)
        shapes = ((*vectors, head_dim), torch.float32), ((*vectors, head_dim), torch.int8), (vectors, torch.float32)
        self.tensors: tuple[torch.Tensor, ...] = tuple(
            large_pages(torch.empty(shape, dtype=dtype)) for shape, dtype in shapes for _ in range(2)
        )

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Memory of one token: in all tensors, and in the largest of them."""
        parts = [part.nbytes // self.capacity for part in self.tensors]
        return sum(parts), max(parts)

    def batch_entry(self, request: ForwardRequest, tables: tuple[torch.Tensor, torch.Tensor]) -> BatchEntry:
        """A request's rows in the form that the kernels take.

        Args:
            request: rows of the session whose cache this is.
            tables: cosines and sines of the rotary embedding.
        """
        tensors = map(address, (*tables, *self.tensors))
        return BatchEntry(*tensors, self.capacity, request.position, request.run_length, len(request.token_ids))

    def grow(self, capacity: int, kept: int) -> None:
        """Makes room for `capacity` tokens in all and keeps the first `kept`. One tensor after the other, so that only
        one of them is there twice; so the cache is lost if there is no memory for one.
        """
        parts, self.tensors = list(self.tensors), ()
        for index in range(len(parts)):
            parts[index] = grown(parts[index], 2, capacity, kept)
        self.tensors, self.capacity = tuple(parts), capacity

"""The native backend's KV cache: keys and values in float32 or bfloat16, and 8-bit copies of them for drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from knn_ssd.backends.base import ForwardRequest
from knn_ssd.backends.growth import grown
from knn_ssd.kernels.arena import large_pages
from knn_ssd.kernels.binding import BFLOAT16, FLOAT32, BatchEntry, address

KV_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}  # as the kernels call them


class KVCache:
    """Keys and values of one session, in the order in which the kernels take them.

    The 8-bit copies, with a scale for each vector, are what 4-bit attention sublayers read and write (after arXiv
    2502.10424). With long prompts or large batches, a draft would otherwise read as many bytes of keys and values as of
    weights.

    In bfloat16, keys and values are rounded when they are computed and before anything attends to them. So a row still
    has the same bits in any block, but no longer those of the model in float32.

    Args:
        num_layers, kv_heads, head_dim: sizes of the model.
        capacity: the number of tokens that it has room for at first.
        dtype: of keys and values, float32 or bfloat16.

    Attributes:
        capacity: the number of tokens that it has room for now.
        tensors: keys and values (L, kv_heads, capacity, head_dim) in the dtype, then in int8, then the scales of these
            (L, kv_heads, capacity) in float32.
    """

    def __init__(
        self, num_layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.capacity = capacity
        vectors = (num_layers, kv_heads, capacity)
        shapes = ((*vectors, head_dim), dtype), ((*vectors, head_dim), torch.int8), (vectors, torch.float32)
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
        return self._entry((*tables, *self.tensors), request.position, request.run_length, len(request.token_ids))

    def layer_entry(self, layer: int, position: int, tables: tuple[torch.Tensor, torch.Tensor]) -> BatchEntry:
        """A row at a position for one layer alone; the cache is read and not written."""
        return self._entry((*tables, *(part[layer] for part in self.tensors)), position, 1, 1)

    def _entry(self, tensors: Sequence[torch.Tensor], position: int, run_length: int, n_rows: int) -> BatchEntry:
        kind = KV_DTYPES[self.tensors[0].dtype]
        return BatchEntry(*map(address, tensors), self.capacity, position, run_length, n_rows, kind)

    def grow(self, capacity: int, kept: int) -> None:
        """Makes room for `capacity` tokens in all and keeps the first `kept`. One tensor after the other, so that only
        one of them is there twice; so the cache is lost if there is no memory for one.
        """
        parts, self.tensors = list(self.tensors), ()
        for index in range(len(parts)):
            parts[index] = grown(parts[index], 2, capacity, kept)
        self.tensors, self.capacity = tuple(parts), capacity

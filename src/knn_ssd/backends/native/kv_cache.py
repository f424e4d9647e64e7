"""The native backend's KV cache: float32 keys and values, and 8-bit copies of them for drafts."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of one session, in the order in which the kernels take them.

    The 8-bit copies, with a scale for each vector, are what 4-bit attention sublayers read and write (after arXiv
    2502.10424). With long prompts or large batches, a draft would otherwise read as many bytes of keys and values as of
    weights.

    Args:
        num_layers, kv_heads, head_dim: sizes of the model.
        capacity: the most tokens that the cache can hold.

    Attributes:
        tensors: keys and values (L, kv_heads, capacity, head_dim) in float32, then in int8, then the scales of these
            (L, kv_heads, capacity) in float32.
    """

    def __init__(self, num_layers: int, kv_heads: int, capacity: int, head_dim: int) -> None:
        self.capacity = capacity
        vectors = (num_layers, kv_heads, capacity)
        shapes = ((*vectors, head_dim), torch.float32), ((*vectors, head_dim), torch.int8), (vectors, torch.float32)
        self.tensors = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in shapes for _ in range(2))

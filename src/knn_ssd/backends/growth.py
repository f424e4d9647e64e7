"""Growing the tensors of a KV cache. When and how far they grow, the cursor decides."""

from __future__ import annotations

import torch

from knn_ssd.kernels.arena import large_pages


def grown(tensor: torch.Tensor, dim: int, size: int, kept: int) -> torch.Tensor:
    """A tensor of `size` along a dimension, with the first `kept` entries of another one; the rest is undefined."""
    shape = list(tensor.shape)
    shape[dim] = size
    larger = large_pages(tensor.new_empty(shape))
    larger.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return larger

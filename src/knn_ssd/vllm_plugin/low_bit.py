"""4-bit copies of the weights that vLLM has loaded, which replace them while a plan drafts in mode `low`.

Each copy is made at first use, from the matrix's products with unit vectors: vLLM packs weights in many formats and
drops the originals, and this works with any of them. The kernels are PyTorch's own for CPUs; on other devices `low`
sublayers run in full precision. Groups of 64 columns share a scale and a zero point; weights are rounded to the nearest
level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

GROUP = 64
_ROWS = 16  # the kernel takes multiples of this many rows
_UNIT_VECTORS = 512  # in one product


def find_low_bit_obstacle(device: torch.device) -> str | None:
    """The reason why low-bit copies cannot be used on a device; None if they can."""
    if device.type != "cpu":
        return f"low-bit drafts run on CPUs only, and the model is on {device.type}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return "this PyTorch has no 4-bit kernels for CPUs"
    return None


class LowBitWeight:
    """A matrix (rows, cols) in 4 bits; `apply` takes the place of `apply` of vLLM's quantisation methods.

    Args:
        weight: (rows, cols) the matrix; cols is a multiple of `GROUP`.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._rows, cols = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -self._rows % _ROWS))
        groups = padded.view(len(padded), cols // GROUP, GROUP)
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp_min(1e-8)  # (rows, groups)
        levels = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.int32)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.view(len(padded), cols), 1)
        pairs = torch.stack([scale, low + 8 * scale], dim=-1)  # a weight is (level - 8) * scale + zero
        self._scales = pairs.transpose(0, 1).contiguous().to(weight.dtype)  # (groups, rows, 2)

    def apply(self, _layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product (…, rows) of x (…, cols) with the matrix, plus the bias (rows,)."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, GROUP, self._scales)
        out = out[:, : self._rows].reshape(*x.shape[:-1], self._rows)
        return out if bias is None else out + bias


class LinearCopies:
    """The 4-bit copies of a model's linears, each made once and shared by all plans.

    Args:
        device: device of the model's activations.
        dtype: their dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[int, LowBitWeight | None] = {}

    @contextmanager
    def replacing(self, linears: Sequence[Any]) -> Iterator[None]:
        """Runs these linears on their copies, where they can be copied, for the length of a `with` block."""
        originals = [linear.quant_method for linear in linears]
        copies = [self._copy(linear) for linear in linears]
        try:
            for linear, copy in zip(linears, copies, strict=True):
                linear.quant_method = copy or linear.quant_method
            yield
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.quant_method = original

    def _copy(self, linear: Any) -> LowBitWeight | None:
        key = id(linear)
        if key not in self._made:
            cols = getattr(linear, "input_size_per_partition", None) or linear.embedding_dim
            self._made[key] = LowBitWeight(self._weight(linear, int(cols))) if cols % GROUP == 0 else None
        return self._made[key]

    def _weight(self, linear: Any, cols: int) -> torch.Tensor:
        """This rank's shard (rows, cols) of a linear's matrix."""
        parts = []
        for first in range(0, cols, _UNIT_VECTORS):
            last = min(first + _UNIT_VECTORS, cols)
            units = torch.zeros(last - first, cols, device=self._device, dtype=self._dtype)
            units[:, first:last].fill_diagonal_(1)
            parts.append(linear.quant_method.apply(linear, units, bias=None))
        return torch.cat(parts).T.contiguous()

"""4-bit copies of the weights that vLLM has loaded, run in their place while a draft wants them so.

They are made at first use, of what each matrix gives for unit vectors: vLLM packs weights in many ways and drops the
originals, and this asks for none of them. The kernels are PyTorch's own for CPUs; elsewhere `low` sublayers run as they
are. Groups of 64 columns share a scale and a zero, as in `target/linear.py`, which tells why not 32; rounding is to the
nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

GROUP = 64
_ROWS = 16  # that the kernel takes together
_UNIT_VECTORS = 512  # at a time


def low_bit_obstacle(device: torch.device) -> str | None:
    """What speaks against low-bit copies on a device; None if nothing does."""
    if device.type != "cpu":
        return f"low-bit drafts were made for CPUs, and the model is on {device.type}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return "this PyTorch has no 4-bit kernels for CPUs"
    return None


class LowBitWeight:
    """A matrix (rows, cols) in 4 bits; `apply` stands in for the method by which vLLM runs its linears.

    Args:
        weight: the matrix; its columns a multiple of `GROUP`.
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
        """x (…, cols) through the matrix, (…, rows)."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self._packed, GROUP, self._scales)
        out = out[:, : self._rows].reshape(*x.shape[:-1], self._rows)
        return out if bias is None else out + bias


class LinearCopies:
    """The copies of a model's linears, each made once and shared by all plans.

    Args:
        device, dtype: of the model's activations.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[int, LowBitWeight | None] = {}

    @contextmanager
    def within(self, linears: Sequence[Any]) -> Iterator[None]:
        """Within, these linears run on their copies, as far as such can be made."""
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
        """The matrix (rows, cols) that this rank has of a linear."""
        parts = []
        for first in range(0, cols, _UNIT_VECTORS):
            last = min(first + _UNIT_VECTORS, cols)
            units = torch.zeros(last - first, cols, device=self._device, dtype=self._dtype)
            units[:, first:last].fill_diagonal_(1)
            parts.append(linear.quant_method.apply(linear, units, bias=None))
        return torch.cat(parts).T.contiguous()

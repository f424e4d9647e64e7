"""Weights as the kernels read them: the checkpoint's own where they lie, and 4-bit copies for drafting.

A low-bit copy has 4 bits a weight and, for each group of 64 columns, a scale and a zero in bfloat16: 4.5 bits, 28 % of
bfloat16. Groups of 32 are never used: checkpoints that were published in 4-bit blocks of 32 would be copied almost
exactly on that grid, which shows nothing of other models.

Rounding minimises what it does to a matrix's outputs: a column's error counts as much as its inputs are large (as in
AWQ, arXiv 2306.00978, though nothing is rescaled). Tokens from all over the vocabulary tell that as well as text does.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from knn_ssd.kernels.binding import BFLOAT16, FLOAT32, GROUP, INT4, Attention, Matrix, Mlp, address, kernels

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_Made = TypeVar("_Made", Attention, Mlp, Matrix)
_TRIES = 3  # ranges tried for each group, each refitted by least squares
_LEAST_IMPORTANCE = 1e-3  # of a column, over the mean
_FIRST_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # that shares inputs


@dataclass
class TensorKeeper:
    """Holds the tensors whose addresses the kernels were given."""

    tensors: list[torch.Tensor] = field(default_factory=list)

    def keep(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is not None:
            self.tensors.append(tensor)
        return address(tensor)


def matrix_of(linear: nn.Linear, keeper: TensorKeeper) -> Matrix:
    """A linear's own weight, not copied; a bias becomes float32."""
    weight = linear.weight.detach()
    bias = linear.bias.detach().float().contiguous() if linear.bias is not None else None
    rows, cols = weight.shape
    return Matrix(keeper.keep(weight), None, keeper.keep(bias), rows, cols, KINDS[weight.dtype])


class LowBitCopies:
    """The 4-bit copies of a model's sublayers and head, each made at first use and shared by all plans and sessions.

    Args:
        attentions, mlps: the sublayers as they are.
        head: the LM head as it is.
        run: runs some tokens through sublayers and head like these.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        mlps: Sequence[Mlp],
        head: Matrix,
        run: Callable[[Sequence[Attention], Sequence[Mlp], Matrix], None],
    ) -> None:
        self._attentions, self._mlps, self._head, self._run = attentions, mlps, head, run
        self._importance: dict[tuple[int, str], torch.Tensor] = {}
        self._made: dict[tuple[str, int], Any] = {}
        self._keeper = TensorKeeper()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Memory of all copies made so far."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._keeper.tensors)

    def attention(self, layer: int) -> Attention:
        return self._once(("attention", layer), lambda: self._copy(self._attentions[layer], layer, "qkvo"))

    def mlp(self, layer: int) -> Mlp:
        return self._once(("mlp", layer), lambda: self._copy(self._mlps[layer], layer, ("gate", "up", "down")))

    def head(self) -> Matrix:
        return self._once(("head", 0), lambda: self._round(self._head, self._important(0, "head")))

    def _once(self, key: tuple[str, int], make: Callable[[], _Made]) -> _Made:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: _Made = self._made[key]
            return made

    def _copy(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            setattr(copy, name, self._round(getattr(sublayer, name), self._important(layer, _FIRST_OF[name])))
        return copy

    def _important(self, layer: int, name: str) -> torch.Tensor:
        """How much each of a matrix's columns matters, (cols,): its mean squared input, over the mean of all columns.

        All are found together, the first time that one is asked for.
        """
        if not self._importance:
            attentions = [self._watched(each, i, "qo") for i, each in enumerate(self._attentions)]
            mlps = [self._watched(each, i, ("gate", "down")) for i, each in enumerate(self._mlps)]
            head = Matrix.from_buffer_copy(self._head)
            head.seen = self._sums(0, "head", head)
            self._run(attentions, mlps, head)
            for key, sums in self._importance.items():
                mean = sums.mean()
                known = bool(torch.isfinite(mean)) and float(mean) > 0
                self._importance[key] = (sums / mean).clamp_(_LEAST_IMPORTANCE) if known else torch.ones_like(sums)
        return self._importance[layer, name]

    def _watched(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        """The same sublayer, whose matrices add up their squared inputs."""
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            getattr(copy, name).seen = self._sums(layer, name, getattr(copy, name))
        return copy

    def _sums(self, layer: int, name: str, matrix: Matrix) -> int | None:
        self._importance[layer, name] = torch.zeros(matrix.cols)
        return address(self._importance[layer, name])

    def _round(self, matrix: Matrix, importance: torch.Tensor) -> Matrix:
        groups = -(-matrix.cols // GROUP)
        lanes = kernels().knn_ssd_lanes()
        rows = -(-matrix.rows // lanes) * lanes
        data = torch.zeros(rows, groups, GROUP // 2, dtype=torch.uint8)
        scales = torch.zeros(rows, groups, 2, dtype=torch.bfloat16)
        kernels().knn_ssd_quantise(ctypes.byref(matrix), address(importance), _TRIES, address(data), address(scales))
        return Matrix(self._keeper.keep(data), self._keeper.keep(scales), matrix.bias, matrix.rows, matrix.cols, INT4)

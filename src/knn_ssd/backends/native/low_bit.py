"""4-bit copies of a model's weights, for drafting.

A copy has a scale and a zero in bfloat16 for each group of 64 columns: 4.5 bits a weight, 28 % of bfloat16.
Groups of 32 are never used: checkpoints that were published in 4-bit blocks of 32 would be copied almost exactly on
that grid, which shows nothing about other models.

Quantisation minimises the error of a matrix's outputs: the squared error of a column is weighted by its mean squared
input (as in AWQ, arXiv 2306.00978, but nothing is rescaled). Tokens spread over the vocabulary show these inputs as
well as text does.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from knn_ssd.kernels.binding import GROUP_SIZE, INT4, Attention, Matrix, Mlp, address, kernels
from knn_ssd.kernels.weights import TensorKeeper

_Made = TypeVar("_Made", Attention, Mlp, Matrix)
_NUM_RANGES = 3  # tried for each group, each refitted by least squares
_MIN_IMPORTANCE = 1e-3  # of a column, relative to the mean
# The first of the matrices that share their inputs.
_FIRST_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


class LowBitCopies:
    """The 4-bit copies of a model's sublayers and head, each made at first use and shared by all plans and sessions.

    Args:
        attentions, mlps: the sublayers with the checkpoint's weights.
        head: the LM head with the checkpoint's weights.
        run: runs a sample of tokens through sublayers and a head with these weights.
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
        return self._keeper.bytes

    def attention(self, layer: int) -> Attention:
        """The 4-bit copy of a layer's attention sublayer."""
        return self._once(("attention", layer), lambda: self._copy(self._attentions[layer], layer, "qkvo"))

    def mlp(self, layer: int) -> Mlp:
        """The 4-bit copy of a layer's MLP sublayer."""
        return self._once(("mlp", layer), lambda: self._copy(self._mlps[layer], layer, ("gate", "up", "down")))

    def head(self) -> Matrix:
        """The 4-bit copy of the LM head."""
        return self._once(("head", 0), lambda: self._quantise(self._head, self._column_importance(0, "head")))

    def _once(self, key: tuple[str, int], make: Callable[[], _Made]) -> _Made:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: _Made = self._made[key]
            return made

    def _copy(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            setattr(
                copy, name, self._quantise(getattr(sublayer, name), self._column_importance(layer, _FIRST_OF[name]))
            )
        return copy

    def _column_importance(self, layer: int, name: str) -> torch.Tensor:
        """Importance (cols,) of a matrix's columns: their mean squared input, relative to the mean of all columns.

        That of all matrices is measured in one forward pass, at the first call.
        """
        if not self._importance:
            attentions = [self._with_input_squares(each, i, "qo") for i, each in enumerate(self._attentions)]
            mlps = [self._with_input_squares(each, i, ("gate", "down")) for i, each in enumerate(self._mlps)]
            head = Matrix.from_buffer_copy(self._head)
            head.input_squares = self._new_input_squares(0, "head", head)
            self._run(attentions, mlps, head)
            for key, sums in self._importance.items():
                mean = sums.mean()
                known = bool(torch.isfinite(mean)) and float(mean) > 0
                self._importance[key] = (sums / mean).clamp_(_MIN_IMPORTANCE) if known else torch.ones_like(sums)
        return self._importance[layer, name]

    def _with_input_squares(self, sublayer: _Made, layer: int, names: Sequence[str]) -> _Made:
        """A copy of a sublayer whose matrices add up the squares of their inputs."""
        copy = type(sublayer).from_buffer_copy(sublayer)
        for name in names:
            getattr(copy, name).input_squares = self._new_input_squares(layer, name, getattr(copy, name))
        return copy

    def _new_input_squares(self, layer: int, name: str, matrix: Matrix) -> int | None:
        self._importance[layer, name] = torch.zeros(matrix.cols)
        return address(self._importance[layer, name])

    def _quantise(self, matrix: Matrix, importance: torch.Tensor) -> Matrix:
        groups = -(-matrix.cols // GROUP_SIZE)
        lanes = kernels().knn_ssd_lanes()
        rows = -(-matrix.rows // lanes) * lanes
        data = torch.zeros(rows, groups, GROUP_SIZE // 2, dtype=torch.uint8)
        scales = torch.zeros(rows, groups, 2, dtype=torch.bfloat16)
        kernels().knn_ssd_quantise(
            ctypes.byref(matrix), address(importance), _NUM_RANGES, address(data), address(scales)
        )
        return Matrix(self._keeper.keep(data), self._keeper.keep(scales), matrix.bias, matrix.rows, matrix.cols, INT4)

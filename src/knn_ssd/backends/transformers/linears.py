"""The linear layers of a model of transformers, run by the kernels: with the checkpoint's weights, or in 4 bits.

It finds `nn.Linear`, its subclasses that compute the same, and transformers' `Conv1D`. Weights have the formats of
`kernels/weights.py`. Layers whose number of inputs the kernels do not take stay as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from knn_ssd.backends.structure import Structure
from knn_ssd.backends.transformers.replacement import Replacement, forward_of
from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import Matrix, address, kernels
from knn_ssd.kernels.gguf_rows import GGUFRows, QuantisedLinear, weight_of
from knn_ssd.kernels.quantisation import low_matrix, quantise, relative_importance
from knn_ssd.kernels.weights import KINDS, TensorKeeper, best_blocks, is_read_in_place, make_matrix
from knn_ssd.plan import Mode, Plan

_HEAD, _ELSEWHERE = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class KernelLinear:
    """A linear layer that the kernels can run.

    Args:
        module: the layer.
        matrix: its weight and bias.
        keeper: keeps what the matrix points to.
        place: index of its sublayer in `Plan.modes`, or where else it is.
    """

    module: nn.Module
    matrix: Matrix
    keeper: TensorKeeper
    place: int

    def mode(self, plan: Plan | None) -> Mode:
        """The mode in which it runs under a plan; None is the full model."""
        if plan is None or self.place == _ELSEWHERE:
            return Mode.KEEP
        return plan.head if self.place == _HEAD else plan.modes[self.place]


def find_linears(model: PreTrainedModel, structure: Structure) -> tuple[KernelLinear, ...]:
    """The linear layers of a model that the kernels can run."""
    places = {
        module: 2 * layer + offset
        for layer, pair in enumerate(zip(structure.attention, structure.mlp, strict=True))
        for offset, sublayer in enumerate(pair)
        for module in sublayer.modules()
    }
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    arena = Arena()
    return tuple(
        _kernel_linear(module, _HEAD if module is head else places.get(module, _ELSEWHERE), arena)
        for module in model.modules()
        if _is_runnable(module)
    )


class KernelLinears:
    """Runs a model's linear layers by the kernels; the 4-bit copies are made at first use, for all plans.

    Args:
        linears: the layers.
        run_sample: runs a sample of tokens through the model with other forwards of these layers, to measure the inputs
            that the 4-bit copies are fitted to.
    """

    def __init__(self, linears: Sequence[KernelLinear], run_sample: Callable[[Sequence[Replacement]], None]) -> None:
        self._linears, self._run_sample = linears, run_sample
        self._kept = [forward_of(each.module, _forward(each.matrix)) for each in linears]
        self._low: dict[int, Replacement] = {}
        self._arena = Arena()
        self._importance: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    @property
    def modules(self) -> list[nn.Module]:
        """The layers."""
        return [each.module for each in self._linears]

    @property
    def weight_bytes(self) -> int:
        """Memory of the checkpoint's weights as the kernels read them."""
        return sum(each.keeper.bytes for each in self._linears)

    @property
    def num_weights(self) -> int:
        """How many weights there are."""
        return sum(each.matrix.rows * each.matrix.cols for each in self._linears)

    @property
    def bytes(self) -> int:
        """Memory of the 4-bit copies made so far."""
        return sum(tensor.nbytes for tensor in self._copies)

    def forwards(self, plan: Plan | None) -> Iterator[Replacement]:
        """The forwards of all layers under a plan. Sublayers that it skips do not run, whatever their forwards are."""
        for index, linear in enumerate(self._linears):
            yield self._low_forward(index) if linear.mode(plan) is Mode.LOW else self._kept[index]

    def _low_forward(self, index: int) -> Replacement:
        if index not in self._low:
            linear = self._linears[index]
            tensors = quantise(linear.matrix, self._column_importance(index), self._arena)
            self._copies += tensors
            self._low[index] = forward_of(linear.module, _forward(low_matrix(linear.matrix, *tensors)))
        return self._low[index]

    def _column_importance(self, index: int) -> torch.Tensor:
        """Importance (cols,) of a layer's inputs: their mean square, relative to the mean of all (as in AWQ, arXiv
        2306.00978). That of all layers is measured in one forward pass, at the first call.
        """
        if not self._importance:
            sums = [torch.zeros(each.matrix.cols) for each in self._linears]
            self._run_sample(
                [
                    forward_of(each.module, _forward(_measuring(each.matrix, squares)))
                    for each, squares in zip(self._linears, sums, strict=True)
                ]
            )
            self._importance = [relative_importance(each) for each in sums]
        return self._importance[index]


def _forward(matrix: Matrix) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `forward` that applies a matrix to inputs (…, cols) of any dtype; its outputs (…, rows) are float32."""
    run, reference, rows, cols = kernels().knn_ssd_linear, ctypes.byref(matrix), matrix.rows, matrix.cols

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        x = inputs.float().contiguous()
        y = torch.empty(*x.shape[:-1], rows)
        run(reference, x.data_ptr(), x.numel() // cols, y.data_ptr())
        return y

    return forward


def _measuring(matrix: Matrix, squares: torch.Tensor) -> Matrix:
    """The matrix, adding the squares of its inputs to `squares` (cols,)."""
    measuring = Matrix.from_buffer_copy(matrix)
    measuring.input_squares = address(squares)
    return measuring


def _kernel_linear(module: Any, place: int, arena: Arena) -> KernelLinear:
    keeper, weight = TensorKeeper(), _weight(module)
    blocks = None if is_read_in_place(weight) else best_blocks(weight, arena)
    return KernelLinear(module, make_matrix(weight, module.bias, keeper, blocks), keeper, place)


def _weight(module: Any) -> torch.Tensor | GGUFRows:
    """The weight (rows, cols), contiguous."""
    if isinstance(module, QuantisedLinear):
        return weight_of(module)
    weight: torch.Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).contiguous()


def _is_runnable(module: nn.Module) -> bool:
    """Whether the kernels compute what this module computes."""
    if not isinstance(module, nn.Linear | Conv1D) or _is_modified(module):
        return False
    rows, cols = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
    if isinstance(module, QuantisedLinear):
        cols = module.in_features
    elif module.weight.dtype not in KINDS:
        return False
    if cols % (2 * kernels().knn_ssd_lanes()) or not rows:
        return False
    return isinstance(module, Conv1D | QuantisedLinear) or type(module) is nn.Linear or _computes_a_linear(module)


def _is_modified(module: nn.Module) -> bool:
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _computes_a_linear(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` gives its results, found by running it on one row."""
    row = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype)[None]
    with torch.no_grad():
        expected = nn.functional.linear(row, module.weight, module.bias)
        found = module(row)
    tolerance = 4 * torch.finfo(row.dtype).eps
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())

"""The modules of a model of transformers that the kernels run: with the checkpoint's weights, or in 4 bits.

It finds `nn.Linear`, its subclasses that compute the same, and transformers' `Conv1D`; `experts.py` finds the experts
of mixtures. Weights have the formats of `kernels/weights.py`. Layers whose number of inputs the kernels do not take
stay as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from knn_ssd.backends.copy_maker import CopyMaker
from knn_ssd.backends.kept_copies import copies_cache_key
from knn_ssd.backends.packed import PackedWeights
from knn_ssd.backends.structure import Structure
from knn_ssd.backends.transformers.replacement import Replacement, forward_of
from knn_ssd.kernels.binding import Matrix, address, kernels
from knn_ssd.kernels.gguf_rows import GGUFRows, QuantisedLinear, weight_of
from knn_ssd.kernels.quantisation import relative_importance
from knn_ssd.kernels.weights import KINDS
from knn_ssd.plan import Mode, Plan
from knn_ssd.progress import NoProgress, Progress
from knn_ssd.weight_cache import WeightCache

_SCHEME = "by module"  # how matrices are named in the weight cache
_HEAD, ELSEWHERE = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class KernelModule:
    """A module that the kernels can run: a linear layer, or the experts of a layer.

    Args:
        module: the module.
        name: its name in the model.
        place: index of its sublayer in `Plan.modes`, or where else it is.
        weights: the weight (rows, cols) and the bias (rows,) of each of its matrices; they may be views.
        inputs: for each matrix, the number of the input that it multiplies; matrices may share one.
        forward: makes a `forward` of the module that applies given matrices.
    """

    module: nn.Module
    name: str
    place: int
    weights: tuple[tuple[torch.Tensor | GGUFRows, torch.Tensor | None], ...]
    inputs: tuple[int, ...]
    forward: Callable[[Sequence[Matrix]], Callable[..., torch.Tensor]]

    def mode(self, plan: Plan | None) -> Mode:
        """The mode in which it runs under a plan; None is the full model."""
        if plan is None or self.place == ELSEWHERE:
            return Mode.KEEP
        return plan.head if self.place == _HEAD else plan.modes[self.place]

    @property
    def matrix_names(self) -> list[str]:
        """A name for each of its matrices, the same at every start."""
        return [f"{self.name}.{index}" for index in range(len(self.weights))]


def places_of(structure: Structure) -> dict[nn.Module, int]:
    """For each module within a sublayer, the index of the sublayer in `Plan.modes`."""
    return {
        module: 2 * layer + offset
        for layer, pair in enumerate(zip(structure.attention, structure.mlp, strict=True))
        for offset, sublayer in enumerate(pair)
        for module in sublayer.modules()
    }


def find_linears(model: PreTrainedModel, places: Mapping[nn.Module, int]) -> Iterator[KernelModule]:
    """The linear layers of a model that the kernels can run.

    Args:
        model: the model.
        places: of the modules within sublayers; see `KernelModule`.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    module: Any
    for name, module in model.named_modules():
        if _is_runnable(module):
            place = _HEAD if module is head else places.get(module, ELSEWHERE)
            weights = ((_weight(module), None if module.bias is None else module.bias.detach()),)
            yield KernelModule(module, name, place, weights, (0,), lambda matrices: multiplied_by(matrices[0]))


class KernelLinears:
    """Runs modules of a model by the kernels, with the checkpoint's weights or their 4-bit copies; see `CopyMaker`.

    Args:
        modules: what is run.
        run_sample: runs a sample of tokens through the model with other forwards of these modules, to measure the
            inputs that the 4-bit copies are fitted to.
        cache: where packed weights and copies are kept; None keeps none.
        is_busy: whether requests are running, with which making copies in the background takes turns.
        turn: held while a part of a copy is made, as by forward passes; None is nothing.
    """

    def __init__(
        self,
        modules: Sequence[KernelModule],
        run_sample: Callable[[Sequence[Replacement]], None],
        cache: WeightCache | None = None,
        is_busy: Callable[[], bool] = lambda: False,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        self._modules, self._run_sample = modules, run_sample
        packed = PackedWeights(cache, _SCHEME)
        self._matrices = [
            [packed.matrix(name, *weight) for name, weight in zip(each.matrix_names, each.weights, strict=True)]
            for each in modules
        ]
        packed.finish()
        self._packed = packed
        self._kept = [_forward_of(each, matrices) for each, matrices in zip(modules, self._matrices, strict=True)]
        self._low: dict[int, Replacement] = {}
        self._importance: dict[str, torch.Tensor] = {}
        pairs = zip(modules, self._matrices, strict=True)
        named = {name: m for each, own in pairs for name, m in zip(each.matrix_names, own, strict=True)}
        self.copies = CopyMaker(
            named, self._column_importance, cache, [copies_cache_key(_SCHEME)], is_busy, turn or nullcontext()
        )

    @property
    def modules(self) -> list[nn.Module]:
        """The modules."""
        return [each.module for each in self._modules]

    @property
    def weight_bytes(self) -> int:
        """Memory of the checkpoint's weights as the kernels read them."""
        return self._packed.keeper.bytes

    @property
    def num_weights(self) -> int:
        """How many weights there are."""
        return self._packed.num_weights

    def prepare(self, plan: Plan | None, progress: Progress) -> None:
        """Makes the copies that a plan uses; see `CopyMaker.prepare`. The caller holds no turn."""
        if names := self._names_of_low(plan):
            self.copies.prepare(names, self._if_kept(progress))

    def prepare_later(self, plan: Plan, progress: Progress) -> bool:
        """Whether the copies that a plan uses are there; see `CopyMaker.prepare_later`. The caller holds no turn."""
        names = self._names_of_low(plan)
        return not names or self.copies.prepare_later(names, self._if_kept(progress))

    def _if_kept(self, progress: Progress) -> Progress:
        """The progress, which is shown where copies are made to be kept."""
        return progress if self.copies.is_kept else NoProgress()

    def forwards(self, plan: Plan | None) -> list[Replacement]:
        """The forwards of all modules under a plan whose copies were made. Sublayers that it skips do not run, whatever
        their forwards are.

        Args:
            plan: the plan; None is the full model.
        """
        return [
            self._low_forward(index) if each.mode(plan) is Mode.LOW else self._kept[index]
            for index, each in enumerate(self._modules)
        ]

    def matrices(self, plan: Plan | None) -> dict[nn.Module, Matrix]:
        """The matrix of each linear layer under a plan whose copies were made."""
        return {
            each.module: self.copies.matrix(each.matrix_names[0]) if each.mode(plan) is Mode.LOW else own[0]
            for each, own in zip(self._modules, self._matrices, strict=True)
            if len(own) == 1
        }

    def _names_of_low(self, plan: Plan | None) -> list[str]:
        """The matrices whose copies run under a plan."""
        return [name for each in self._modules if each.mode(plan) is Mode.LOW for name in each.matrix_names]

    def _low_forward(self, index: int) -> Replacement:
        if index not in self._low:
            module = self._modules[index]
            self._low[index] = _forward_of(module, [self.copies.matrix(name) for name in module.matrix_names])
        return self._low[index]

    def _column_importance(self, name: str) -> torch.Tensor:
        """Importance (cols,) of a matrix's inputs: their mean square, relative to the mean of all (as in AWQ, arXiv
        2306.00978). That of all matrices is measured in one forward pass, at the first call.
        """
        if not self._importance:
            measuring: list[Replacement] = []
            sums: dict[str, torch.Tensor] = {}
            for each, matrices in zip(self._modules, self._matrices, strict=True):
                squares = {of: torch.zeros(matrix.cols) for of, matrix in zip(each.inputs, matrices, strict=True)}
                sums |= {name: squares[of] for name, of in zip(each.matrix_names, each.inputs, strict=True)}
                measured = [_measuring(m, squares[of]) for m, of in zip(matrices, each.inputs, strict=True)]
                measuring.append(_forward_of(each, measured))
            self._run_sample(measuring)
            self._importance = {name: relative_importance(each) for name, each in sums.items()}
        return self._importance[name]


def multiplied_by(matrix: Matrix) -> Callable[[torch.Tensor], torch.Tensor]:
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


def _forward_of(module: KernelModule, matrices: Sequence[Matrix]) -> Replacement:
    return forward_of(module.module, module.forward(matrices))


def _weight(module: Any) -> torch.Tensor | GGUFRows:
    """The weight (rows, cols)."""
    if isinstance(module, QuantisedLinear):
        return weight_of(module)
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _is_runnable(module: nn.Module) -> bool:
    """Whether the kernels compute what this module computes."""
    if not isinstance(module, nn.Linear | Conv1D) or is_modified(module):
        return False
    rows, cols = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
    if isinstance(module, QuantisedLinear):
        cols = module.in_features
    elif module.weight.dtype not in KINDS:
        return False
    if cols % (2 * kernels().knn_ssd_lanes()) or not rows:
        return False
    return isinstance(module, Conv1D | QuantisedLinear) or type(module) is nn.Linear or _computes_a_linear(module)


def is_modified(module: nn.Module) -> bool:
    """Whether a module's `forward` was replaced or has hooks."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _computes_a_linear(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` gives its results, found by running it on one row."""
    row = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype)[None]
    with torch.no_grad():
        expected = nn.functional.linear(row, module.weight, module.bias)
        found = module(row)
    return is_close(found, expected, 4 * torch.finfo(row.dtype).eps)


def is_close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether both are tensors (…, D) of one shape, and each row of one differs from the other's by at most `tolerance`
    of its norm.
    """
    if not (isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and found.shape == expected.shape):
        return False
    return bool(((found - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all())

"""Finds the gated MLPs of a model of transformers, which the kernels run in one call each."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from knn_ssd.backends.transformers.linears import is_close, is_modified
from knn_ssd.backends.transformers.replacement import Replacement, forward_of, replaced
from knn_ssd.kernels.binding import GELU_TANH, SILU, Matrix, Mlp, float32_inputs, kernels

_LINEARS = ("gate_proj", "up_proj", "down_proj")  # how transformers' models name them
_ACTIVATIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: nn.functional.silu,
    GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
}
_TOLERANCE = 1e-4  # relative


@dataclass(frozen=True, slots=True, eq=False)
class GatedMLP:
    """A module that computes down(activation(gate(x)) * up(x)).

    Args:
        module: the module.
        linears: its linear layers gate, up and down, which the kernels run.
        activation: the number of its activation in csrc/kernels.h.
    """

    module: nn.Module
    linears: tuple[nn.Module, ...]
    activation: int

    def forward(self, matrices: Iterable[Matrix]) -> Replacement:
        """Its `forward` with the matrices of its three linear layers."""
        return forward_of(self.module, _multiplied_by(Mlp(*matrices, activation=self.activation)))


def find_gated_mlps(
    modules: Iterable[nn.Module], matrices: Mapping[nn.Module, Matrix], forwards: Mapping[nn.Module, Replacement]
) -> Iterator[GatedMLP]:
    """The gated MLPs among some modules, recognised by what they and their activations compute.

    Args:
        modules: the modules.
        matrices: those of the linear layers that the kernels run.
        forwards: how the kernels run these layers.
    """
    for module in modules:
        linears = tuple(module._modules.get(name) for name in _LINEARS)
        if not all(each in matrices for each in linears) or not _takes_rows_alone(module):
            continue
        kept: Any = linears  # none of them is None
        others: list[Any] = [each for each in module._modules.values() if each not in kept]
        is_seen = any(each._forward_hooks or each._forward_pre_hooks for each in (*kept, *others) if each is not None)
        activation = _activation_of(others[0]) if len(others) == 1 and not is_seen else None
        if activation is None:
            continue
        found = GatedMLP(module, kept, activation)
        fused = found.forward(matrices[each] for each in kept)
        if _computes(module, [forwards[each] for each in kept], fused, matrices[kept[0]].cols):
            yield found


def _takes_rows_alone(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    is_plain = all(each is None for each in tensors) and not is_modified(module)
    return is_plain and len(inspect.signature(module.forward).parameters) == 1


def _activation_of(module: Any) -> int | None:
    """The number of a module's activation in csrc/kernels.h; None for another one. Its inputs are small and large, as
    activations can have bounds.
    """
    x = torch.cat([torch.linspace(-12, 12, 1024), torch.tensor([-1e4, -100, 100, 1e4])])[None]
    try:
        found = module(x)
    except Exception:  # it takes something else
        return None
    for activation, function in _ACTIVATIONS.items():
        if (
            isinstance(found, torch.Tensor)
            and found.shape == x.shape
            and torch.allclose(found, function(x), 1e-6, 1e-6)
        ):
            return activation
    return None


def _computes(module: nn.Module, own: list[Replacement], fused: Replacement, width: int) -> bool:
    """Whether a module's linear layers, run one by one, come to what one call gives."""
    row = torch.linspace(-2, 3, width)
    rows = torch.stack([row, 1e-2 * row.flip(0), 1e2 * row])[None]  # as they can have bounds
    try:
        with torch.no_grad(), float32_inputs():
            with replaced(own):
                expected = module(rows)
            with replaced([fused]):
                found = module(rows)
    except Exception:  # it computes something else
        return False
    return is_close(found, expected, _TOLERANCE)


def _multiplied_by(mlp: Mlp) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `forward` for inputs (…, D) of any dtype; its outputs (…, D) are float32."""
    run, reference, width = kernels().knn_ssd_mlp, ctypes.byref(mlp), mlp.gate.cols

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        x = inputs.float().contiguous()
        y = torch.empty_like(x)
        run(reference, x.data_ptr(), x.numel() // width, y.data_ptr())
        return y

    return forward

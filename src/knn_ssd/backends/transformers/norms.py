"""Finds the RMS norms of a model of transformers and has the kernels run them: one call instead of eight of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from knn_ssd.backends.transformers.linears import is_close, is_modified
from knn_ssd.backends.transformers.replacement import Replacement, forward_of
from knn_ssd.kernels.binding import kernels

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # how transformers' norms name it
_TOLERANCE = 1e-5  # relative


def norm_replacements(modules: Iterable[nn.Module]) -> Iterator[Replacement]:
    """The RMS norms among some modules, run by the kernels on float32 inputs, row by row.

    A norm is recognised by what it computes, on two rows of which one is small: x / rms(x) times its weight, or times
    one more than its weight, as Gemma has it.
    """
    for module in modules:
        if (found := _scale_and_epsilon(module)) is not None:
            yield forward_of(module, _normalised_by(*found))


def _scale_and_epsilon(module: nn.Module) -> tuple[torch.Tensor, float] | None:
    """The scale (D,) and the epsilon of an RMS norm; None for another module, and where the kernels do not take D."""
    weight: Any = module._parameters.get("weight")
    epsilon = next((vars(module)[name] for name in _EPSILONS if name in vars(module)), None)
    has_more = len(module._parameters) != 1 or any(True for _ in module.children()) or is_modified(module)
    if has_more or weight is None or weight.dim() != 1 or len(weight) % kernels().knn_ssd_lanes():
        return None
    if not isinstance(epsilon, float) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    scale = weight.detach().float()
    return next(((each, epsilon) for each in (scale, scale + 1) if _computes_an_rms_norm(module, each, epsilon)), None)


def _computes_an_rms_norm(module: nn.Module, scale: torch.Tensor, epsilon: float) -> bool:
    row = torch.linspace(-2, 3, len(scale))
    rows = torch.stack([row, 1e-3 * row])  # in the second, epsilon counts
    expected = scale * rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + epsilon)
    try:
        with torch.no_grad():
            found = module(rows)
    except Exception:  # it computes something else
        return False
    return is_close(found, expected, _TOLERANCE)


def _normalised_by(scale: torch.Tensor, epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A `forward` for inputs (…, D) of any dtype; its outputs are float32."""
    run, width = kernels().knn_ssd_rms_norm, len(scale)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        x = inputs.float().contiguous()
        y = torch.empty_like(x)
        run(x.data_ptr(), x.numel() // width, width, scale.data_ptr(), epsilon, y.data_ptr())
        return y

    return forward

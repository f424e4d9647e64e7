"""Has the modules between the linear layers compute in float32, and each row as if it were alone.

Norms, rotary embeddings and residuals of transformers work row by row, in float32 on float32 inputs; RMS norms are run
by the kernels, which is faster. What is left to do: in a 16-bit model, embeddings and small weights become float32.
And activation functions run one row at a time, because torch computes some of them (SiLU, GELU by tanh, sigmoid) with
other instructions at the end of a tensor, so that a row's bits would depend on how many rows follow it. So do the
functions by which a mixture routes a row to its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from knn_ssd.backends.structure import Structure
from knn_ssd.backends.transformers.norms import norm_replacements
from knn_ssd.backends.transformers.replacement import Replacement, forward_of

# By their names in torch: what routers and the gates of shared experts compute.
_ROUTING = {"linear", "matmul", "softmax", "sigmoid", "softplus", "topk"}


def row_wise_replacements(
    model: PreTrainedModel,
    structure: Structure,
    linears: Collection[nn.Module],
    mixtures: Collection[nn.Module] = (),
) -> list[Replacement]:
    """What is replaced in the modules that the kernels do not run.

    Args:
        model: the model.
        structure: its sublayers.
        linears: the modules that the kernels run.
        mixtures: the sublayers that have experts.
    """
    norms = list(norm_replacements(module for module in model.modules() if module not in linears))
    taken = {id(norm.attributes) for norm in norms}
    others = [m for m in model.modules() if m not in linears and id(vars(m)) not in taken]
    sublayers = {module for sublayer in structure.attention + structure.mlp for module in sublayer.modules()}
    return [
        *norms,
        *(each for module in others for each in _in_float32(module)),
        *(forward_of(m, row_by_row(m.forward)) for m in others if m in sublayers and _is_activation(m)),
        *(forward_of(m, _routing_row_by_row(m.forward)) for m in mixtures),
    ]


def _in_float32(module: nn.Module) -> Iterator[Replacement]:
    if isinstance(module, nn.Embedding):  # its table stays as it is, and the rows that are read become float32
        if module.weight.dtype is not torch.float32:
            yield forward_of(module, _float32_outputs(module.forward))
        return
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float32:
                yield Replacement(tensors, name, tensor.detach().float())


def _float32_outputs(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(*args, **kwargs).float()

    return run


def _is_activation(module: nn.Module) -> bool:
    """Whether a module has nothing but a function: no weights, no modules of its own."""
    is_leaf = not any(True for _ in module.children()) and not module._parameters and not module._buffers
    return is_leaf and not isinstance(module, nn.Dropout | nn.Identity)


def row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, applied to each row (…, width) of its first argument alone; its results are joined again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else None
        if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2 or inputs.numel() == inputs.shape[-1]:
            return function(*args, **kwargs)
        *leading, width = inputs.shape
        rows = torch.split(inputs.reshape(-1, *[1] * (len(leading) - 1), width), 1)  # as many dimensions as before
        results = [function(row, *args[1:], **kwargs) for row in rows]
        if isinstance(results[0], tuple):
            return type(results[0])(torch.cat(parts).view(*leading, -1) for parts in zip(*results, strict=True))
        return torch.cat(results).view(*leading, -1)

    return run


class _RoutingRowByRow(TorchFunctionMode):
    """Has the functions of `_ROUTING` compute each row alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = row_by_row(func) if getattr(func, "__name__", "") in _ROUTING else func
        return run(*args, **(kwargs or {}))


def _routing_row_by_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _RoutingRowByRow():
            return forward(*args, **kwargs)

    return run

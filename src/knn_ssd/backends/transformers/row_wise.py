"""Has the modules between the linear layers compute in float32, and each row as if it were alone.

Norms, rotary embeddings and residuals of transformers work row by row, in float32 on float32 inputs. What is left to
do: in a 16-bit model, embeddings and small weights become float32. And activation functions run one row at a time,
because torch computes some of them (SiLU, GELU by tanh, sigmoid) with other instructions at the end of a tensor, so
that a row's bits would depend on how many rows follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from knn_ssd.backends.structure import Structure
from knn_ssd.backends.transformers.replacement import Replacement, forward_of


def row_wise_replacements(
    model: PreTrainedModel, structure: Structure, linears: Collection[nn.Module]
) -> list[Replacement]:
    """What is replaced in the modules that are not among the linear layers that the kernels run."""
    others = [module for module in model.modules() if module not in linears]
    sublayers = {module for sublayer in structure.attention + structure.mlp for module in sublayer.modules()}
    return [
        *(each for module in others for each in _in_float32(module)),
        *(forward_of(m, _row_by_row(m.forward)) for m in others if m in sublayers and _is_activation(m)),
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


def _row_by_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2 or inputs.numel() == inputs.shape[-1]:
            return forward(*args, **kwargs)
        rows = torch.split(inputs.reshape(-1, inputs.shape[-1]), 1)  # of (1, width) each
        return torch.cat([forward(row) for row in rows]).view(inputs.shape)

    return run
